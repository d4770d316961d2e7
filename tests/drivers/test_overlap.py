"""`--async-steps 1`: the next batch is sampled while this one is trained on, and is exactly one update old."""

import json
import sys
import threading
from dataclasses import replace

import pytest
import torch

from drivers.common.display import Display
from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.hf import HFEngine
from drivers.policy.devices import choose_devices
from drivers.train import train
from drivers.training import update as update_step
from drivers.training.run import Run
from tests.drivers.parts import clone_policy, letter_grader, make_run, tiny_config, tiny_parts
from tests.drivers.test_train import weights

OVERLAPPED = {"async_steps": 1, "engine": "vllm", "importance": "truncate", "loss_type": "grpo_clip"}


class SnapshotEngine(HFEngine):
    """Samples from a copy of the policy as it was at the last push, as vLLM does; notes who sampled what, where."""

    def __init__(self, policy, tokenizer):
        super().__init__(clone_policy(policy), tokenizer)
        self.source, self.busy, self.calls = policy, False, []

    def load_weights(self, version):
        assert not self.busy, "a push while samples are being drawn"
        self._policy.load_state_dict(self.source.state_dict())
        super().load_weights(version)

    def generate(self, prompts, sampling, *, seed):
        self.busy = True
        completions = super().generate(prompts, sampling, seed=seed)
        self.calls.append((threading.current_thread().name, self._version, weights(self._policy), completions))
        self.busy = False
        return completions


def run_overlapped(folder, **changes):
    config, parts = tiny_config(**OVERLAPPED | changes), tiny_parts()
    run, engine = make_run(config, folder, parts.tokenizer), SnapshotEngine(parts.policy, parts.tokenizer)
    try:
        train(config, parts.policy, engine, letter_grader, parts.questions, parts.questions, run)
    finally:
        run.finish()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return parts.policy, engine, [row for row in rows if row["phase"] == "train"]


def test_each_batch_but_the_first_is_one_update_old(tmp_path):
    _, engine, steps = run_overlapped(tmp_path, n_grpo_steps=4, learning_rate=1e-3)
    assert [row["staleness"] for row in steps] == [0.0, 1.0, 1.0, 1.0]
    in_background = [call for call in engine.calls if call[0].startswith("rollouts")]
    assert [version for _, version, _, _ in in_background] == [0, 1, 2]
    # The rollouts that were begun in step k have the weights that step k began with.
    pushed = {version: sampled for _, version, sampled, _ in engine.calls}
    for earlier, later in ((0, 1), (1, 2)):
        assert not torch.equal(pushed[earlier], pushed[later])
    assert ["time_wait_s" in row for row in steps] == [True, True, True, False]
    assert all(row["mismatch_mean"] > 0 for row in steps[1:])
    assert steps[0]["mismatch_mean"] < 1e-5


def test_without_overlap_nothing_is_stale_and_nothing_runs_elsewhere(tmp_path):
    _, engine, steps = run_overlapped(tmp_path, n_grpo_steps=3, async_steps=0)
    assert {row["staleness"] for row in steps} == {0.0}
    assert {thread for thread, *_ in engine.calls} == {"MainThread"}
    assert all("time_wait_s" not in row for row in steps)


@pytest.mark.slow
def test_the_questions_and_seeds_are_those_of_a_run_without_overlap(tmp_path):
    """Only the weights behind them differ: at a rate of next to nothing, so do the trajectories."""
    first, one, _ = run_overlapped(tmp_path / "a", n_grpo_steps=3, learning_rate=1e-12)
    second, other, _ = run_overlapped(tmp_path / "b", n_grpo_steps=3, learning_rate=1e-12, async_steps=0)
    sampled = [
        sorted(c.prompt_token_ids + c.token_ids for call in engine.calls for c in call[3]) for engine in (one, other)
    ]
    assert sampled[0] == sampled[1]
    assert torch.allclose(weights(first), weights(second), atol=1e-9)


@pytest.mark.parametrize(
    "correction",
    [
        pytest.param({}, id="truncate"),
        pytest.param({"importance": "none", "old_policy": "sampler"}, id="two", marks=pytest.mark.slow),
    ],
)
def test_one_update_late_it_learns_all_the_same(tmp_path, correction):
    _, _, steps = run_overlapped(tmp_path, n_grpo_steps=40, **correction)
    assert steps[0]["reward"] < 0.15
    assert sum(row["reward"] for row in steps[-3:]) / 3 > 0.9


def test_an_error_in_the_background_ends_the_run_as_itself(tmp_path):
    calls = []

    def failing(responses, ground_truths):
        calls.extend(responses)
        if len(calls) > 40:
            raise RuntimeError("the grader is gone")
        return letter_grader(responses, ground_truths)

    config, parts = tiny_config(**OVERLAPPED, n_grpo_steps=4), tiny_parts()
    run, engine = make_run(config, tmp_path, parts.tokenizer), SnapshotEngine(parts.policy, parts.tokenizer)
    before = weights(parts.policy)
    with pytest.raises(RuntimeError, match="the grader is gone"):
        train(config, parts.policy, engine, failing, parts.questions, parts.questions, run)
    run.finish()
    # The update beside which it happened was made: it counts, and is what a checkpoint will hold.
    assert run.step == engine.calls[-1][1] + 1
    assert not torch.equal(weights(parts.policy), before)


def test_a_failure_is_not_held_up_by_what_is_being_sampled(tmp_path, monkeypatch):
    """A checkpoint must be written within the seconds that a SIGTERM leaves; a rollout may take minutes."""

    go_on = threading.Event()

    class SlowEngine(SnapshotEngine):
        def generate(self, *args, **kwargs):
            if threading.current_thread().name.startswith("rollouts"):
                assert go_on.wait(60)
            return super().generate(*args, **kwargs)

    def interrupted(*_):
        raise KeyboardInterrupt

    config, parts = tiny_config(**OVERLAPPED, n_grpo_steps=4), tiny_parts()
    run, engine = make_run(config, tmp_path, parts.tokenizer), SlowEngine(parts.policy, parts.tokenizer)
    monkeypatch.setattr(update_step, "accumulate_gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, parts.policy, engine, letter_grader, parts.questions, parts.questions, run)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]
    assert len(workers) == 1
    go_on.set()
    workers[0].join(60)
    assert not workers[0].is_alive()
    run.finish()


@pytest.mark.slow
def test_what_a_dead_engine_was_sampling_is_sampled_when_its_step_begins(tmp_path, monkeypatch):
    """On the same questions with the same seeds, from weights that are not stale; the run goes on."""
    deaths = [2]  # while it samples for this step

    class MortalEngine(SnapshotEngine):
        def generate(self, prompts, sampling, *, seed):
            if threading.current_thread().name.startswith("rollouts") and self._version == deaths[0] - 2:
                deaths[0] = 0
                raise EngineDiedError("it died")
            return super().generate(prompts, sampling, seed=seed)

    _, undisturbed, expected = run_overlapped(tmp_path / "a", n_grpo_steps=4, learning_rate=1e-12)
    monkeypatch.setattr(sys.modules[__name__], "SnapshotEngine", MortalEngine)
    _, engine, steps = run_overlapped(tmp_path / "b", n_grpo_steps=4, learning_rate=1e-12)
    assert deaths == [0]
    assert [row["staleness"] for row in expected] == [0.0, 1.0, 1.0, 1.0]
    assert [row["staleness"] for row in steps] == [0.0, 0.0, 1.0, 1.0]
    sampled = [
        sorted(c.prompt_token_ids + c.token_ids for call in one.calls for c in call[3])
        for one in (undisturbed, engine)
    ]
    assert sampled[0] == sampled[1]


def test_gone_on_with_in_turns_the_engine_sleeps_and_is_checked_after_the_first_update(tmp_path, monkeypatch):
    """The batch that came with the checkpoint is nothing to sample for: it is at hand, and so must the memory be."""
    from drivers import train as program

    told, update = [], program.update
    monkeypatch.setattr(program, "update", lambda *args: (told.append("update"), update(*args)))

    class SleepyEngine(SnapshotEngine):
        def load_weights(self, version):
            told.append(f"push {version}")
            super().load_weights(version)

        def sleep(self):
            told.append("sleep")

        def received(self):
            told.append("check")
            return super().received()

    monkeypatch.setattr(sys.modules[__name__], "SnapshotEngine", SleepyEngine)
    run_overlapped(tmp_path, n_grpo_steps=3, checkpoint_steps=2)
    parts, checkpoint = tiny_parts(), tmp_path / "checkpoint-2"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["pending"]
    told.clear()
    config = tiny_config(**OVERLAPPED | {"n_grpo_steps": 4, "async_steps": 0})
    run = Run(config, tmp_path, parts.tokenizer, Display(4), checkpoint)
    engine = SleepyEngine(parts.policy, parts.tokenizer)
    try:
        train(config, parts.policy, engine, letter_grader, parts.questions, parts.questions, run)
    finally:
        run.finish()
    assert told == [
        *("push 2", "check", "sleep", "update"),
        *("push 3", "check", "sleep", "update"),
        "push 4",
    ]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "check"] == [0, 1]  # as where nothing was interrupted


def test_on_one_gpu_policy_and_engine_cannot_overlap(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = replace(tiny_config(**OVERLAPPED), policy_device="cuda", rollout_device="cuda")
    with pytest.raises(UsageError, match="a second GPU is required"):
        choose_devices(config)
