"""Replayed sets: a truncated sampler and the policy have one distribution, in log-probs, losses and checkpoints."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.protocol import exclude_end
from drivers.settings.formula import show
from drivers.settings.sampling import Sampling
from drivers.training.batch import StepRollouts, make_rollout_batch
from drivers.training.forward import forward
from drivers.training.micro_batches import Row
from drivers.training.self_check import self_check_sampling
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts
from tests.drivers.helpers.runs import run_training

SAMPLERS = {
    "top-p": {"sampling_top_p": 0.5},
    "top-k": {"sampling_top_k": 7},
    "min-p": {"sampling_min_p": 0.8},
    "minimum": {"sampling_min_tokens": 4},
    "all": {"sampling_top_p": 0.9, "sampling_top_k": 30, "sampling_min_p": 0.1, "sampling_min_tokens": 2},
}


def sample(config, parts):
    prompts = [question.prompt_token_ids for question in parts.questions]
    completions = parts.engine.generate(prompts, config.sampling, seed=1)
    return make_rollout_batch(completions, torch.zeros(len(completions)), config.group_size)


@pytest.mark.medium
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("has_head", [True, False], ids=["fused", "logits"])
def test_replayed_log_probs_equal_those_of_sampler(name, has_head, monkeypatch):
    """In rows of a group and in rows of one response, by the fused head and from all logits."""
    if not has_head:
        monkeypatch.setattr("drivers.training.forward.find_head", lambda policy: None)
    config, parts = make_tiny_config(sampling_replay=True, **SAMPLERS[name]), make_tiny_parts()
    rollouts = sample(config, parts)
    completions = rollouts.completions
    apart = [Row(c.prompt_token_ids, (i,), (len(c.token_ids),)) for i, c in enumerate(completions)]
    for rows in (None, apart, apart[::-1]):
        token_values = forward(parts.policy, rollouts, 1.0, rows, with_entropy=True)
        assert_close(token_values["log_probs"].detach(), rollouts.sampler_log_probs, rtol=0, atol=1e-5)
        assert (token_values["token_entropy"] >= -1e-6).all()
    bare = replace(rollouts, completions=tuple(replace(c, kept=None, excluded=()) for c in completions))
    whole = forward(parts.policy, bare, 1.0, with_entropy=True)
    # What the sampler left out had a share of the probability.
    assert (whole["log_probs"] < token_values["log_probs"] - 1e-3)[:, 0].all()
    assert (whole["token_entropy"] > token_values["token_entropy"])[:, 0].all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_replayed_rollouts_survive_a_checkpoint(name):
    config, parts = make_tiny_config(sampling_replay=True, **SAMPLERS[name]), make_tiny_parts()
    completions = list(sample(config, parts).completions)
    pending = StepRollouts(completions, [{}] * len(completions), torch.zeros(len(completions)), None, {})
    assert StepRollouts.from_json(json.loads(json.dumps(pending.to_json()))).completions == completions


def test_kept_tokens_are_compact():
    sets = [[3, 100_000], [], [7]]
    packed = KeptTokens.pack(sets)
    assert packed.unpack() == sets
    assert packed.to_tensor(3).tolist() == [[3, 100_000, -1], [-1, -1, -1], [7, -1, -1]]
    assert len(packed.ids) == 4 * 3 * 4 / 3
    assert KeptTokens.pack([]).unpack() == []


@pytest.mark.parametrize("settings", [{"importance": "truncate"}, {"loss_type": "grpo_clip", "old_policy": "sampler"}])
def test_replayed_ratio_is_one_on_policy(tmp_path, settings):
    """Without replay, these settings are refused."""
    config = {"sampling_top_p": 0.8, "sampling_min_tokens": 4, "sampling_replay": True, "n_grpo_steps": 1}
    _, (step,), _ = run_training(tmp_path, **config, **settings)
    if "importance" in settings:
        assert step["mismatch_mean"] < 1e-5
        assert step["importance_ess"] == pytest.approx(1.0, abs=1e-5)
    else:
        assert step["mean_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_self_check_sampling_truncates_only_if_replayed():
    """Without replay, a truncated sampler would seem to have other weights."""
    settings = {"sampling_top_p": 0.5, "sampling_top_k": 9, "sampling_min_p": 0.1}
    plain, replayed = (self_check_sampling(make_tiny_config(sampling_replay=on, **settings)) for on in (False, True))
    assert (plain.truncates, plain.replays) == (False, False)
    assert (replayed.top_p, replayed.top_k, replayed.min_p, replayed.replays) == (0.5, 9, 0.1, True)


def test_minimum_length_without_replay_excludes_nothing():
    config, parts = make_tiny_config(sampling_min_tokens=4), make_tiny_parts()
    assert {completion.excluded for completion in sample(config, parts).completions} == {()}


def test_exclude_end_ends_with_a_short_response():
    sampling = Sampling(min_tokens=3, replays=True)
    assert [exclude_end(sampling, [9], length) for length in (1, 5)] == [((9,),), ((9,),) * 3]


def test_show_states_the_softmax_of_replay():
    words = "pi is the softmax over the tokens that the sampler could draw"
    shown = [show(make_tiny_config(sampling_top_p=0.5, sampling_replay=on)) for on in (False, True)]
    assert [words in " ".join(text.split()) for text in shown] == [False, True]
