"""On-policy distillation: a teacher scores the policy's responses, token by token."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import grpo_core as core
from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines import teacher_server
from drivers.engines.teacher_server import TeacherServer
from drivers.settings.command_line import parse_train_config
from drivers.settings.formula import formula
from drivers.training.advantages import prepare_rollouts
from drivers.training.batch import make_rollout_batch
from drivers.training.forward import forward
from drivers.training.objective import find_responses_with_gradient, weigh_step
from tests.drivers.helpers.engines import StubTeacher, run_stub_server
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts, sample_rollouts
from tests.drivers.helpers.runs import run_training
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

TAUGHT = {"teacher": "tiny-teacher"}
ONLY = TAUGHT | {"teacher_only": True}


@pytest.fixture(scope="module")
def teacher():
    return make_tiny_policy(5)


def measure_gap(parts, teacher, rollouts, temperature=1.0):
    """Return log pi_T - log pi of each token."""
    of_teacher, own = (
        forward(model, rollouts, temperature)["log_probs"].detach() for model in (teacher, parts.policy)
    )
    return of_teacher - own


@pytest.mark.parametrize("advantage", ["group", "reinforce_plus_plus", "only"])
def test_teacher_adds_its_log_ratio_to_the_advantage_of_each_token(teacher, advantage):
    """It is added after whitening, with its weight; a response without a reward gets nothing."""
    settings = {"teacher_only": True} if advantage == "only" else {"advantage": advantage}
    config = make_tiny_config(**TAUGHT, **settings, teacher_coef=0.25, sampling_temperature=0.7)
    parts, rewards = make_tiny_parts(), torch.arange(32.0) % 3
    rewards[5] = torch.nan
    rollouts, scores = sample_rollouts(config, parts, rewards)
    rollouts = replace(rollouts, sampler_log_probs=rollouts.sampler_log_probs - 0.25)  # it does not count
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None, teacher)
    gap = measure_gap(parts, teacher, rollouts, 0.7)
    mask = core.drop_truncated_responses(rollouts.response_mask, rewards.isnan())
    base = torch.zeros(32)
    if advantage == "group":
        base = core.normalize_group_rewards(rewards, 8)
    if advantage == "reinforce_plus_plus":
        counted = rewards[:, None].expand(mask.shape)[mask]
        base = (rewards - counted.mean()) / counted.std()
    assert gap[mask].std() > 0.1
    assert_close(batch.advantages[mask], (base[:, None] + 0.25 * gap)[mask], rtol=1e-4, atol=1e-4)
    if advantage == "only":
        assert (batch.advantages[5] == 0).all()
    _, step_metrics = weigh_step(config, batch)
    assert step_metrics["teacher_kl"] == pytest.approx(-gap[rollouts.response_mask].mean().item(), abs=1e-5)


def test_teacher_gives_equal_groups_a_gradient(teacher):
    config, parts = make_tiny_config(**TAUGHT), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts, torch.ones(32))
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None, teacher))
    assert find_responses_with_gradient(config, batch, 0.0) == list(range(32))
    assert config.has_signal_in_equal_groups
    assert not make_tiny_config(**TAUGHT, entropy_coef=0.1).has_regularization_gradient


def test_teacher_without_its_model_raises():
    config, parts = make_tiny_config(**TAUGHT), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    with pytest.raises(ValueError, match=r"--teacher tiny-teacher needs teacher, its model or server; got None"):
        prepare_rollouts(config, parts.policy, None, rollouts, scores, None)


@pytest.mark.medium
def test_student_approaches_its_teacher_without_rewards(tmp_path):
    _, steps, _ = run_training(tmp_path, lambda response, answer: 0.0, **ONLY, learning_rate=3e-3)
    assert all(row["grad_norm"] > 0 for row in steps)
    divergence = [row["teacher_kl"] for row in steps]
    assert sum(divergence[-5:]) < 0.8 * sum(divergence[:5])


def test_formula_with_a_teacher_names_each_stage():
    """A group of one is legal with a teacher alone, because nothing is compared."""
    taught = "0.5 [log pi_T(o_it) - log pi_old(o_it)]"
    whitened = {"advantage": "reinforce_plus_plus", "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"}
    text = formula(make_tiny_config(**TAUGHT, teacher_coef=0.5, **whitened))
    assert [line.partition(" ")[0] for line in text[1:5]] == ["B_i", "C_it", "D_it", "A_it"]
    assert text[2] == "C_it     = B_i - 0.1 sum_(s >= t) [log pi_old(o_is) - log pi_ref(o_is)]"
    assert text[3].startswith("D_it     = (C_it - mean)")
    assert text[4] == f"A_it     = D_it + {taught}"
    assert "  where  pi_T is the teacher, tiny-teacher" in text
    assert "  where  --teacher is defined in arXiv:2306.13649" in text
    one = {"rollout_batch_size": 4, "group_size": 1, "train_batch_size": 4, "gradient_accumulation_steps": 1}
    alone = formula(make_tiny_config(**ONLY, **one, teacher_coef=0.5))
    assert alone[1:3] == [f"A_it     = {taught}", "loss_it  = -A_it log pi(o_it)"]
    assert not any("--advantage" in line for line in alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--teacher-only", "--teacher-only: has no effect without a teacher; pass --teacher too"),
        ("--teacher-coef 2", "--teacher-coef 2.0: has no effect without a teacher"),
        ("--teacher t --teacher-coef 0", "--teacher-coef 0.0: must be greater than 0"),
        ("--teacher t --loss-type gspo", "--teacher t: gives each token its own advantage, which --loss-type gspo"),
        ("--teacher t --loss-type no_baseline", "which --loss-type no_baseline does not accept"),
        ("--teacher t --off-policy-threshold 1", "but --teacher t gives each token its own; omit one of the two"),
        ("--teacher t --max-refills 2", "but with --teacher t they have a gradient too; pass --max-refills 0"),
        ("--teacher t --teacher-only --advantage opo", "--advantage opo: has no effect with --teacher-only"),
        ("--teacher t --teacher-only --no-use-std-normalization", "--no-use-std-normalization: has no effect with"),
        ("--teacher t --teacher-only --length-penalty cosine", "--length-penalty cosine: has no effect with"),
        ("--teacher t --group-size 1", "--group-size 1: one response has no standard deviation"),
        (
            "--teacher http://one --sampling-temperature 0.7",
            "--sampling-temperature 0.7: a server gives the teacher's",
        ),
        (
            "--teacher http://one --sampling-top-p 0.5 --sampling-replay",
            "--sampling-replay: a server gives the teacher's",
        ),
        (
            "--teacher ftp://one",
            "--teacher ftp://one: is not a server's address; pass one such as http://127.0.0.1:8000",
        ),
    ],
)
def test_settings_that_do_not_go_with_a_teacher_are_refused(arguments, message):
    with pytest.raises(UsageError) as raised:
        parse_train_config(arguments.split())
    assert message in str(raised.value)


# A teacher behind a URL; tests/drivers/test_server.py asks a real server.


@pytest.fixture
def stub(teacher):
    with run_stub_server(StubTeacher(teacher)) as server:
        yield server


def check(url, last_id=97, longest=20, deadline_s=60.0):
    TeacherServer(url, deadline_s).check(make_tiny_tokenizer(), last_id, longest)


@pytest.mark.medium
@pytest.mark.parametrize("inserts", [False, True], ids=["completions", "conversations"])
def test_server_gives_the_advantages_of_the_model_that_it_holds(teacher, stub, inserts):
    config, parts = make_tiny_config(**TAUGHT), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    if inserts:
        flags = [tuple(k % 3 != 1 for k in range(len(one.token_ids))) for one in rollouts.completions]
        pairs = zip(rollouts.completions, flags, strict=True)
        rollouts = make_rollout_batch([replace(one, sampled=some) for one, some in pairs], rollouts.rewards[:, 0], 8)
    server = TeacherServer(f"{stub.url}/v1/", 60.0)
    theirs, ours = (
        prepare_rollouts(config, parts.policy, None, rollouts, scores, None, one) for one in (server, teacher)
    )
    assert_close(theirs.teacher_log_probs, ours.teacher_log_probs, rtol=0, atol=1e-5)
    assert_close(theirs.advantages, ours.advantages, rtol=0, atol=1e-5)
    assert (theirs.teacher_log_probs[rollouts.response_mask] < 0).all()


def test_server_that_fits_is_accepted(stub):
    check(stub.url, longest=63)
    asked = [(path, (body or {}).get("prompt")) for path, body in stub.asked]
    assert asked == [("v1/models", None), ("detokenize", None), ("v1/completions", [1, 97])]


def drop_last_token(answer):
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


@pytest.mark.medium
@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("v1/models", lambda _: 404, "/v1/models: responds with 404: .*; pass the URL of a server that `vllm serve`"),
        ("v1/models", lambda _: "<html>", "/v1/models: returned no max_model_len; pass the URL of a server"),
        ("v1/models", lambda _: {"data": []}, "returned no max_model_len"),
        ("v1/models", lambda _: 500, "responds with 500: .*; pass the URL"),
        ("v1/models", lambda _: None, "no response during the check of the teacher .*; pass the URL"),
        (
            "v1/models",
            lambda _: {"data": [{"max_model_len": 20}]},
            "its --max-model-len is 20, but a prompt, its response and one more token take up to 21; start it with",
        ),
        (
            "detokenize",
            lambda answer: {"prompt": answer["prompt"].replace("b", "B")},
            r"its tokenizer is not the policy's \(id 13 is 'B' instead of 'b'\); pass a teacher with the tokenizer",
        ),
        ("v1/completions", lambda _: 400, "/v1/completions: responds with 400"),
        ("v1/completions", drop_last_token, "returned no log-prob for each of the 2 tokens of a prompt; pass the URL"),
        ("v1/completions", lambda _: {"choices": [{"text": "a"}]}, "returned no log-prob for each of the 2 tokens"),
        (
            "v1/completions",
            lambda _: {"choices": [{"prompt_logprobs": [None, {"97": {"logprob": 3.0}}]}]},
            "returned a log-prob of 3; start it without --logprobs-mode",
        ),
    ],
)
def test_server_that_cannot_score_is_refused_in_one_line(stub, path, change, message):
    stub.changes[path] = change
    with pytest.raises(UsageError, match=rf"--teacher {stub.url}.*{message}") as raised:
        check(stub.url)
    assert "\n" not in str(raised.value)


@pytest.fixture
def scored(stub):
    """Return rollouts and the teacher's log-probs of them."""
    rollouts, _ = sample_rollouts(make_tiny_config(), make_tiny_parts())
    return rollouts.completions, TeacherServer(stub.url, 60.0).compute_log_probs(rollouts.completions)


@pytest.mark.medium
def test_server_that_returns_is_asked_again(stub, scored):
    completions, expected = scored
    failures, messages = [503], []
    stub.changes["v1/completions"] = lambda answer: failures.pop() if failures else answer
    assert TeacherServer(stub.url, 60.0, messages.append).compute_log_probs(completions) == expected
    (message,) = messages
    assert message.startswith(f"warning: --teacher {stub.url}/v1/completions: responds with 503")
    assert message.endswith("; waiting for the server to respond again")
    stub.changes["v1/completions"] = lambda _: 503
    with pytest.raises(EngineDiedError, match="responds with 503"):
        TeacherServer(stub.url, 60.0, messages.append).compute_log_probs(completions)


@pytest.mark.medium
def test_server_that_hangs_or_stays_away_ends_the_run(stub, scored, monkeypatch):
    completions, _ = scored
    monkeypatch.setattr(teacher_server, "RETURN_S", 0.1)
    end, messages = threading.Event(), []
    stub.changes |= {"v1/completions": lambda _: end.wait(20) and {}, "health": lambda _: 500}
    with pytest.raises(EngineDiedError, match=r"/health did not respond within 0.1 s"):
        TeacherServer(stub.url, 0.3, messages.append).compute_log_probs(completions)
    end.set()
    assert "did not finish computing log-probs of 32 responses within 0.3 s (--engine-deadline-s)" in messages[0]
