"""The loss scale of a float16 policy: gradients that would underflow, overflows, and exact resume."""

import pytest
import torch

from drivers.common.errors import TrainingAbortedError
from drivers.policy import optimizer as program
from drivers.policy.optimizer import PolicyOptimizer
from drivers.runs.checkpoint import read_state_values
from drivers.runs.folder import find_checkpoint
from drivers.training.advantages import prepare_rollouts
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.state import TrainingState
from drivers.training.update import accumulate_gradients, update
from tests.drivers.helpers.letters import make_run, make_tiny_config, make_tiny_parts, sample_rollouts
from tests.drivers.helpers.runs import assert_same_state, read_logged_numbers, read_rows, run_grpo

HALF, FLOAT = torch.float16, torch.float32


def make_batch(dtype, reward=1.0, **settings):
    """Return settings, a policy whose weights float16 represents, and a batch with advantages of about `reward`."""
    config, parts = make_tiny_config(use_std_normalization=False, **settings), make_tiny_parts()
    rollouts, scores = sample_rollouts(config, parts, reward * (torch.arange(32.0) % 3))
    policy = parts.policy.half().to(dtype)
    return config, policy, prepare_rollouts(config, policy, None, rollouts, scores, None)


def compute_gradient(dtype, reward, *, scales_loss):
    """Return the gradient that AdamW would get, by name."""
    config, policy, batch = make_batch(dtype, reward)
    optimizer = PolicyOptimizer(policy, config, scales_loss=scales_loss)
    weighted, _ = weigh_step(config, batch)
    accumulate_gradients(policy, weighted, config, 0.0, UpdateMetrics(), optimizer.loss_scale)
    optimizer.clip_gradient(1e9)
    return dict(zip(optimizer._names, (master.grad for master in optimizer._masters), strict=True))


def test_float16_gradient_below_its_range_needs_the_scale():
    """With rewards of about 1e-5, what float16 cannot represent is all of the gradient of most weights."""
    exact = compute_gradient(FLOAT, 1e-5, scales_loss=False)
    bare, scaled = (compute_gradient(HALF, 1e-5, scales_loss=scales) for scales in (False, True))
    lost = [name for name in exact if not bare[name].any()]
    assert len(lost) > len(exact) / 2
    for name, gradient in exact.items():
        assert scaled[name].dtype == FLOAT
        assert 0 < gradient.abs().max() < 1e-5
        assert (scaled[name] - gradient).norm() < 0.02 * gradient.norm(), name


def start_state(tmp_path, config, policy, scale):
    run, state = make_run(config, tmp_path, make_tiny_parts().tokenizer), TrainingState(config, policy)
    run.begin(state)
    if scale is not None:
        state.tensors()  # makes the moments
        state.optimizer.finish_loading(0, state.optimizer.scaler_state() | {"scale": scale})
    return run, state


def test_float16_reports_the_loss_and_norm_without_the_scale(tmp_path):
    summaries = []
    for number, (dtype, scale) in enumerate([(FLOAT, None), (HALF, 2.0**16), (HALF, 2.0**10)]):
        config, policy, batch = make_batch(dtype, entropy_coef=0.01)
        run, state = start_state(tmp_path / str(number), config, policy, scale)
        metrics = UpdateMetrics()
        update(config, policy, batch, run, 1, metrics, entropy_coef=0.01)
        run.finish()
        assert state.grad_norms[0] == pytest.approx(metrics.summary()["grad_norm"])
        summaries.append(metrics.summary())
    assert summaries[0]["grad_norm"] > 0.05
    for summary in summaries[1:]:
        assert summary == pytest.approx(summaries[0], rel=0.01, abs=1e-3)


def test_float16_overflow_skips_the_update_and_halves_the_scale(tmp_path, capsys):
    config, policy, batch = make_batch(HALF)
    run, state = start_state(tmp_path, config, policy, None)
    assert state.optimizer.loss_scale == 2**16
    update(config, policy, batch, run, 1, UpdateMetrics())
    state.optimizer.finish_loading(1, state.optimizer.scaler_state() | {"scale": 2.0**60})
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    metrics = UpdateMetrics()
    update(config, policy, batch, run, 2, metrics)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert (state.optimizer.n_updates, len(state.grad_norms)) == (1, 1)
    assert {moments["step"].item() for moments in state.optimizer._adamw.state.values()} == {1.0}
    assert not any(master.grad.any() for master in state.optimizer._masters)
    scaler = state.optimizer.scaler_state()
    assert (scaler["scale"], scaler["_growth_tracker"]) == (2.0**59, 0)
    summary = metrics.summary()
    assert summary["skipped_updates"] == 1
    assert "grad_norm" not in summary
    assert abs(summary["loss"]) < 10
    assert (
        "step 2: a gradient overflowed float16; the update is skipped, and the loss scale falls from 1.15292e+18 to "
        "5.76461e+17\n"
    ) in capsys.readouterr().out
    run.finish()
    assert read_rows(tmp_path, "anomaly") == []


def test_float16_overflow_without_a_scale_is_an_anomaly(tmp_path):
    """Another halving would not help: the gradient itself is out of range."""
    config, policy, batch = make_batch(HALF, 1e9)
    run, _ = start_state(tmp_path, config, policy, 1.0)
    with pytest.raises(TrainingAbortedError, match=r"step 1: the gradient norm is (nan|inf)"):
        update(config, policy, batch, run, 1, UpdateMetrics())
    run.finish()


def test_first_update_without_a_gradient_has_a_scale():
    config, policy, _ = make_batch(HALF)
    optimizer = PolicyOptimizer(policy, config, scales_loss=True)
    assert optimizer.clip_gradient(1.0).item() == 0
    optimizer.step(1e-3)
    assert optimizer.loss_scale == 2**16


def test_float16_scale_doubles_after_400_updates_without_overflow():
    config, policy, _ = make_batch(HALF)
    optimizer = PolicyOptimizer(policy, config, scales_loss=True)
    optimizer.tensors()  # makes the moments, as a resume does
    optimizer.finish_loading(398, optimizer.scaler_state() | {"_growth_tracker": 398})
    for scale in (2**16, 2**17, 2**17):  # after 399, 400 and 401 updates
        optimizer.clip_gradient(1.0)
        optimizer.step(1e-3)
        assert optimizer.loss_scale == scale


@pytest.mark.medium
def test_resumed_float16_run_with_overflows_is_bit_identical(tmp_path, monkeypatch):
    """The scale grows after every second update, until gradients overflow before and after the resume."""
    monkeypatch.setattr(program, "LOSS_SCALE_GROWTH_INTERVAL", 2)
    settings, folder = {"dtype": "float16", "train_batch_size": 8, "n_grpo_steps": 3}, tmp_path / "stopped"
    *whole, answers = run_grpo(tmp_path / "whole", **settings)
    run_grpo(folder, stop_at=answers - 2, **settings)
    checkpoint = find_checkpoint(folder)
    saved, rows = read_state_values(checkpoint), read_rows(tmp_path / "whole", "train")
    assert saved["loss_scale"]["scale"] == rows[saved["step"] - 1]["loss_scale"]
    for part in (rows[: saved["step"]], rows[saved["step"] :]):
        assert sum(row["skipped_updates"] for row in part) > 0
    assert_same_state(run_grpo(folder, checkpoint, **settings), whole)
    assert read_logged_numbers(folder) == read_logged_numbers(tmp_path / "whole")
