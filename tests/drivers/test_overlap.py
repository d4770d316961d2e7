"""`--async-steps 1`: the next batch is sampled during this update, and is exactly one update stale."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from drivers.common.display import Display
from drivers.common.errors import EngineDiedError, UsageError
from drivers.policy.devices import choose_devices
from drivers.train import train
from drivers.training import update as update_step
from drivers.training.batch import StepRollouts
from drivers.training.components import Components
from drivers.training.rollouts import RolloutPrefetcher
from drivers.training.run import Run
from drivers.training.state import TrainingState
from tests.drivers.helpers import runs as run_helpers
from tests.drivers.helpers.letters import flatten_weights, letter_grader, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.runs import OVERLAPPED, SnapshotEngine, read_rows, run_overlapped


def test_async_batches_after_first_are_one_update_stale(tmp_path):
    _, engine, steps = run_overlapped(tmp_path, n_grpo_steps=4, learning_rate=1e-3)
    assert [row["staleness"] for row in steps] == [0.0, 1.0, 1.0, 1.0]
    in_background = [call for call in engine.calls if call[0].startswith("rollouts")]
    assert [version for _, version, _, _ in in_background] == [0, 1, 2]
    # Rollouts that start in step k use the weights at the beginning of step k.
    pushed = {version: sampled for _, version, sampled, _ in engine.calls}
    for earlier, later in ((0, 1), (1, 2)):
        assert not torch.equal(pushed[earlier], pushed[later])
    assert ["time_wait_s" in row for row in steps] == [True, True, True, False]
    assert all(row["mismatch_mean"] > 0 for row in steps[1:])
    assert steps[0]["mismatch_mean"] < 1e-5


def test_synchronous_batches_are_fresh_and_in_main_thread(tmp_path):
    _, engine, steps = run_overlapped(tmp_path, n_grpo_steps=3, async_steps=0)
    assert {row["staleness"] for row in steps} == {0.0}
    assert {thread for thread, *_ in engine.calls} == {"MainThread"}
    assert all("time_wait_s" not in row for row in steps)


@pytest.mark.slow
def test_async_questions_and_seeds_equal_synchronous(tmp_path):
    """Only the weights differ, so with a negligible learning rate the runs are equal."""
    first, one, _ = run_overlapped(tmp_path / "a", n_grpo_steps=3, learning_rate=1e-12)
    second, other, _ = run_overlapped(tmp_path / "b", n_grpo_steps=3, learning_rate=1e-12, async_steps=0)
    sampled = [
        sorted(c.prompt_token_ids + c.token_ids for call in engine.calls for c in call[3]) for engine in (one, other)
    ]
    assert sampled[0] == sampled[1]
    assert torch.allclose(flatten_weights(first), flatten_weights(second), atol=1e-9)


@pytest.mark.medium
@pytest.mark.parametrize(
    "correction",
    [
        pytest.param({}, id="truncate"),
        pytest.param({"importance": "none", "old_policy": "sampler"}, id="two", marks=pytest.mark.slow),
    ],
)
def test_async_run_learns(tmp_path, correction):
    _, _, steps = run_overlapped(tmp_path, n_grpo_steps=40, **correction)
    assert steps[0]["reward"] < 0.15
    assert sum(row["reward"] for row in steps[-3:]) / 3 > 0.9


def test_async_grader_error_is_raised(tmp_path):
    calls = []

    def failing(responses, ground_truths):
        calls.extend(responses)
        if len(calls) > 40:
            raise RuntimeError("the grader is gone")
        return letter_grader(responses, ground_truths)

    config, parts = make_tiny_config(**OVERLAPPED, n_grpo_steps=4), make_tiny_parts()
    run, engine = make_run(config, tmp_path, parts.tokenizer), SnapshotEngine(parts.policy, parts.tokenizer)
    before = flatten_weights(parts.policy)
    with pytest.raises(RuntimeError, match="the grader is gone"):
        train(config, Components(parts.policy, engine, failing, parts.questions, parts.questions), run)
    run.finish()
    # The concurrent update was made: it counts, and a checkpoint will hold it.
    assert run.step == engine.calls[-1][1] + 1
    assert not torch.equal(flatten_weights(parts.policy), before)


def test_async_failure_does_not_wait_for_rollouts(tmp_path, monkeypatch):
    """A SIGTERM leaves seconds to write a checkpoint, and a rollout may take minutes."""

    go_on = threading.Event()

    class SlowEngine(SnapshotEngine):
        def generate(self, *args, **kwargs):
            if threading.current_thread().name.startswith("rollouts"):
                assert go_on.wait(60)
            return super().generate(*args, **kwargs)

    def interrupted(*_):
        raise KeyboardInterrupt

    config, parts = make_tiny_config(**OVERLAPPED, n_grpo_steps=4), make_tiny_parts()
    run, engine = make_run(config, tmp_path, parts.tokenizer), SlowEngine(parts.policy, parts.tokenizer)
    monkeypatch.setattr(update_step, "accumulate_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]
    assert len(workers) == 1
    go_on.set()
    workers[0].join(60)
    assert not workers[0].is_alive()
    run.finish()


@pytest.mark.slow
def test_async_engine_death_samples_batch_again(tmp_path, monkeypatch):
    """The batch has the same questions and seeds, from fresh weights, and the run continues."""
    deaths = [2]  # while it samples for this step

    class MortalEngine(SnapshotEngine):
        def generate(self, prompts, sampling, *, seed):
            if threading.current_thread().name.startswith("rollouts") and self._version == deaths[0] - 2:
                deaths[0] = 0
                raise EngineDiedError("it died")
            return super().generate(prompts, sampling, seed=seed)

    _, undisturbed, expected = run_overlapped(tmp_path / "a", n_grpo_steps=4, learning_rate=1e-12)
    monkeypatch.setattr(run_helpers, "SnapshotEngine", MortalEngine)
    _, engine, steps = run_overlapped(tmp_path / "b", n_grpo_steps=4, learning_rate=1e-12)
    assert deaths == [0]
    assert [row["staleness"] for row in expected] == [0.0, 1.0, 1.0, 1.0]
    assert [row["staleness"] for row in steps] == [0.0, 0.0, 1.0, 1.0]
    sampled = [
        sorted(c.prompt_token_ids + c.token_ids for call in one.calls for c in call[3])
        for one in (undisturbed, engine)
    ]
    assert sampled[0] == sampled[1]


@pytest.mark.medium
def test_resume_with_shared_gpu_sleeps_engine_before_first_update(tmp_path, monkeypatch):
    """The checkpoint holds the sampled batch, so the engine has nothing to do and must free its memory."""
    from drivers import train as program

    events, update = [], program.update
    monkeypatch.setattr(program, "update", lambda *args: (events.append("update"), update(*args)))

    class SleepyEngine(SnapshotEngine):
        def load_weights(self, version):
            events.append(f"push {version}")
            super().load_weights(version)

        def sleep(self):
            events.append("sleep")

        def received(self):
            events.append("check")
            return super().received()

    monkeypatch.setattr(run_helpers, "SnapshotEngine", SleepyEngine)
    run_overlapped(tmp_path, n_grpo_steps=3, checkpoint_steps=2)
    parts, checkpoint = make_tiny_parts(), tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["pending"]
    events.clear()
    config = make_tiny_config(**OVERLAPPED | {"n_grpo_steps": 4, "async_steps": 0})
    run = Run(config, tmp_path, parts.tokenizer, Display(4), checkpoint)
    engine = SleepyEngine(parts.policy, parts.tokenizer)
    try:
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        run.finish()
    assert events == [
        *("push 2", "check", "sleep", "update"),
        *("push 3", "check", "sleep", "update"),
        "push 4",
    ]
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows if row["phase"] == "check"] == [0, 1]  # as in a run without interruption


def test_async_on_one_gpu_raises_usage_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = replace(make_tiny_config(**OVERLAPPED), policy_device="cuda", rollout_device="cuda")
    with pytest.raises(UsageError, match="use a second GPU"):
        choose_devices(config)


class Recorder:
    """A run, its state and its engine as a prefetcher sees them, and a collector that records its steps."""

    def __init__(self, folder, n_steps=3, pending=None):
        parts = make_tiny_parts()
        config = make_tiny_config(**OVERLAPPED, n_grpo_steps=n_steps)
        self.run, self.state = make_run(config, folder, parts.tokenizer), TrainingState(config, parts.policy)
        self.state.pending, self.steps, self.n_sleeps, self.error = pending, [], 0, None
        self.prefetcher = RolloutPrefetcher(self.collect, self, self.state, self.run)

    def collect(self, step, timer):
        self.steps.append(step)
        with timer.phase("rollout"):
            self.state.draw.random()
        if self.error:
            raise self.error
        return StepRollouts([], [], torch.zeros(0), None, {"step": float(step)})

    def sleep(self):
        self.n_sleeps += 1


def test_prefetcher_returns_each_batch_once(tmp_path):
    restored = StepRollouts([], [], torch.zeros(0), None, {"step": 1.0})
    seen = Recorder(tmp_path, pending=restored)
    with seen.prefetcher as prefetcher:
        assert prefetcher.get(1) is restored
        assert (seen.state.pending, seen.n_sleeps, seen.steps) == (None, 1, [])
        prefetcher.prefetch(2)
        prefetcher.drain()
        assert seen.state.pending.metrics["step"] == 2  # a checkpoint of step 1 holds it
        assert prefetcher.get(2).metrics["step"] == 2
        assert (seen.state.pending, seen.steps) == (None, [2])
        assert seen.run.timer.seconds["rollout"] > 0
        assert prefetcher.get(3).metrics["step"] == 3
        prefetcher.prefetch(4)  # there is no such step
        prefetcher.drain()
    assert seen.steps == [2, 3]
    assert seen.state.pending is None


def test_prefetcher_dead_engine_draws_the_same_questions_again(tmp_path, capsys):
    seen = Recorder(tmp_path)
    before = seen.state.draw.getstate()
    seen.error = EngineDiedError("it died")
    with seen.prefetcher as prefetcher:
        prefetcher.prefetch(1)
        prefetcher.drain()
        assert seen.state.draw.getstate() == before
        assert "it died: the rollouts of step 1 are sampled when it begins" in capsys.readouterr().out
        seen.error = None
        assert prefetcher.get(1).metrics["step"] == 1
    assert seen.steps == [1, 1]
