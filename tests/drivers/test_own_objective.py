"""A loss and an advantage of the user's own: `--loss-type module:function`, `--advantage module:function`."""

import sys

import pytest
import torch

from drivers import train as train_program
from drivers.common.errors import UsageError
from drivers.settings import own_objective
from drivers.settings.command_line import parse_train_config
from drivers.settings.formula import formula, show
from drivers.training.advantages import prepare_rollouts
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import compute_objective, find_responses_with_gradient, weigh_step
from drivers.training.state import TrainingState, validate_resume
from drivers.training.update import accumulate_gradients
from grpo_core.testing import check_objective
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts, sample_rollouts

OWN = '''
import torch
from grpo_core import compute_grpo_clip_loss, compute_gspo_loss, compute_leave_one_out_advantages

def clip(advantages, policy_log_probs, old_log_probs, response_mask, cliprange, cliprange_high, dual_clip):
    return compute_grpo_clip_loss(
        advantages, policy_log_probs, old_log_probs, cliprange,
        cliprange_high=cliprange_high, dual_clip=dual_clip, response_mask=response_mask,
    )

def per_response(advantages, policy_log_probs, old_log_probs, response_mask):
    return compute_gspo_loss(advantages, policy_log_probs, old_log_probs, cliprange=0.2, response_mask=response_mask)

def rewarded(raw_rewards, policy_log_probs, response_mask):
    """A reward of 0 has a gradient: what failed is made less likely."""
    return torch.where(response_mask, -(2 * raw_rewards.detach() - 1) * policy_log_probs, 0.0)

def first_column(advantages, policy_log_probs, response_mask):
    return torch.where(response_mask, -advantages.detach().reshape(-1, 1) * policy_log_probs, 0.0)

def batch_mean(policy_log_probs):
    return -policy_log_probs.mean()

def centered(advantages, policy_log_probs, response_mask):
    return torch.where(response_mask, -(advantages - advantages.mean()).detach() * policy_log_probs, 0.0)

def with_beta(policy_log_probs, beta):
    return -beta * policy_log_probs

def leave_one_out(rewards, group_sizes):
    return compute_leave_one_out_advantages(rewards, group_sizes)

def batch_centered(rewards):
    return rewards - rewards.mean()

def signed(rewards):
    return (2 * rewards - 1).nan_to_num(0.0)

def spread(rewards, group_sizes, advantage_eps):
    groups = rewards.view(-1, group_sizes)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    return (centered.sign() * centered.abs() / (centered.abs() + advantage_eps)).nan_to_num(0.0).flatten()

not_callable = 1
'''
TWO_UPDATES = {"epochs_per_rollout_batch": 2, "cliprange": 0.01, "cliprange_high": 0.02}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Return the name of a function of a file of one's own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for cached in (own_objective._describe_own_loss, own_objective._describe_own_advantage):
        cached.cache_clear()
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield lambda function: f"{file}:{function}"
    sys.modules.pop("mine", None)


def gradients_of(**settings):
    config, parts = make_tiny_config(**settings), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    accumulate_gradients(parts.policy, batch, config, 0.0, UpdateMetrics())
    return [parameter.grad for parameter in parts.policy.parameters()]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("ours", "own_flags"),
    [
        ({"loss_type": "grpo_clip", **TWO_UPDATES}, {"loss_type": "clip", **TWO_UPDATES}),
        ({"loss_type": "grpo_clip", "dual_clip": 1.5}, {"loss_type": "clip", "dual_clip": 1.5}),
        ({"loss_type": "gspo"}, {"loss_type": "per_response"}),
        ({"advantage": "leave_one_out"}, {"advantage": "leave_one_out"}),
    ],
    ids=["clip", "dual clip", "per response", "advantage"],
)
def test_own_function_that_is_one_of_ours_has_the_same_gradient(own, ours, own_flags):
    named = {name: own(own_flags[name]) for name in ("loss_type", "advantage") if name in own_flags}
    torch.testing.assert_close(gradients_of(**own_flags | named), gradients_of(**ours), rtol=0, atol=0)


def test_own_loss_row_follows_from_the_function(own):
    clip, per_response, rewarded = (
        own_objective.find_objective(own(name)) for name in ("clip", "per_response", "rewarded")
    )
    assert clip.reads == ("cliprange", "cliprange_high", "dual_clip", "off_policy_threshold")
    assert clip.uses_ratio
    assert clip.accepts_token_advantages
    assert not (clip.has_response_loss)
    assert not (clip.has_response_ratio)
    assert not (clip.has_gradient_without_signal)
    assert per_response.has_response_loss
    assert per_response.has_response_ratio
    assert not per_response.accepts_token_advantages
    assert not (rewarded.uses_advantages)
    assert not (rewarded.uses_ratio)
    assert rewarded.has_gradient_without_signal
    assert not own_objective.find_objective(own("first_column")).accepts_token_advantages


def test_own_advantage_row_follows_from_the_function(own):
    assert own_objective.find_advantage(own("leave_one_out")).compares_within_group
    assert not own_objective.find_advantage(own("signed")).compares_within_group
    assert own_objective.find_advantage(own("spread")).reads == ("advantage_eps",)


def test_responses_without_signal_are_trained_on_if_the_own_loss_has_a_gradient_there(own):
    config, parts = make_tiny_config(loss_type=own("rewarded")), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts, rewards=torch.zeros(32))
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    assert find_responses_with_gradient(config, batch, 0.0) == list(range(32))
    assert config.has_signal_in_equal_groups
    log_probs = torch.full(batch.response_mask.shape, -2.0)
    losses = compute_objective(config, batch, log_probs, log_probs).losses
    assert torch.equal(losses, torch.where(batch.response_mask, -2.0, 0.0))


def test_show_names_own_functions_and_what_they_get(own):
    lines = formula(make_tiny_config(loss_type=own("clip"), advantage=own("leave_one_out"), cliprange=0.1))
    assert "A_i      = leave_one_out(r, G)" in lines
    assert (
        "loss_it  = clip(A_i, log pi(o_it), log sg[pi](o_it), mask, cliprange=0.1, cliprange_high=0.1, dual_clip=None)"
    ) in lines
    assert f"* loss_type                    {own('clip')}" in show(make_tiny_config(loss_type=own("clip")))
    assert "loss_i   = per_response(" in "\n".join(formula(make_tiny_config(loss_type=own("per_response"))))


REFUSED = [
    ({"loss_type": "ppo"}, "--loss-type ppo: must be one of no_baseline, reinforce_with_baseline, grpo_clip"),
    ({"loss_type": "GRPO"}, "or your own function as my_module:function or path/to/file.py:function; did you mean gr"),
    ({"advantage": "groups"}, "--advantage groups: must be one of group, leave_one_out"),
    ({"loss_type": "nowhere.py:loss"}, "--loss-type nowhere.py:loss: no such file, nowhere.py"),
    ({"advantage": "no_such_module:f"}, "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    ({"loss_type": "OWN:missing"}, "mine.py has no function missing"),
    ({"loss_type": "OWN:not_callable"}, "mine.py has no function not_callable"),
    ({"loss_type": "OWN:batch_mean"}, "batch_mean: returns shape (), but must return (4, 5), a loss per token"),
    ({"loss_type": "OWN:with_beta"}, "with_beta: its parameter beta needs a default; known are advantages"),
    ({"loss_type": "math:floor"}, "math:floor: its parameter x must be one that can be passed by name"),
    ({"loss_type": "OWN:centered"}, "in another micro-batch; its rows must be independent"),
    ({"advantage": "OWN:batch_centered"}, "gives a response without a reward (NaN) the advantage nan instead of 0"),
    ({"advantage": "OWN:batch_mean"}, "batch_mean: its parameter policy_log_probs needs a default"),
    ({"loss_type": "OWN:per_response", "cliprange": 0.1}, "--cliprange 0.1: has no effect with --loss-type"),
    ({"loss_type": "OWN:clip", "ratio_high": 3.0}, "--ratio-high 3.0: has no effect with --loss-type"),
    ({"advantage": "OWN:signed", "advantage_eps": 0.1}, "--advantage-eps 0.1: has no effect with --advantage"),
    ({"loss_type": "OWN:rewarded", "off_policy_threshold": 0.1}, "--off-policy-threshold 0.1: has no effect"),
    ({"loss_type": "OWN:per_response", "aggregation": "token_mean"}, "pass --aggregation sequence_mean"),
    ({"advantage": "OWN:signed", "max_refills": 1}, "they have a gradient too; pass --max-refills 0"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_unusable_own_function_is_refused_in_one_line(own, settings, message):
    settings = {
        key: own(value[4:]) if isinstance(value, str) and value[:4] == "OWN:" else value
        for key, value in settings.items()
    }
    with pytest.raises(UsageError) as raised:
        make_tiny_config(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_own_function_is_checked_before_anything_is_loaded(own, capsys):
    with pytest.raises(SystemExit) as ended:
        train_program.main(["--recipe", "quickstart", "--loss-type", own("batch_mean")])
    assert ended.value.code == 2
    assert f"train.py: --loss-type {own('batch_mean')}: returns shape ()" in capsys.readouterr().err


def test_resume_with_a_changed_file_is_refused(own, tmp_path):
    config = make_tiny_config(loss_type=own("clip"), advantage=own("leave_one_out"))
    saved = TrainingState(config, make_tiny_parts().policy).values()
    assert list(saved["settings"]["own_functions"]) == [
        f"--loss-type {own('clip')}",
        f"--advantage {config.advantage}",
    ]
    validate_resume(config, saved)
    validate_resume(make_tiny_config(loss_type="grpo_clip"), saved)  # a flag overrides a setting of the run
    (tmp_path / "mine.py").write_text(OWN + "\n# another line\n")
    validate_resume(config, saved)  # the run itself goes on with what it has imported
    own_objective._describe_own_loss.cache_clear()
    with pytest.raises(UsageError, match=r"mine\.py:clip: its file has changed since the checkpoint; restore it, or"):
        validate_resume(make_tiny_config(loss_type=own("clip")), saved)


def test_file_with_the_name_of_a_module_replaces_none(own, tmp_path):
    (tmp_path / "json.py").write_text(OWN)
    assert own_objective.find_objective(f"{tmp_path}/json.py:clip").uses_ratio
    assert sys.modules["json"].dumps({}) == "{}"
    del sys.modules[str(tmp_path / "json.py")]


def test_example_of_the_tutorial_obeys_every_law_and_takes_the_clip():
    config = parse_train_config(["--loss-type", "docs/examples/soft_clip.py:soft_clip_loss", "--cliprange", "0.3"])
    loss = config.objective.own_function
    assert check_objective(loss, cliprange=0.2) == "token"
    assert "cliprange=0.3)" in "\n".join(formula(config))
