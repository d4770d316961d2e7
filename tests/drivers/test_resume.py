"""A stopped and resumed run equals a run without interruption."""

import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM

from drivers import train as program
from drivers.common import distributed
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.common.signals import terminate_as_interrupt
from drivers.reports.logged_run import read_metrics
from drivers.runs import checkpoint
from drivers.runs.checkpoint import STATE_TENSORS, STATE_VALUES, find_damage, read_state_values, read_tensors
from drivers.runs.folder import find_checkpoint
from drivers.runs.lock import acquire_run_lock, release_run_lock
from drivers.runs.log import JsonlWriter, RunLog
from drivers.runs.resume import open_run_folder
from drivers.train import train
from drivers.training import update as update_step
from drivers.training.batch import StepRollouts
from drivers.training.components import Components
from drivers.training.run import Run
from drivers.training.state import TrainingState, fingerprint, validate_resume
from tests.drivers.helpers import runs
from tests.drivers.helpers.letters import (
    flatten_weights,
    letter_grader,
    make_completion,
    make_letter_questions,
    make_tiny_config,
    make_tiny_parts,
)
from tests.drivers.helpers.processes import end_process_after, limit_file_size, wait_until
from tests.drivers.helpers.runs import RUN_KINDS, SIX_STEPS, StopRun, assert_same_state, read_logged_numbers, run_grpo
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


QUICK = ("ahead",)


@pytest.mark.medium
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in RUN_KINDS])
def test_resume_after_stop_anywhere_is_bit_identical(tmp_path, kind, number):
    """Weights, both moments, every logged number and every logged completion are equal."""
    settings, folder = RUN_KINDS[kind], tmp_path / "stopped"
    *whole, answers = run_grpo(tmp_path / "whole", **settings)
    stop_at = random.Random(kind).sample(range(5, answers), 2)[number]
    run_grpo(folder, stop_at=stop_at, **settings)
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    again = run_grpo(folder, checkpoint, **settings)
    assert_same_state(again, whole)
    assert read_logged_numbers(folder) == read_logged_numbers(tmp_path / "whole")
    assert (folder / "completions.jsonl").read_bytes() == (tmp_path / "whole/completions.jsonl").read_bytes()


def test_state_holds_the_weights_of_a_reference_only_if_it_moves():
    policy, reference = make_tiny_parts().policy, make_tiny_parts().policy
    fixed = TrainingState(make_tiny_config(kl_coef=0.1), policy, reference).tensors()
    moving = TrainingState(make_tiny_config(kl_coef=0.1, kl_reference_steps=2), policy, reference).tensors()
    names = {f"reference.{name}": weight for name, weight in reference.named_parameters()}
    assert moving.keys() - fixed.keys() == names.keys()
    assert all(moving[name].data_ptr() == weight.data_ptr() for name, weight in names.items())


@pytest.mark.slow
def test_checkpoints_only_newest_two_are_resumable(tmp_path):
    run_grpo(tmp_path / "run")
    left = sorted(
        folder.name for folder in (tmp_path / "run").glob("checkpoint-*") if (folder / STATE_TENSORS).exists()
    )
    assert left == ["checkpoint-5", "checkpoint-6"]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 6
    assert not list((tmp_path / "run").rglob(".unfinished-*"))
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-6"
    assert find_checkpoint(tmp_path / "run/checkpoint-5") == tmp_path / "run/checkpoint-5"
    with pytest.raises(
        UsageError, match="checkpoint-4: cannot resume from this checkpoint: it has no folder trainer_state"
    ):
        find_checkpoint(tmp_path / "run/checkpoint-4")
    for folder in (tmp_path / "run").glob("*-*"):  # the remaining files are unchanged
        assert find_damage(folder) is None
    assert find_checkpoint(tmp_path) is None


@pytest.mark.medium
def test_stop_between_checkpoints_saves_last_step(tmp_path):
    """The saved step is resumable. If the last checkpoint already holds it, no second one is written."""
    folder = tmp_path / "run"
    run_grpo(folder, stop_at=6, checkpoint_steps=2, eval_steps=100)
    stopped = find_checkpoint(folder)
    assert stopped is not None
    step = read_state_values(stopped)["step"]
    assert (stopped.name, step) == ("checkpoint-3-stopped", 3)
    run_grpo(tmp_path / "other", stop_at=6, eval_steps=100)
    assert not list((tmp_path / "other").glob("*-stopped"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_checkpoint_waits_for_its_end(tmp_path, monkeypatch, number):
    """The copy is completed, the thread writes it, and no other step begins."""
    import drivers.training.checkpointer as program

    copy, copied = program.copy_content, []

    def interrupted(*arguments, **named):
        copied.append(1)
        if len(copied) == 2:
            os.kill(os.getpid(), number)
        return copy(*arguments, **named)

    monkeypatch.setattr(program, "copy_content", interrupted)
    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        run_grpo(tmp_path / "run", eval_steps=100)
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-2"
    assert [row["step"] for row in runs.read_rows(tmp_path / "run", "train")] == [1, 2]


def at_update(monkeypatch, number, act):
    """Call `act` before update `number`, counted from 1."""
    updates, original = [], update_step.accumulate_gradients

    def accumulate(*arguments, **named):
        updates.append(1)
        if len(updates) == number:
            act()
        return original(*arguments, **named)

    monkeypatch.setattr(update_step, "accumulate_gradients", accumulate)


def hold_write(monkeypatch, step):
    """Let the thread that writes the checkpoint of `step` wait for the returned event; return the order of writes."""
    import drivers.training.checkpointer as program

    save, go, order = program.save_checkpoint, threading.Event(), []

    def held(content, target):
        order.append(f"begin {content.values['step']}")
        if content.values["step"] == step:
            assert go.wait(20)
        saved = save(content, target)
        order.append(f"end {content.values['step']}")
        return saved

    monkeypatch.setattr(program, "save_checkpoint", held)
    return go, order


def read_checkpoint(folder):
    """Return the tensors and the values of a checkpoint."""
    tensors = {}
    for file in (folder / "model.safetensors", *(folder / STATE_TENSORS).iterdir()):
        tensors |= safetensors.torch.load_file(file)
    return tensors, read_state_values(folder)


@pytest.mark.medium
def test_checkpoint_written_during_later_steps_has_its_own_step(tmp_path, monkeypatch):
    """Two more steps have changed weights and moments before a byte of checkpoint 2 is written."""
    settings = {"n_grpo_steps": 4, "checkpoint_steps": 2, "eval_steps": 100}
    *whole, _ = run_grpo(tmp_path / "whole", **settings)
    go, order = hold_write(monkeypatch, 2)
    at_update(monkeypatch, 4, lambda: (wait_until(lambda: order), order.append("update 4"), go.set()))
    *found, _ = run_grpo(tmp_path / "run", **settings)
    assert order == ["begin 2", "update 4", "end 2", "begin 4", "end 4"]
    assert_same_state(found, whole)
    for name in ("checkpoint-2", "checkpoint-4"):
        assert find_damage(tmp_path / "run" / name) is None
        (tensors, values), (expected, same) = (read_checkpoint(tmp_path / run / name) for run in ("run", "whole"))
        assert values == same
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    assert [row["step"] for row in runs.read_rows(tmp_path / "run", "save")] == [2, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness per thread")
def test_write_leaves_the_cores_to_the_step(tmp_path, monkeypatch):
    import drivers.training.checkpointer as program

    save, niceness = program.save_checkpoint, []

    def record(content, target):
        niceness.append(os.nice(0))
        return save(content, target)

    monkeypatch.setattr(program, "save_checkpoint", record)
    before = os.nice(0)
    run_grpo(tmp_path / "run", n_grpo_steps=2)
    assert niceness == 2 * [min(19, before + program.NICENESS)]
    assert os.nice(0) == before


@pytest.mark.medium
def test_second_save_waits_for_the_first(tmp_path, monkeypatch):
    """The first write ends a while after the second save has asked for its end."""
    import drivers.training.checkpointer as program

    go, order = hold_write(monkeypatch, 1)
    finish = program.Checkpointer.finish

    def finish_later(checkpointer):
        if checkpointer._save is not None and not go.is_set():
            order.append("second save")
            threading.Timer(0.3, go.set).start()
        return finish(checkpointer)

    monkeypatch.setattr(program.Checkpointer, "finish", finish_later)
    run_grpo(tmp_path / "run", n_grpo_steps=2, eval_steps=100)
    order.remove("begin 1")  # the thread may be slow to start
    assert order == ["second save", "end 1", "begin 2", "end 2"]
    first = runs.read_rows(tmp_path / "run", "save")[0]
    assert min(first["time_write_s"], first["time_save_s"]) > 0.2


def test_failed_write_is_reported_at_the_end_of_the_next_step(tmp_path, monkeypatch):
    import drivers.training.checkpointer as program

    save, failing, said = program.save_checkpoint, threading.Event(), []

    def fail(content, target):
        if content.values["step"] != 2:
            return save(content, target)
        assert failing.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(program, "save_checkpoint", fail)
    monkeypatch.setattr(runs.Run, "warn", lambda run, text: said.append((run.step, text)))
    at_update(monkeypatch, 3, failing.set)
    end_step = runs.Run.end_step

    def end_step_after_failure(run, policy):
        if run.step == 3:
            run.checkpointer._save.written.exception()  # waits for the thread
        end_step(run, policy)

    monkeypatch.setattr(runs.Run, "end_step", end_step_after_failure)
    run_grpo(tmp_path / "run", n_grpo_steps=4, eval_steps=100, checkpoint_steps=2)
    ((step, text),) = [pair for pair in said if "cannot be written" in pair[1]]
    assert step == 3
    assert "checkpoint-2: the checkpoint cannot be written ([Errno 5]" in text
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-4"


@pytest.mark.medium
def test_stop_during_write_waits_for_it(tmp_path, monkeypatch):
    """The checkpoint in progress holds all updates, so that no other is saved."""
    go, _ = hold_write(monkeypatch, 2)
    at_update(monkeypatch, 3, lambda: (threading.Timer(0.3, go.set).start(), stop()))

    def stop():
        raise StopRun

    run_grpo(tmp_path / "run", eval_steps=100)
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert find_damage(tmp_path / "run/checkpoint-2") is None


@pytest.mark.medium
def test_interrupt_during_write_waits_for_it_and_keeps_the_lock(tmp_path, monkeypatch):
    """Ctrl-C before the first update of the next step ends the run at once, but not the thread."""
    folder, seen = tmp_path / "run", []
    folder.mkdir()
    acquire_run_lock("--save-dir", folder)
    go, order = hold_write(monkeypatch, 2)

    def interrupt():
        threading.Timer(0.3, go.set).start()
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(
        "drivers.training.run.release_run_lock", lambda path: (seen.extend(order), release_run_lock(path))
    )
    at_update(monkeypatch, 3, interrupt)
    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        run_grpo(folder, eval_steps=100)
    assert seen[-1] == "end 2"
    assert find_checkpoint(folder) == folder / "checkpoint-2"


@pytest.mark.medium
def test_kill_during_write_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    """The thread has written half of checkpoint 2 when step 3 is killed; the resumed run is exact."""
    folder, settings = tmp_path / "run", {"n_grpo_steps": 4}
    *whole, _ = run_grpo(tmp_path / "whole", **settings)
    write = checkpoint.write_shards
    pid = os.fork()
    if pid == 0:
        end_process_after(120)
        half = threading.Event()

        def tear(file, shards, offsets):
            if len(list(folder.glob("checkpoint-*"))) != 1:
                return write(file, shards, offsets)
            write(file, dict(list(shards.items())[:3]), dict(list(offsets.items())[:3]))
            half.set()
            time.sleep(1000)

        monkeypatch.setattr(checkpoint, "write_shards", tear)
        at_update(monkeypatch, 3, lambda: half.wait(60) and os.kill(os.getpid(), signal.SIGKILL))
        try:
            run_grpo(folder, **settings)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(list(folder.glob(f".unfinished-checkpoint-2/{STATE_TENSORS}/shard-*"))) == 1
    assert find_checkpoint(folder) == folder / "checkpoint-1"
    *again, _ = run_grpo(folder, find_checkpoint(folder), **settings)
    assert_same_state(again, whole)
    assert read_logged_numbers(folder) == read_logged_numbers(tmp_path / "whole")
    assert not list(folder.rglob(".unfinished-*"))


def make_rank_zero_of_two(monkeypatch, folder, *, n_shards):
    """Return a checkpointer of rank 0 of 2 that writes checkpoint 1; `n_shards` ranks have written their shards."""
    config, parts = make_tiny_config(), make_tiny_parts()
    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True))
    state = TrainingState(config, parts.policy)
    target = folder / "checkpoint-1"
    monkeypatch.setattr(distributed, "run_on_rank_zero", lambda call: call())
    content = checkpoint.copy_content(parts.policy, parts.tokenizer, values={"step": 1}, tensors=state.tensors())
    monkeypatch.setattr(
        "drivers.training.checkpointer.copy_content", lambda *_, **__: content
    )  # no rank to gather from
    monkeypatch.setattr(distributed, "size", lambda: 2)
    run.checkpointer.start(parts.policy, state, target.name)
    run.checkpointer._save.written.result()
    if n_shards == 2:
        shards = folder / f".unfinished-{target.name}" / STATE_TENSORS
        shutil.copy(shards / checkpoint.shard_name(0), shards / checkpoint.shard_name(1))
    return run.checkpointer, target


@pytest.mark.parametrize("n_shards", [1, 2])
def test_close_commits_if_all_ranks_have_written(tmp_path, monkeypatch, n_shards):
    """At an error rank 0 cannot ask the other ranks; it looks for their files."""
    monkeypatch.setattr("drivers.training.checkpointer.ABORT_WAIT_S", 0.2)
    checkpointer, target = make_rank_zero_of_two(monkeypatch, tmp_path, n_shards=n_shards)
    assert not target.exists()
    checkpointer.close()
    assert target.exists() == (n_shards == 2)
    if n_shards == 2:
        assert find_damage(target) is None


def test_failed_write_of_another_rank_ends_the_run(tmp_path, monkeypatch):
    checkpointer, target = make_rank_zero_of_two(monkeypatch, tmp_path, n_shards=1)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (None, "No space left on device")])
    with pytest.raises(TrainingAbortedError, match=r"checkpoint-1: the checkpoint cannot be written .No space left"):
        checkpointer.finish()
    assert not target.exists()


def test_save_checkpoint_bug_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_shards", lambda *_: None + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        run_grpo(tmp_path / "run", n_grpo_steps=2)


@pytest.mark.parametrize("raised", [OSError(5, "Input/output error"), RuntimeError("no such thing")])
def test_resume_unreadable_state_raises_usage_error(tmp_path, monkeypatch, raised):
    """The kernel may refuse to read even after all checksums were right."""
    run_grpo(tmp_path / "run", n_grpo_steps=1)

    def fail(*_):
        raise raised

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", fail)
    with pytest.raises(UsageError, match=rf"cannot resume from it \({type(raised).__name__}: "):
        run_grpo(tmp_path / "run", find_checkpoint(tmp_path / "run"), n_grpo_steps=2)


def test_checkpoint_is_skipped_while_log_lines_wait(tmp_path, monkeypatch, capsys):
    """A checkpoint must not outlive the lines of its steps; the next one is written together with them."""
    import drivers.training.checkpointer as program

    save, folder = program.save_checkpoint, tmp_path / "run"
    flush = JsonlWriter.flush
    monkeypatch.setattr(JsonlWriter, "flush", lambda lines: "no room" if "fail" in state else flush(lines))
    state = set()

    class Moody(runs.Run):
        def report(self, step, values):
            state.add("fail") if step == 2 else state.clear()
            super().report(step, values)

    monkeypatch.setattr(runs, "Run", Moody)
    saved = []
    monkeypatch.setattr(
        program, "save_checkpoint", lambda content, to: saved.append(content.values["step"]) or save(content, to)
    )
    run_grpo(folder, n_grpo_steps=3)
    assert saved == [1, 3]
    assert [row["step"] for row in read_logged_numbers(folder) if row["phase"] == "train"] == [1, 2, 3]


def test_last_checkpoint_is_not_written_while_log_lines_wait(tmp_path, monkeypatch):
    """Not even where older training states were deleted to make room for it."""
    import drivers.training.checkpointer as program

    save, wait = program.save_checkpoint, []

    def fail_at_last(content, target):
        if content.values["step"] == 2 and not wait:
            wait.append("no room")  # from now on
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(content, target)

    monkeypatch.setattr(program, "save_checkpoint", fail_at_last)
    monkeypatch.setattr(program, "is_full", lambda *_: True)
    monkeypatch.setattr(JsonlWriter, "flush", lambda lines, flush=JsonlWriter.flush: wait[0] if wait else flush(lines))
    with pytest.raises(TrainingAbortedError, match="checkpoint-2: the checkpoint cannot be written"):
        run_grpo(tmp_path / "run", n_grpo_steps=2)
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-1"


@pytest.mark.medium
def test_resume_with_unfinished_link_removes_link_only(tmp_path):
    """A kill while the best checkpoint was linked leaves such a link."""
    folder = tmp_path / "run"
    run_grpo(folder, n_grpo_steps=2)
    (folder / ".unfinished-best_checkpoint").symlink_to("checkpoint-2")
    run_grpo(folder, find_checkpoint(folder), n_grpo_steps=3)
    assert not list(folder.glob(".unfinished-*"))
    assert (folder / "checkpoint-2/model.safetensors").exists()


def test_stop_inside_step_saves_unresumable_weights(tmp_path, monkeypatch):
    """No step begins with these weights, so they lack the state for a resume; it begins at the checkpoint before."""
    settings, folder = {"train_batch_size": 16, "n_grpo_steps": 3}, tmp_path / "run"
    *whole, _ = run_grpo(tmp_path / "whole", **settings)
    updates, original = [], update_step.accumulate_gradients

    def fail(*arguments, **named):
        updates.append(1)
        if len(updates) == 4:  # the second update of the second step
            raise StopRun
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(update_step, "accumulate_gradients", fail)
        weights, *_ = run_grpo(folder, **settings)
    (stopped,) = folder.glob("*-stopped")
    assert json.loads((stopped / STATE_VALUES).read_text()) == {"step": 1}
    assert not (stopped / STATE_TENSORS).exists()
    before = find_checkpoint(folder)
    assert before == folder / "checkpoint-1"
    saved, earlier = (flatten_weights(AutoModelForCausalLM.from_pretrained(one)) for one in (stopped, before))
    assert torch.equal(saved, weights)
    assert not torch.equal(saved, earlier)
    *again, _ = run_grpo(folder, before, **settings)
    assert_same_state(again, whole)


@pytest.mark.slow
def test_resume_other_model_raises_usage_error(tmp_path):
    run_grpo(tmp_path / "run", n_grpo_steps=1)
    config, parts = make_tiny_config(**SIX_STEPS), make_tiny_parts()
    with torch.no_grad():
        parts.policy.model.layers = parts.policy.model.layers[:1]
    from drivers.common.display import Display

    run = Run(config, tmp_path / "run", parts.tokenizer, Display(1, quiet=True), find_checkpoint(tmp_path / "run"))
    with pytest.raises(UsageError, match="tensors do not fit this model's"):
        train(config, Components(parts.policy, parts.engine, letter_grader, parts.questions, parts.questions), run)
    run.finish()


def test_resume_failure_changes_no_file(tmp_path):
    """The checkpoint lacks a tensor."""
    folder = tmp_path / "run"
    run_grpo(folder, n_grpo_steps=2)
    checkpoint = find_checkpoint(folder)
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl", "config.json")}
    (shard,) = (checkpoint / STATE_TENSORS).glob("*.safetensors")
    other = safetensors.torch.load_file(shard)
    kept = dict(list(other.items())[1:])
    safetensors.torch.save_file(kept, shard)
    with pytest.raises(UsageError, match="cannot resume from it"):
        run_grpo(folder, checkpoint, n_grpo_steps=4)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_read_tensors_missing_shard_raises(tmp_path):
    """One of two files of a state is missing; the other must not pass for the whole state."""
    whole = torch.arange(12.0).view(4, 3)
    files = [tmp_path / f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in (1, 2)]
    for file, begin in zip(files, (0, 2), strict=True):
        place = json.dumps({"rows": {"saved_offsets": [begin, 0]}})
        part = whole[begin : begin + 2].contiguous()
        safetensors.torch.save_file({"rows": part}, file, metadata={"DCP_SHARDING_INFO": place, "format": "pt"})
    found = torch.zeros(4, 3)
    read_tensors(tmp_path, {"rows": found})
    assert torch.equal(found, whole)
    files[0].unlink()
    with pytest.raises(ValueError, match="contain 6 of the 12 values of rows"):
        read_tensors(tmp_path, {"rows": torch.zeros(4, 3)})


@pytest.mark.medium
def test_resume_with_more_steps_takes_their_learning_rates(tmp_path):
    """A schedule has no state: the rates after the checkpoint are those of a run of the new length."""
    folder, falling = tmp_path / "run", {"lr_schedule": "linear", "learning_rate": 1e-2, "eval_steps": 100}
    run_grpo(folder, n_grpo_steps=2, **falling)
    run_grpo(folder, find_checkpoint(folder), n_grpo_steps=4, **falling)
    rates = [row["learning_rate"] for row in read_logged_numbers(folder) if row["phase"] == "train"]
    assert rates == [1e-2, 0.5e-2, 0.5e-2, 0.25e-2]


@pytest.mark.slow
def test_resume_finished_run_keeps_final_model(tmp_path):
    """With more steps the new model takes the name and the old one is renamed; checkpoints share its files."""
    folder = tmp_path / "run"
    first, *_ = run_grpo(folder, n_grpo_steps=2, publish=True)
    final = folder / "final_model"
    assert (final / "model.safetensors").samefile(folder / "checkpoint-2/model.safetensors")
    assert not (final / STATE_TENSORS).exists()
    assert json.loads((final / STATE_VALUES).read_text()) == {"step": 2}
    second, *_ = run_grpo(folder, find_checkpoint(folder), n_grpo_steps=3, publish=True)
    assert torch.equal(flatten_weights(AutoModelForCausalLM.from_pretrained(final)), second)
    assert torch.equal(flatten_weights(AutoModelForCausalLM.from_pretrained(folder / "superseded-final_model")), first)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_resume_older_checkpoint_renames_later_ones(tmp_path):
    """Later steps are repeated and finished files kept. Unfinished files of a killed process are removed."""
    folder = tmp_path / "run"
    run_grpo(folder, n_grpo_steps=4)
    shutil.copytree(folder / "checkpoint-4" / STATE_TENSORS, tmp_path / "kept")
    whole, *_ = run_grpo(folder, find_checkpoint(folder))
    shutil.copytree(tmp_path / "kept", folder / "checkpoint-4" / STATE_TENSORS)
    (folder / ".unfinished-checkpoint-9/x").mkdir(parents=True)
    (folder / "checkpoint-5/.unfinished-trainer_state").mkdir()
    (folder / ".unfinished-config.json").touch()
    again, *_ = run_grpo(folder, folder / "checkpoint-4")
    assert torch.equal(again, whole)
    names = sorted(path.name for path in folder.glob("*checkpoint-*"))
    assert names == [*(f"checkpoint-{n}" for n in range(1, 7)), "superseded-checkpoint-5", "superseded-checkpoint-6"]
    assert not list(folder.rglob(".unfinished-*"))


@pytest.mark.slow
def test_checkpoint_full_disk_warns_and_run_continues(tmp_path, monkeypatch, capsys):
    """The checkpoint before stays; at the last step the error ends the run."""
    import drivers.training.checkpointer as program

    save, folder = program.save_checkpoint, tmp_path / "run"

    def fail_at(steps):
        def some(content, target):
            if content.values["step"] in steps:
                with limit_file_size(100_000):
                    return save(content, target)
            return save(content, target)

        return some

    whole, *_ = run_grpo(tmp_path / "whole", n_grpo_steps=3)
    monkeypatch.setattr(program, "save_checkpoint", fail_at({2}))
    found, *_ = run_grpo(folder, n_grpo_steps=3)
    assert torch.equal(found, whole)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    monkeypatch.setattr(program, "save_checkpoint", fail_at({3}))
    with pytest.raises(TrainingAbortedError, match="checkpoint-3: the checkpoint cannot be written"):
        run_grpo(tmp_path / "last", n_grpo_steps=3)
    assert find_checkpoint(tmp_path / "last").name == "checkpoint-2"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("room", "left"),
    [
        (2, {"checkpoint-2", "checkpoint-3"}),  # states: the second newest makes room for the last
        (1, {"checkpoint-2"}),  # the last model alone
        (0, set()),  # the last model in the place of the newest state
    ],
)
def test_checkpoint_full_disk_at_last_step_drops_older_states(tmp_path, monkeypatch, room, left):
    """Only so many states fit on the disk, and with none of them the model does."""
    import drivers.training.checkpointer as program

    save, folder, states = program.save_checkpoint, tmp_path / "run", f"checkpoint-*/{STATE_TENSORS}"

    def save_if_it_fits(content, target):
        if content.values["step"] == 3 and len(list(folder.glob(states))) + (content.shards is not None) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(content, target)

    monkeypatch.setattr(program, "save_checkpoint", save_if_it_fits)
    monkeypatch.setattr(program, "is_full", lambda *_: True)
    whole, *_ = run_grpo(folder, n_grpo_steps=3, publish=True)
    assert {path.parent.name for path in folder.glob(states)} == left
    model = safetensors.torch.load_file(folder / "final_model/model.safetensors")
    assert model.keys() == safetensors.torch.load_file(folder / "checkpoint-3/model.safetensors").keys()
    assert sum(weight.numel() for weight in model.values()) == whole.numel()
    assert find_damage(folder / "final_model") is None


@pytest.mark.medium
def test_checkpoint_failure_warns_once_while_it_lasts(tmp_path, monkeypatch):
    """The disk is not full, so nothing is deleted and nothing is tried again before the next checkpoint."""
    import drivers.training.checkpointer as program

    save = program.save_checkpoint

    def fail(content, target):
        tried.append(content.values["step"])
        if content.values["step"] in (2, 3, 5):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return save(content, target)

    said, tried = [], []
    monkeypatch.setattr(program, "save_checkpoint", fail)
    monkeypatch.setattr(runs.Run, "warn", lambda _, text: said.append(text))
    run_grpo(tmp_path / "run")
    warnings = [text for text in said if "cannot be written" in text]
    assert [re.search(r"checkpoint-\d", text)[0] for text in warnings] == ["checkpoint-2", "checkpoint-5"]
    assert "its last checkpoint is checkpoint-1" in warnings[0]
    assert tried == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "n_states", "n_models"),
    [
        ({"n_grpo_steps": 1}, 1, 0),
        ({"n_grpo_steps": 9}, 3, 6),  # the newest two, and one that is being written
        ({"n_grpo_steps": 9, "checkpoint_steps": 4}, 3, 0),
        ({"n_grpo_steps": 9, "keep_checkpoints": 1}, 3, 0),
        ({"n_grpo_steps": 9, "keep_checkpoints": 4}, 3, 3),
        ({"n_grpo_steps": 9, "kl_coef": 0.1, "kl_reference_steps": 1}, 3, 6),  # each state with the reference
    ],
)
def test_check_disk_warns_or_refuses_before_run(tmp_path, monkeypatch, changes, n_states, n_models):
    from drivers.training import disk

    policy, config = make_tiny_parts().policy, make_tiny_config(**{"checkpoint_steps": 1} | changes)
    n_parameters, free = sum(p.numel() for p in policy.parameters()), []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    state, model = (16 if "kl_reference_steps" in changes else 12) * n_parameters, 4 * n_parameters
    for free[:] in ([n_states * (state + model) + n_models * model], [10**15]):
        assert disk.check_disk(config, policy, tmp_path, step=0) is None
    free[:] = [n_states * (state + model) + n_models * model - 1]
    if n_states > 1:
        assert "--keep-checkpoints 1" in disk.check_disk(config, policy, tmp_path, step=0)
    free[:] = [state + model - 1]
    with pytest.raises(UsageError, match=r"--save-dir .*: a checkpoint takes .* GiB are free; free some space"):
        disk.check_disk(config, policy, tmp_path, step=0)


@pytest.mark.medium
def test_resume_damaged_checkpoint_repeats_steps_exactly(tmp_path):
    """The repeated steps give the same bits."""
    folder = tmp_path / "run"
    whole = run_grpo(folder)
    (shard,) = (folder / "checkpoint-6" / STATE_TENSORS).iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    checkpoint = find_checkpoint(folder)
    assert checkpoint.name == "checkpoint-5"
    again = run_grpo(folder, checkpoint)
    assert_same_state(again, whole)
    assert (folder / "superseded-checkpoint-6").exists()


def save_state(config):
    return json.loads(json.dumps(TrainingState(config, make_tiny_parts().policy).values()))


def restore_state(config, values):
    state = TrainingState(config, make_tiny_parts().policy)
    assert state.tensors()  # created, so that a resume can fill them
    state.restore(values)
    return state


def make_pending_rollouts(config):
    parts = make_tiny_parts()
    completions = parts.engine.generate([parts.questions[0].prompt_token_ids], config.sampling, seed=0)
    scores = [{"reward": 1.0}] * len(completions)
    return StepRollouts(completions, scores, torch.ones(len(completions)), None, {"rollout_entropy": 1.0}).to_json()


ADAPTIVE = {"entropy_target": 6.0, "entropy_coef": 0.01}


@pytest.mark.parametrize(
    ("before", "changed", "message"),
    [
        ({}, {"seed": 1}, r"--seed 1: cannot be changed when resuming .the checkpoint has 0.: the random state"),
        (
            ADAPTIVE,
            {"entropy_coef": 0.02},
            r"--entropy-coef 0.02: cannot be changed when resuming .the checkpoint has 0.01.: the coefficient",
        ),
        (
            {},
            {"group_size": 4, "ahead": True},
            r"--group-size 4: cannot be changed when resuming .the checkpoint has 8.: the next rollouts",
        ),
        (
            {},
            {"sampling_temperature": 0.7, "ahead": True},
            r"--sampling-temperature 0.7: cannot be changed when resuming",
        ),
        (
            {},
            {"advantage": "remax", "ahead": True},
            r"--advantage remax: cannot be changed when resuming .the checkpoint has group.",
        ),
    ],
)
def test_resume_changed_setting_without_effect_raises_usage_error(before, changed, message):
    changed = dict(changed)
    values = save_state(make_tiny_config(**before))
    if changed.pop("ahead", False):
        values["pending"] = make_pending_rollouts(make_tiny_config())
    settings = make_tiny_config(**before | changed)
    with pytest.raises(UsageError, match=message):
        restore_state(settings, values)
    del values["settings"]  # an older checkpoint has no settings
    restore_state(settings, values)


def test_resume_changed_setting_takes_effect():
    """All settings of a step that is still to be sampled may change."""
    restore_state(make_tiny_config(group_size=4, advantage="remax"), save_state(make_tiny_config()))
    values = save_state(make_tiny_config()) | {"pending": make_pending_rollouts(make_tiny_config())}
    restore_state(make_tiny_config(advantage="leave_one_out"), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_state_restored_from_json_goes_on_alike(dtype):
    """The next questions, the next order of groups, the next update and everything that is remembered are the same."""
    config = make_tiny_config(entropy_target=2.0, entropy_coef=0.01)
    policies = [make_tiny_parts(seed).policy.to(dtype) for seed in (0, 3)]
    one, other = states = [TrainingState(config, policy) for policy in policies]
    for state, n_updates in ((one, 2), (other, 1)):
        for number in range(n_updates):
            for parameter in state.optimizer._masters:
                parameter.grad.fill_(0.25 + number)
            state.optimizer.clip_gradient(1e9)
            state.finish_update(5.0 + number, apply=True)
    one.step, one.accuracies = 7, {0: 0.25, 5: 0.5}
    one.bonus.adapt(1.0)
    one.collapse.first_tokens, one.collapse.n_steps = 3.5, 2
    one.draw.random()
    torch.randperm(9, generator=one.shuffle)
    completion = make_completion([1, 2], [3], [-0.5])
    one.pending = StepRollouts([completion], [{"reward": None}], torch.tensor([math.nan]), None, {"reward": 1.0})
    one.snapshot()
    values = json.loads(json.dumps(one.values()))
    for name, tensor in other.tensors().items():
        tensor.copy_(one.tensors()[name])
    other.restore(values)
    assert torch.equal(*map(flatten_weights, policies))
    assert (other.step, other.accuracies, list(other.grad_norms)) == (7, {0: 0.25, 5: 0.5}, [5.0, 6.0])
    assert other.collapse == one.collapse != state.collapse.__class__()
    assert other.bonus.value == one.bonus.value == pytest.approx(0.015)
    assert (other.optimizer.n_updates, other.is_at_snapshot) == (2, True)
    assert other.pending.completions == [completion]
    assert other.pending.rewards.isnan().all()
    assert other.draw.random() == one.draw.random()
    assert torch.equal(*(torch.randperm(9, generator=state.shuffle) for state in states))
    for state in states:
        for parameter in state.optimizer._masters:
            parameter.grad.fill_(-0.5)
        state.optimizer.clip_gradient(1e9)
        state.finish_update(1.0, apply=True)
    assert one.optimizer.scaler_state() == other.optimizer.scaler_state()
    assert not one.is_at_snapshot
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    assert torch.equal(*map(flatten_weights, policies))


@pytest.mark.parametrize("is_resumed", [True, False])
def test_run_begin_keeps_log_lines_up_to_the_checkpoint(tmp_path, monkeypatch, is_resumed):
    config, opened = make_tiny_config(), []
    state = TrainingState(config, make_tiny_parts().policy)
    monkeypatch.setattr("drivers.training.run.read_state_values", lambda _: state.values() | {"step": 7})
    monkeypatch.setattr("drivers.training.run.read_tensors", lambda *_: None)
    monkeypatch.setattr("drivers.training.run.RunLog", lambda *_, after, **_others: opened.append(after))
    run = Run(config, tmp_path, None, Display(1, quiet=True), tmp_path / "checkpoint-7" if is_resumed else None)
    run.begin(state)
    assert opened == [7 if is_resumed else -1]
    assert run.step == (7 if is_resumed else 0)
    assert next(run.steps()) == run.step + 1
    assert run.is_first_step(run.step + 1)


@pytest.mark.parametrize(
    ("before", "after", "applied"),
    [
        ({"entropy_coef": 0.01}, {"entropy_coef": 0.05}, 0.05),
        ({"entropy_coef": 0.01}, {"entropy_coef": 0.0}, 0.0),
        ({"entropy_coef": 0.01}, ADAPTIVE | {"entropy_coef": 0.05}, 0.05),
        (ADAPTIVE, {"entropy_coef": 0.05}, 0.05),
        (ADAPTIVE, ADAPTIVE | {"entropy_target": 5.0}, 0.3),
    ],
)
def test_resume_entropy_coefficient_is_given_or_adapted(before, after, applied):
    values = save_state(make_tiny_config(**before)) | ({"entropy_coef": 0.3} if before is ADAPTIVE else {})
    assert restore_state(make_tiny_config(**after), values).bonus.value == applied


def test_resume_other_questions_raise_usage_error():
    questions = make_letter_questions(make_tiny_parts().tokenizer)
    values = save_state(make_tiny_config()) | {"data": fingerprint(questions)}
    validate_resume(make_tiny_config(), values, fingerprint(questions[::-1]))
    example = questions[0].example
    others = {
        "fewer": questions[1:],
        "answer": [replace(questions[0], example=replace(example, answer="b")), *questions[1:]],
        "prompt": [replace(questions[0], packed_prompt=(1, 2)), *questions[1:]],
    }
    for other in others.values():
        with pytest.raises(UsageError, match=r"--data-path .*, --prompt-path .*: the prompts or answers differ"):
            validate_resume(make_tiny_config(), values, fingerprint(other))
    validate_resume(make_tiny_config(), save_state(make_tiny_config()), fingerprint(questions))  # an older checkpoint


def call_in_fork(act):
    """Call a function in a fork of this process, which then waits to be killed. Return its id and the success."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        end_process_after(120)
        try:
            act()
            os.write(writer, b"1")
        except BaseException:
            os.write(writer, b"0")
        time.sleep(1000)
        os._exit(0)
    return pid, os.read(reader, 1) == b"1"


def kill_fork(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_run_lock_admits_one_process(tmp_path):
    """A requeued job must not take the folder from a running one; a killed process holds no lock."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        (folder / name).touch()
    config = make_tiny_config(resume="auto", save_dir=str(folder))
    pid, held = call_in_fork(lambda: acquire_run_lock("--resume", folder))
    try:
        assert held
        holder = rf"process {pid} on {re.escape(socket.gethostname())}"
        refused = f"--save-dir .*run: {holder} is training in this folder; stop it"
        with pytest.raises(UsageError, match=refused):
            open_run_folder(config, print)
        with pytest.raises(UsageError, match=r"--resume .*run: process"):
            open_run_folder(make_tiny_config(resume=str(folder)), print)
    finally:
        kill_fork(pid)
    assert open_run_folder(config, print) == (folder, None)
    release_run_lock(folder)
    pid, held = call_in_fork(lambda: acquire_run_lock("--resume", folder))
    kill_fork(pid)
    assert held


def test_run_lock_is_left_out_where_the_file_system_has_none(tmp_path, monkeypatch):
    """A file in its place would outlive a killed process and refuse the next one."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    acquire_run_lock("--resume", tmp_path)
    pid, held = call_in_fork(lambda: acquire_run_lock("--resume", tmp_path))
    kill_fork(pid)
    assert held


def test_run_lock_is_released_at_end(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    acquire_run_lock("--save-dir", folder)
    run_grpo(folder, n_grpo_steps=1)
    pid, held = call_in_fork(lambda: acquire_run_lock("--resume", folder))
    kill_fork(pid)
    assert held


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_resume_with_vllm_is_bit_identical(tmp_path, monkeypatch):
    """A new engine, with the weights of the checkpoint, gives equal log lines, completions and weights."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    Path("mine.py").write_text("def mine(response, truth):\n    return response.count('a') + 0.1 * len(response)\n")
    flags = (
        "--recipe quickstart --model-path tiny --reward mine.py:mine --engine vllm --dtype float32 "
        "--rollout-batch-size 16 --group-size 4 --train-batch-size 8 --sampling-max-tokens 12 --n-val-examples 8 "
        "--eval-steps 2 --checkpoint-steps 1 --learning-rate 1e-3 --wandb-project None"
    )
    program.main([*flags.split(), "--n-grpo-steps", "4", "--save-dir", "whole"])
    program.main([*flags.split(), "--n-grpo-steps", "2", "--save-dir", "again"])
    program.main(["--resume", "again", "--n-grpo-steps", "4"])
    whole, again = (tmp_path / name for name in ("whole", "again"))
    assert [row["step"] for row in read_logged_numbers(whole) if row["phase"] == "train"] == [1, 2, 3, 4]
    assert read_logged_numbers(again) == read_logged_numbers(whole)
    assert (again / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()
    for pattern in ("model.safetensors", f"{STATE_TENSORS}/*.safetensors"):
        (file, other) = (next((one / "checkpoint-4").glob(pattern)) for one in (again, whole))
        found, expected = safetensors.torch.load_file(file), safetensors.torch.load_file(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    first, last = (safetensors.torch.load_file(whole / f"checkpoint-{n}/model.safetensors") for n in (2, 4))
    assert not all(torch.equal(tensor, last[key]) for key, tensor in first.items())


@pytest.mark.slow
def test_train_resume_other_data_exits_before_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    lines = (ROOT / "data/wordadd/train.jsonl").read_text().splitlines()
    for name, first in (("a", 0), ("b", 1)):
        Path(name).write_text("\n".join(lines[first : first + 20]) + "\n")
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype float32 --n-grpo-steps 1 --rollout-batch-size 8 "
        "--group-size 4 --train-batch-size 8 --sampling-max-tokens 4 --n-val-examples 4 --checkpoint-steps 1 "
        "--wandb-project None --data-path a --save-dir out"
    )
    program.main(flags.split())
    monkeypatch.setattr("drivers.training.setup.load_models", None)
    with pytest.raises(SystemExit, match="2"):
        program.main(["--resume", "out", "--n-grpo-steps", "2", "--data-path", "b"])
    assert "--data-path b, --prompt-path" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program.main(["--resume", "out", "--n-grpo-steps", "2", "--seed", "5"])
    assert "--seed 5: cannot be changed when resuming (the checkpoint has 0)" in capsys.readouterr().err


def test_free_name_repeated_stop_gets_suffix(tmp_path):
    from drivers.common.display import Display

    run = Run(make_tiny_config(**SIX_STEPS), tmp_path, make_tiny_parts().tokenizer, Display(1, quiet=True))
    names = []
    for _ in range(3):
        names.append(run.checkpointer.free_name("checkpoint-2-stopped"))
        (tmp_path / names[-1]).mkdir()
    assert names == ["checkpoint-2-stopped", "checkpoint-2-stopped-2", "checkpoint-2-stopped-3"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\r"])
def test_run_log_any_text_is_read_back(tmp_path, character):
    """JSON keeps characters in a string at which Python ends a line."""
    row = {"phase": "eval", "step": 1, "text": f"one{character}two", "accuracy": 0.5, "accuracy_stderr": 0.1}
    log = RunLog(tmp_path, make_tiny_config())
    log.log("eval", 1, row)
    log.log_completions("eval", 1, [row])
    log.close()
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "completions.jsonl")}
    RunLog(tmp_path, make_tiny_config(), after=1).close()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert read_metrics(tmp_path)["eval"][0]["text"] == row["text"]


def test_run_log_is_truncated_to_checkpoint(tmp_path):
    """Later rows are removed, and so is an incomplete last line."""
    lines = [{"phase": "train", "step": step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"phase": "tr')
    (tmp_path / "completions.jsonl").write_text(text)
    RunLog(tmp_path, make_tiny_config(), after=2).close()
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1, 2]


@pytest.mark.slow
def test_resume_after_random_kills_is_bit_identical():
    """A separate process forks runs: a few here, hundreds in `make nightly`."""
    command = [sys.executable, "-m", "tests.nightly.kills", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all equal" in done.stdout
