"""Anomalies of a step: detected, logged, and handled as --on-anomaly says."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drivers.common.errors import TrainingAbortedError
from drivers.grading.verdicts import make_inline_grader
from drivers.train import train
from drivers.training.anomalies import (
    MAX_DRIFT,
    MAX_LOG_RATIO,
    MIN_ENTROPY,
    N_COLLAPSED,
    SPIKE,
    CollapseWatch,
    check_rollouts,
    check_update,
)
from drivers.training.batch import make_rollout_batch
from drivers.training.components import Components
from drivers.training.metrics import UpdateMetrics
from drivers.training.state import TrainingState
from tests.drivers.helpers.letters import flatten_weights, make_completion, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.runs import read_rows, run_expert_iteration

FINE = {"truncated": 0.5, "zero_std_groups": 0.5, "rollout_entropy": 2.0}
NEAR = {"approx_kl": 0.01, "sampler_log_prob_diff": 0.1}


def list_kinds(found):
    return [anomaly.kind for anomaly in found]


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"truncated": 1.0}, "all_truncated"),
        ({"unscored": 1.0}, "all_unscored"),
        ({"rollout_entropy": MIN_ENTROPY / 2}, "entropy_collapse"),
        ({"rollout_entropy": math.nan}, "entropy_collapse"),
        ({"rollout_entropy": -math.inf}, "entropy_collapse"),
        ({"rollout_entropy": math.inf}, "entropy_collapse"),
    ],
)
def test_check_rollouts_without_signal_is_named(changed, kind):
    assert check_rollouts(FINE) == []
    assert list_kinds(check_rollouts(FINE | changed)) == [kind]
    (anomaly,) = check_rollouts(FINE | changed)
    assert anomaly.is_unusable == (not math.isfinite(*changed.values()))


def test_check_update_without_gradient_is_named():
    assert list_kinds(check_update(0.0, 0.0, [1.0] * 20, NEAR)) == ["no_gradient"]
    assert list_kinds(check_update(0.0, 1e-30, [1.0] * 20, NEAR)) == []


COLLAPSED = {"format_reward": 0.95, "answer_reward": 0.05, "reward": 0.05, "response_tokens": 15.0}
RUNS = {
    # Published runs of GRPO on GSM8K, by their lengths: this one stayed so,
    "collapsed": ([140, 80, 28, 15, 14, 15, 15, 15, 15], [0.5, 0.5, 0.9, *[0.99] * 6], [0.01] * 9, [8, 9]),
    # and this one recovered.
    "recovered": ([140, 92, 41, 26, 28, 30, 32, 32, 95], [0.9] * 9, [0.0, 0.0, 0.02, *[0.05] * 6], []),
    "brief": ([140, 15, 15, 15, 15, 60, 15, 15, 15], [0.95] * 9, [0.05] * 9, []),
    "right": ([140, *[15] * 8], [0.95] * 9, [0.9] * 9, []),
    "formless": ([140, *[15] * 8], [0.5] * 9, [0.05] * 9, []),
    "short from the start": ([15] * 9, [0.95] * 9, [0.05] * 9, []),
}


@pytest.mark.parametrize("name", RUNS)
def test_collapse_to_short_wrong_answers_is_named(name):
    """The state of the watch passes through JSON after each step, as in a run that is resumed."""
    *columns, expected = RUNS[name]
    watch, found = CollapseWatch(), {}
    for step, (tokens, well_formed, reward) in enumerate(zip(*columns, strict=True), start=1):
        values = {"response_tokens": tokens, "format_reward": well_formed, "answer_reward": reward, "reward": 1.0}
        anomalies = watch.check(values)
        if anomalies:
            found[step] = anomalies
        watch = CollapseWatch(**json.loads(json.dumps(asdict(watch))))
    assert list(found) == expected
    for (anomaly,) in found.values():
        assert (anomaly.kind, anomaly.value, anomaly.limit, anomaly.is_fatal) == ("length_collapse", 15, 21, False)
        for part in (
            "15 tokens instead of 140",
            "99% of the responses",
            "1% are right",
            "--warmup-steps",
            "--learning-rate",
            "grpo_clip",
        ):
            assert part in anomaly.text


@pytest.mark.parametrize("missing", [("format_reward",), ("answer_reward", "reward")])
def test_collapse_without_format_or_reward_is_silent(missing):
    """Without an answer reward, the reward decides; a step in which nothing was scored has neither."""
    plain = {key: value for key, value in COLLAPSED.items() if key != "answer_reward"}
    for values, n_found in ((COLLAPSED, 1), (plain, 1), ({k: v for k, v in COLLAPSED.items() if k not in missing}, 0)):
        watch = CollapseWatch(first_tokens=140.0, n_steps=N_COLLAPSED - 1)
        assert len(watch.check(values)) == n_found


@pytest.mark.medium
@pytest.mark.parametrize("program", ["train", "expert_iteration"])
def test_run_collapse_is_logged_and_kept_in_the_state(tmp_path, monkeypatch, program):
    """From a first step of 1,000 tokens, which a tiny policy does not have."""
    monkeypatch.setattr("drivers.training.state.CollapseWatch", lambda **_: CollapseWatch(1000.0, N_COLLAPSED - 2))
    wrong = {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}
    if program == "train":
        train_on(tmp_path, lambda *_: wrong, loss_type="reinforce_with_baseline")
        assert train_on.run.state.values()["collapse"] == {"first_tokens": 1000.0, "n_steps": N_COLLAPSED + 1}
    else:
        run_expert_iteration(tmp_path, lambda *_: wrong, n_ei_steps=3)
    rows = [row for row in read_rows(tmp_path, "anomaly") if row["kind"] == "length_collapse"]
    assert [row["step"] for row in rows] == [2, 3]


SILENT = {"reward": 1.0, "format_reward": 0.0, "answer_reward": 0.0}


@pytest.mark.medium
def test_check_zero_signal_groups_with_entropy_bonus_warns(tmp_path):
    """With an entropy bonus updates continue, and nothing else would show that the reward gives no signal."""
    train_on(tmp_path, lambda *_: SILENT, loss_type="reinforce_with_baseline", entropy_coef=0.01)
    assert [row["skipped_updates"] for row in train_on.rows["train"]] == [0, 0, 0]
    assert [(row["step"], row["kind"]) for row in train_on.rows["anomaly"]] == [(n, "all_silent") for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "no_baseline"},
        {"loss_type": "reinforce_with_baseline", "advantage": "remax", "group_size": 4},
        {"loss_type": "reinforce_with_baseline", "advantage": "reinforce_plus_plus"},
        {"loss_type": "reinforce_with_baseline", "length_penalty": "soft_overlong"},
    ],
)
def test_check_zero_signal_groups_with_gradient_is_silent(settings):
    assert not make_tiny_config(entropy_coef=0.01, **settings).has_regularization_gradient
    assert make_tiny_config(entropy_coef=0.01, loss_type="reinforce_with_baseline").has_regularization_gradient
    assert make_tiny_config(positive_nll_coef=0.1, loss_type="reinforce_with_baseline").has_regularization_gradient
    assert not make_tiny_config(loss_type="reinforce_with_baseline").has_regularization_gradient


class NanReward:
    """A reward that is sometimes NaN, and otherwise the share of a letter."""

    def __init__(self, value):
        self.value, self.graded = value, 0

    def __call__(self, response, ground_truth):
        self.graded += 1
        share = response.count(ground_truth) / max(1, len(response)) + 0.1 * len(response)
        return self.value if self.graded == 40 else share  # in the second step, after 4 held-out questions


@pytest.mark.parametrize(
    ("choice", "skipped", "value"),
    [
        ("skip", [0, 1, 0], math.nan),
        ("warn", [0, 0, 0], math.inf),
        ("auto", None, math.nan),
        pytest.param("stop", None, math.inf, marks=pytest.mark.slow),
    ],
)
def test_run_not_finite_reward_follows_on_anomaly(tmp_path, choice, skipped, value):
    """The response is unscored, so the update without it is sound; `--on-anomaly` decides whether to make it."""
    if skipped is None:
        with pytest.raises(TrainingAbortedError, match="step 2: the reward of 1 responses is not a finite number"):
            train_on(tmp_path, NanReward(value), on_anomaly=choice)
        return
    policy, _ = train_on(tmp_path, NanReward(value), on_anomaly=choice)
    assert [(row["step"], row["kind"], row["value"]) for row in train_on.rows["anomaly"]] == [(2, "reward", None)]
    assert [row["skipped_updates"] for row in train_on.rows["train"]] == skipped
    assert [row["grader_not_finite"] for row in train_on.rows["train"]] == [0, 1, 0]
    assert [row["unscored"] for row in train_on.rows["train"]] == [0, 1 / 32, 0]
    assert flatten_weights(policy).isfinite().all()


def test_check_update_single_token_drift_is_named(tmp_path):
    """A mean over all tokens would hide it."""
    found = check_update(0.1, 1.0, [], NEAR | {"max_log_ratio": 1.01 * MAX_LOG_RATIO})
    assert list_kinds(found) == ["max_log_ratio"]
    assert not found[0].is_fatal
    assert check_update(0.1, 1.0, [], NEAR | {"max_log_ratio": 0.99 * MAX_LOG_RATIO}) == []
    metrics = UpdateMetrics()
    for extra in (0.0, 12.0):
        micro = make_rollout_batch([make_completion([1], [2, 3, 4]), make_completion([1], [5])], torch.zeros(2))
        log_probs = micro.sampler_log_probs - 0.25 * micro.response_mask
        log_probs[0, 2] -= extra
        log_probs[1, 2] = math.nan  # after the end of the response
        scored = {"log_probs": log_probs, "token_entropy": log_probs}
        metrics.add_micro_batch(micro, scored, {"response_tokens": torch.tensor(4.0)})
    drift = metrics.drift()
    assert drift["max_log_ratio"] == 12.25
    assert drift["sampler_log_prob_diff"] == 1.75  # over four tokens without the 12, and four with it
    assert "max_log_ratio" not in metrics.drift()  # in the next update


@pytest.mark.medium
@pytest.mark.parametrize("choice", ["skip", "auto"])
def test_check_rollouts_missing_sampler_log_probs_is_named(tmp_path, choice):
    """An adaptive entropy coefficient keeps its value in such a step."""
    import drivers.training.rollouts as collecting

    describe = collecting.describe_completions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "describe_completions", lambda s: describe(s) | {"rollout_entropy": math.nan})
        settings = {"entropy_target": 2.0, "entropy_coef": 0.02, "on_anomaly": choice}
        if choice == "auto":
            with pytest.raises(TrainingAbortedError, match="the sampler's log-probs are not finite"):
                train_on(tmp_path, HugeReward(0, {}), **settings)
            return
        train_on(tmp_path, HugeReward(0, {}), **settings)
    assert [row["skipped_updates"] for row in train_on.rows["train"]] == [1, 1, 1]
    assert [row["entropy_coef"] for row in train_on.rows["train"]] == [0.02] * 3


@given(st.lists(st.floats(1e-3, 1e3), max_size=30), st.floats(0, 1e6))
def test_check_update_spike_is_relative_to_median_norm(norms, norm):
    found = [kind for kind in list_kinds(check_update(0.1, norm, norms, NEAR)) if kind != "no_gradient"]
    ordered = sorted(norms)
    middle = (ordered[(len(norms) - 1) // 2] + ordered[len(norms) // 2]) / 2 if norms else 0.0
    assert found == (["grad_norm_spike"] if len(norms) >= 10 and norm > SPIKE * middle else [])


def test_check_update_earlier_spikes_do_not_hide_a_spike():
    """They would raise the mean."""
    assert list_kinds(check_update(0.1, 50.0, [1.0] * 10 + [1000.0], NEAR)) == ["grad_norm_spike"]
    assert list_kinds(check_update(0.1, 50.0, [1.0] * 10, NEAR)) == ["grad_norm_spike"]
    assert check_update(0.1, 50.0, [1.0] * 9, NEAR) == []  # too few to compare with


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_update_not_finite_is_unusable(value):
    for found in (check_update(value, 1.0, [1.0] * 20, NEAR), check_update(0.0, value, [1.0] * 20, NEAR)):
        assert len(found) == 1
        assert found[0].is_unusable
    assert list_kinds(check_update(0.0, 1.0, [], {"approx_kl": value})) == (
        [] if value == -math.inf else ["approx_kl"]
    )


@pytest.mark.parametrize("name", ["approx_kl", "sampler_log_prob_diff"])
def test_check_update_policy_drift_is_named(name):
    assert check_update(0.1, 1.0, [], NEAR) == []
    (anomaly,) = check_update(0.1, 1.0, [], NEAR | {name: 1.01 * MAX_DRIFT})
    assert (anomaly.kind, anomaly.is_unusable) == (name, False)


class HugeReward:
    """A reward so large at some steps that the loss is not finite, or that the gradient spikes."""

    def __init__(self, size, at):
        self.size, self.at, self.graded = size, at, 0

    def __call__(self, response, ground_truth):
        step = 1 + (self.graded - 4) // 32  # the first 4 calls grade held-out questions
        self.graded += 1
        share = response.count(ground_truth) / max(1, len(response))
        value = self.size if step in self.at else share + 0.1 * len(response)
        return {"reward": value, "format_reward": 1.0, "answer_reward": share}


def train_on(folder, reward_fn, **settings):
    # Long enough that some response ends by itself in every step.
    common = {"loss_type": "no_baseline", "n_grpo_steps": 3, "sampling_max_tokens": 24}
    config, parts = make_tiny_config(**(common | settings)), make_tiny_parts()
    train_on.run = run = make_run(config, folder, parts.tokenizer)
    moments, report = [], run.report

    def snapshot(step, values):
        moments.append([t.clone() for t in run.state.tensors().values()])
        report(step, values)

    run.report = snapshot
    try:
        train(
            config,
            Components(parts.policy, parts.engine, make_inline_grader(reward_fn), parts.questions, parts.questions),
            run,
        )
    finally:
        run.finish()
        logged = read_rows(folder)
        train_on.rows = {phase: [row for row in logged if row["phase"] == phase] for phase in ("train", "anomaly")}
    return parts.policy, moments


@pytest.mark.medium
@pytest.mark.parametrize("choice", ["skip", "warn"])
def test_run_not_finite_update_is_skipped_exactly(tmp_path, choice, capsys):
    """Weights, moments and their count stay bit-identical to the step before; then training continues."""
    policy, moments = train_on(tmp_path, HugeReward(3e38, {2}), on_anomaly=choice)
    assert all(torch.equal(a, b) for a, b in zip(moments[0], moments[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(moments[1], moments[2], strict=True))
    assert [row["skipped_updates"] for row in train_on.rows["train"]] == [0, 1, 0]
    assert {(row["step"], row["kind"]) for row in train_on.rows["anomaly"]} == {(2, "loss"), (2, "grad_norm")}
    assert all(row["value"] is None for row in train_on.rows["anomaly"])  # JSON cannot represent infinity
    assert flatten_weights(policy).isfinite().all()
    assert "warning: step 2: the loss is" in capsys.readouterr().out


@pytest.mark.medium
@pytest.mark.parametrize("choice", ["auto", "stop"])
def test_run_not_finite_update_with_stop_aborts(tmp_path, choice):
    with pytest.raises(
        TrainingAbortedError,
        match=r"step 2: the loss is .*; stopped before the update, weights unchanged.*--on-anomaly skip",
    ):
        train_on(tmp_path, HugeReward(3e38, {2}), on_anomaly=choice)
    assert len(train_on.rows["train"]) == 1


@pytest.mark.parametrize(
    ("choice", "skipped"), [("skip", 1), *(pytest.param(one, 0, marks=pytest.mark.slow) for one in ("auto", "warn"))]
)
def test_run_gradient_spike_warns_or_is_skipped(tmp_path, choice, skipped):
    settings = {"n_grpo_steps": 13, "learning_rate": 1e-4}
    _, moments = train_on(tmp_path, HugeReward(1e5, {12}), on_anomaly=choice, **settings)
    assert [row["skipped_updates"] for row in train_on.rows["train"]] == [0] * 11 + [skipped, 0]
    (row,) = train_on.rows["anomaly"]
    assert (row["step"], row["kind"]) == (12, "grad_norm_spike")
    assert row["value"] > row["limit"] > 0
    same = all(torch.equal(a, b) for a, b in zip(moments[10], moments[11], strict=True))
    assert same == bool(skipped)


def test_run_skipped_update_norm_enters_median():
    """This excludes norms that are not finite, and 0."""
    state = TrainingState(make_tiny_config(), make_tiny_parts().policy)
    for norm, made in ((1.0, True), (50.0, False), (math.nan, False), (math.inf, False), (0.0, True), (2.0, True)):
        assert state.finish_update(norm, apply=made) == made
    assert list(state.grad_norms) == [1.0, 50.0, 2.0]
    assert state.optimizer.n_updates == 3


@pytest.mark.slow
def test_run_lasting_norm_rise_is_accepted(tmp_path):
    """Norms of skipped updates enter the median, so it follows; their weights and moments do not change."""
    settings = {"n_grpo_steps": 24, "learning_rate": 1e-4}
    _, moments = train_on(tmp_path, HugeReward(1e5, set(range(12, 25))), on_anomaly="skip", **settings)
    skipped = [row["skipped_updates"] for row in train_on.rows["train"]]
    assert skipped == [0] * 11 + [1] * 10 + [0] * 3
    assert all(torch.equal(a, b) for a, b in zip(moments[10], moments[20], strict=True))


@pytest.mark.slow
def test_run_gradient_spike_with_stop_aborts(tmp_path):
    with pytest.raises(TrainingAbortedError, match="times the median"):
        train_on(tmp_path, HugeReward(1e5, {12}), on_anomaly="stop", n_grpo_steps=13, learning_rate=1e-4)


@pytest.mark.medium
def test_run_repeated_anomaly_warns_once(tmp_path, capsys):
    """Every step still logs it."""
    train_on(tmp_path, lambda *_: {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0},
       loss_type="reinforce_with_baseline")  # fmt: skip
    assert [row["step"] for row in train_on.rows["anomaly"]] == [1, 2, 3]
    output = capsys.readouterr().out
    assert output.count("no response has a gradient: every response has the reward 0. If this lasts, read") == 1
    assert "no step had a gradient" in train_on.run.summary()


def test_check_update_missing_gradient_says_what_helps():
    def explain(*rewards):
        (anomaly,) = check_update(0.0, 0.0, [], NEAR, rewards)
        return anomaly.text.removeprefix("no response has a gradient: ")

    assert explain(0.0, 0.0, math.nan).startswith("every response has the reward 0. If this lasts, read ")
    assert explain(1.0, 1.0) == "every response has the reward 1. Use harder questions"
    for mixed in ((), (math.nan,), (0.0, 1.0)):
        assert explain(*mixed) == "every group has identical rewards, or filters exclude all other groups"


@pytest.mark.medium
@pytest.mark.parametrize("failure", [ValueError("no such key"), None])
def test_run_reward_that_always_fails_ends_before_first_step(tmp_path, failure):
    """A reward function that returns None for every response does not end the run."""

    def reward(*_):
        if failure is not None:
            raise failure
        return None

    if failure is None:
        train_on(tmp_path, reward, loss_type="reinforce_with_baseline", n_grpo_steps=1)
        return
    with pytest.raises(TrainingAbortedError, match=r"--reward r1_zero: failed on all 4 held-out responses"):
        train_on(tmp_path, reward)
    assert read_rows(tmp_path, "train") == []


@pytest.mark.medium
def test_run_reward_that_fails_after_the_first_step_continues(tmp_path):
    calls = itertools.count()

    def reward(*_):
        if next(calls) >= 4:  # after the held-out questions
            raise ValueError("no such key")
        return {"reward": 1.0}

    train_on(tmp_path, reward, loss_type="reinforce_with_baseline", n_grpo_steps=2, eval_steps=1)
    rows = read_rows(tmp_path, "eval")
    assert [(row["step"], row["grader_errors"]) for row in rows] == [(0, 0), (1, 4), (2, 4)]
