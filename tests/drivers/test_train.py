"""The loop on a tiny model: it learns with every loss, and equivalent settings give one trajectory."""

from itertools import product
from typing import get_args

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from drivers.common.errors import TrainingAbortedError
from drivers.grading.verdicts import make_inline_grader
from drivers.train import train
from drivers.training import update as update_step
from drivers.training.advantages import prepare_rollouts
from drivers.training.components import Components
from drivers.training.forward import forward
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import find_responses_with_gradient, weigh_step
from drivers.training.update import accumulate_gradients
from grpo_core.types import Aggregation, LossType
from tests.drivers.helpers.letters import (
    flatten_weights,
    letter_grader,
    make_run,
    make_tiny_config,
    make_tiny_parts,
    sample_rollouts,
)
from tests.drivers.helpers.runs import ON_POLICY, TWO_EPOCHS, TWO_UPDATES, drop_times, run_training

# Every loss in one schedule, and every schedule with one loss; `make nightly` trains with all pairs.
SCHEDULES = {"on-policy": ON_POLICY, "two-updates": TWO_UPDATES, "two-epochs": TWO_EPOCHS}
LEARNERS = {("reinforce_with_baseline", "on-policy"), ("grpo_clip", "two-epochs")}
LEARNERS |= {(loss_type, "two-updates") for loss_type in get_args(LossType)}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("loss_type", "schedule"),
    [
        pair if pair in LEARNERS else pytest.param(*pair, marks=pytest.mark.nightly)
        for pair in product(get_args(LossType), SCHEDULES)
    ],
)
def test_loss_type_learns_the_letter(tmp_path, loss_type, schedule):
    _, steps, evaluations = run_training(tmp_path, loss_type=loss_type, **SCHEDULES[schedule])
    assert steps[0]["reward"] < 0.15
    assert sum(row["reward"] for row in steps[-3:]) / 3 > 0.9
    assert evaluations[-1]["reward"] > 0.9


SHORT = {"n_grpo_steps": 3, "learning_rate": 1e-3}


def train_weights(folder, **changes):
    return flatten_weights(run_training(folder, **(SHORT | changes))[0])


@pytest.mark.medium
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_accumulation_steps_do_not_change_the_gradient(aggregation):
    """One micro-batch, whole groups and single responses split the same gradient."""
    gradients = []
    for steps in (1, 4, 32):
        config, parts = make_tiny_config(aggregation=aggregation, gradient_accumulation_steps=steps), make_tiny_parts()
        rollouts, scores = sample_rollouts(config, parts)
        batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
        weighted, _ = weigh_step(config, batch)
        accumulate_gradients(parts.policy, weighted, config, 0.0, UpdateMetrics())
        gradients.append(torch.cat([p.grad.flatten() for p in parts.policy.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


@pytest.mark.medium
def test_accumulation_steps_do_not_change_the_trajectory(tmp_path):
    settings = {"aggregation": "token_mean"}
    reference = train_weights(tmp_path / "a", gradient_accumulation_steps=4, **settings)
    other = train_weights(tmp_path / "b", gradient_accumulation_steps=32, **settings)
    assert_close(other, reference, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_aggregations_differ(tmp_path):
    """Responses differ in length; with equal lengths some aggregations differ by a factor only, which Adam removes."""
    results = [train_weights(tmp_path / name, aggregation=name) for name in ("sequence_mean", "token_mean")]
    assert not torch.allclose(results[0], results[1], rtol=0, atol=2e-5)


@pytest.mark.medium
@pytest.mark.parametrize("loss_type", ["grpo_clip", "grpo_no_clip"])
def test_ratio_losses_on_policy_equal_reinforce(tmp_path, loss_type):
    reinforce = train_weights(tmp_path / "a", loss_type="reinforce_with_baseline")
    assert_close(train_weights(tmp_path / "b", loss_type=loss_type), reinforce, rtol=0, atol=2e-5)


def test_ratio_on_policy_is_exactly_one(tmp_path):
    _, steps, _ = run_training(tmp_path, loss_type="grpo_clip", **SHORT)
    assert [row["mean_ratio"] for row in steps] == [1.0] * 3
    assert [row["clip_fraction"] for row in steps] == [0.0] * 3


@pytest.mark.medium
@pytest.mark.parametrize("schedule", [TWO_UPDATES, TWO_EPOCHS], ids=["two-updates", "two-epochs"])
def test_ratio_off_policy_is_to_policy_before_first_update(tmp_path, schedule):
    """With old log-probs from each update, every ratio would be 1 and nothing would clip."""
    _, steps, _ = run_training(tmp_path, loss_type="grpo_clip", cliprange=0.01, n_grpo_steps=8, **schedule)
    assert max(row.get("clip_fraction", 0) for row in steps) > 0.05
    assert max(row.get("approx_kl", 0) for row in steps) > 1e-4


@pytest.mark.medium
@pytest.mark.parametrize(
    ("loss_type", "passes"), [("reinforce_with_baseline", 0), ("grpo_clip", 2), ("grpo_no_clip", 2)]
)
def test_old_log_probs_are_computed_once_per_step_if_needed(tmp_path, monkeypatch, loss_type, passes):
    from drivers.training import advantages as program

    calls = []
    compute = program.forward_all
    monkeypatch.setattr(program, "forward_all", lambda *a, **k: calls.append(1) or compute(*a, **k))
    run_training(tmp_path, n_grpo_steps=2, loss_type=loss_type, **TWO_EPOCHS)
    assert len(calls) == passes


def test_off_policy_updates_per_train_batch_and_epoch(tmp_path, monkeypatch):
    from drivers.policy.optimizer import PolicyOptimizer

    made = []
    step = PolicyOptimizer.step
    monkeypatch.setattr(PolicyOptimizer, "step", lambda self, *a: made.append(1) or step(self, *a))
    run_training(tmp_path, n_grpo_steps=2, epochs_per_rollout_batch=3, **TWO_UPDATES)
    assert len(made) == 2 * 3 * 2


@pytest.mark.medium
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_gradient_of_repeated_passes_is_that_of_one(aggregation):
    """An optimizer step on four copies of a rollout batch, all scored by the same weights."""
    config, parts = make_tiny_config(aggregation=aggregation, loss_type="grpo_clip"), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
    gradients = []
    for rows in ([*range(32)], [*range(32)] * 4):
        weighted, _ = weigh_step(config, batch.select(rows))
        accumulate_gradients(parts.policy, weighted, config, 0.0, UpdateMetrics())
        gradients.append(torch.cat([p.grad.flatten() for p in parts.policy.parameters()]))
        parts.policy.zero_grad()
    assert gradients[0].abs().max() > 1e-3
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


@pytest.mark.medium
@pytest.mark.parametrize(("size", "updates"), [(128, 1), (64, 2)])
def test_update_across_passes_is_one_pass(tmp_path, size, updates):
    """Four passes over 32 rollouts in train batches of 128 are one update; of 64, two updates of a pass each."""
    settings, n_parts = {"loss_type": "grpo_clip", "learning_rate": 1e-2}, size // 8
    across = {"epochs_per_rollout_batch": 4, "train_batch_size": size, "gradient_accumulation_steps": n_parts}
    policy, steps, _ = run_training(tmp_path / "a", **SHORT | settings | across)
    other, plain, _ = run_training(tmp_path / "b", **SHORT | settings, epochs_per_rollout_batch=updates)
    assert torch.equal(flatten_weights(policy), flatten_weights(other))
    assert [*map(drop_times, steps)] == [*map(drop_times, plain)]


class NeverWaits(TorchDispatchMode):
    """Fail where a value would have to return to the host on a GPU: a number, or a size that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        asks = name in self.WAITS or (
            name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        )
        assert not asks, f"{function} makes the host wait for the device"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("cut", [{"micro_batch_tokens": 60}, {"gradient_accumulation_steps": 4}])
@pytest.mark.parametrize("loss", [{"loss_type": "grpo_clip", "importance": "truncate"}, {"entropy_coef": 0.01}])
def test_accumulate_gradients_never_waits_for_device(cut, loss, monkeypatch):
    """Plans are made on the host, and metrics are read once per step."""
    from grpo_core.scoring import fused_head

    with pytest.raises(AssertionError, match="makes the host wait"), NeverWaits():
        torch.ones(1).item()
    monkeypatch.setattr(fused_head, "check_labels", lambda labels, vocab: None)  # runs on CPUs only
    config, parts = make_tiny_config(**cut, **loss), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts)
    batch = prepare_rollouts(config, parts.policy, None, rollouts, scores, None)
    batch, step_metrics = weigh_step(config, batch)
    metrics = UpdateMetrics()
    forward(parts.policy, batch.select([0, 1]), 1.0)  # the trials of head and rows precede the loop
    pulling = find_responses_with_gradient(config, batch, config.entropy_coef)  # read on the host before the loop
    monkeypatch.setattr(update_step, "find_responses_with_gradient", lambda *_: pulling)
    with NeverWaits():
        loss = update_step.accumulate_gradients(parts.policy, batch, config, config.entropy_coef, metrics)
    metrics.add_update(loss, loss, step_metrics)
    assert metrics.summary()["micro_batches"] >= 2


@pytest.mark.medium
def test_train_same_seed_is_bit_identical(tmp_path):
    first, second = train_weights(tmp_path / "a"), train_weights(tmp_path / "b")
    assert torch.equal(first, second)
    assert not torch.equal(first, train_weights(tmp_path / "c", seed=1))


@pytest.mark.medium
def test_skipping_zero_signal_groups_is_exact(tmp_path, monkeypatch):
    """A zero-signal group has gradient zero: skipping it saves time and changes no weight."""

    skipping, steps, _ = run_training(tmp_path / "a", **SHORT)
    assert sum(row["skipped_responses"] for row in steps) > 0
    monkeypatch.setattr(update_step, "find_responses_with_gradient", lambda _, batch, __: list(range(len(batch))))
    running, steps, _ = run_training(tmp_path / "b", **SHORT)
    assert sum(row["skipped_responses"] for row in steps) == 0
    assert_close(flatten_weights(skipping), flatten_weights(running), rtol=0, atol=1e-7)


def test_train_without_signal_changes_no_weight(tmp_path):
    def silent(response, ground_truth):
        return {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}

    policy, steps, _ = run_training(tmp_path, reward_fn=silent, **SHORT)
    assert torch.equal(flatten_weights(policy), flatten_weights(make_tiny_parts().policy))
    assert [row["grad_norm"] for row in steps] == [0.0] * 3
    assert "loss" in steps[0]
    assert "entropy" not in steps[0]  # nothing was scored, so there is no value


def test_train_infinite_loss_aborts_unchanged(tmp_path):
    def huge(response, ground_truth):
        return {"reward": 3e38, "format_reward": 1.0, "answer_reward": 1.0}

    config, parts = make_tiny_config(loss_type="no_baseline"), make_tiny_parts()
    before = flatten_weights(parts.policy).clone()
    run = make_run(config, tmp_path, parts.tokenizer)
    with pytest.raises(TrainingAbortedError, match="stopped before the update"):
        train(
            config,
            Components(parts.policy, parts.engine, make_inline_grader(huge), parts.questions, parts.questions),
            run,
        )
    run.finish()
    assert torch.equal(flatten_weights(parts.policy), before)


def test_loss_of_zero_has_a_gradient(tmp_path):
    """On-policy every ratio is 1 and centered advantages sum to 0: the loss is 0, and the policy learns."""
    _, steps, _ = run_training(tmp_path, loss_type="grpo_clip", **SHORT)
    for row in steps:
        assert abs(row["loss"]) < 1e-6
        assert row["grad_norm"] > 0.1


@pytest.mark.medium
def test_train_checkpoints_and_evaluates_on_schedule(tmp_path):
    _, _, evaluations = run_training(tmp_path, n_grpo_steps=5, eval_steps=2, checkpoint_steps=2)
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 5)]


def replace_components(monkeypatch, program, config, run, parts):
    """Replace the components that `main` would build by these."""
    everything = Components(parts.policy, parts.engine, letter_grader, parts.questions, parts.questions)
    monkeypatch.setattr(program, "parse_train_config", lambda *_: config)
    monkeypatch.setattr(program, "setup_grpo_run", lambda *_: (run, everything))


def test_train_interrupted_inside_step_keeps_checkpoints(tmp_path, monkeypatch):
    """After the first of two updates of step 3: checkpoint-2 stays, and the stop is saved beside it."""
    from drivers import train as program
    from drivers.policy.optimizer import PolicyOptimizer

    config, parts = make_tiny_config(n_grpo_steps=5, checkpoint_steps=2, **TWO_UPDATES), make_tiny_parts()
    run = make_run(config, tmp_path, parts.tokenizer)
    at_step_two, updates = {}, []
    step = PolicyOptimizer.step

    def interrupted(self, *arguments):
        if len(updates) == 4:
            at_step_two["weights"] = flatten_weights(parts.policy).clone()
        norm = step(self, *arguments)
        updates.append(norm)
        if len(updates) == 5:
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(PolicyOptimizer, "step", interrupted)
    replace_components(monkeypatch, program, config, run, parts)
    with pytest.raises(SystemExit) as ended:
        program.main(["--model-path", "tiny"])
    assert ended.value.code == 130
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-2-stopped"]
    kept, stopped = (AutoModelForCausalLM.from_pretrained(p) for p in sorted(tmp_path.glob("checkpoint-*")))
    assert torch.equal(flatten_weights(kept), at_step_two["weights"])
    assert torch.equal(flatten_weights(stopped), flatten_weights(parts.policy))
    assert not torch.equal(flatten_weights(kept), flatten_weights(stopped))


@pytest.mark.medium
@pytest.mark.curves
def test_train_full_disk_exits_with_one_line_and_keeps_log(tmp_path, monkeypatch, capsys):
    import drivers.training.checkpointer
    from drivers import train as program

    config, parts = make_tiny_config(n_grpo_steps=3, checkpoint_steps=2), make_tiny_parts()
    run = make_run(config, tmp_path, parts.tokenizer)
    monkeypatch.setattr(
        drivers.training.checkpointer,
        "save_checkpoint",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space")),
    )
    replace_components(monkeypatch, program, config, run, parts)
    with pytest.raises(SystemExit) as ended:
        program.main(["--model-path", "tiny"])
    assert ended.value.code == 1
    assert "the checkpoint cannot be written" in capsys.readouterr().err
    assert (tmp_path / "curves.png").exists()
