"""Ctrl-C, SIGTERM and SIGHUP."""

import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from drivers import train
from drivers.common.signals import StepSignals, allow_second_signal, defer_signals, terminate_as_interrupt
from drivers.runs.folder import find_checkpoint
from drivers.training import update as update_step
from tests.drivers.helpers.forked import ForkedProgram
from tests.drivers.helpers.processes import wait_until
from tests.drivers.helpers.runs import assert_same_state, read_logged_numbers, read_rows, run_grpo
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_defer_signals_signal_waits_for_block(number):
    done = []

    def update():
        with defer_signals():
            os.kill(os.getpid(), number)
            done.append("the rest of the update")
        done.append("never")

    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        update()
    assert done == ["the rest of the update"]


def test_defer_signals_nested_waits_for_outer_block():
    done = []

    def save():
        with defer_signals():
            with defer_signals():
                os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest of the save")

    with pytest.raises(KeyboardInterrupt):
        save()
    assert done == ["the rest of the save"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_terminate_as_interrupt_ignored_signal_stays_ignored(number):
    """A shell ignores it for a background job, and nohup ignores SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with terminate_as_interrupt(), defer_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_defer_signals_restores_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with terminate_as_interrupt(), defer_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_step_signals_first_waits_for_release_and_second_interrupts():
    said, done = [], []
    held = StepSignals(lambda: said.append("stopping"))
    before = signal.getsignal(signal.SIGINT)
    held.release()  # nothing is held, and nothing has arrived
    held.hold()
    held.hold()
    os.kill(os.getpid(), signal.SIGINT)
    done.append("the rest of the step")
    with pytest.raises(KeyboardInterrupt):
        held.release()
    assert (said, done) == (["stopping"], ["the rest of the step"])
    assert signal.getsignal(signal.SIGINT) is before

    held.hold()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert held.discard()
    assert not held.discard()
    assert signal.getsignal(signal.SIGINT) is before


def test_step_signals_second_waits_for_inner_block():
    """A push or a save inside the step is not interrupted, unless it waits for an engine that does not answer."""
    done = []
    held = StepSignals(lambda: None)
    held.hold()

    def save():
        with defer_signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest of the save")

    def push():
        with defer_signals(), allow_second_signal():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("never")

    try:
        for call in (save, push):
            with pytest.raises(KeyboardInterrupt):
                call()
    finally:
        held.discard()
    assert done == ["the rest of the save"]


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_between_updates_finishes_step_and_run_resumes(tmp_path, monkeypatch, number):
    """No update is lost, and the resumed run equals one without interruption."""
    settings = {"train_batch_size": 16, "n_grpo_steps": 3, "eval_steps": 100}
    *whole, _ = run_grpo(tmp_path / "whole", **settings)
    updates, original = [], update_step.accumulate_gradients

    def interrupted(*arguments, **named):
        updates.append(1)
        if len(updates) == 4:  # the second update of the second step
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    monkeypatch.setattr(update_step, "accumulate_gradients", interrupted)
    with terminate_as_interrupt(), pytest.raises(KeyboardInterrupt):
        run_grpo(tmp_path / "run", **settings)
    assert len(updates) == 4
    assert [row["step"] for row in read_rows(tmp_path / "run", "train")] == [1, 2]
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint == tmp_path / "run/checkpoint-2"
    *again, _ = run_grpo(tmp_path / "run", checkpoint, **settings)
    assert_same_state(again, whole)
    assert read_logged_numbers(tmp_path / "run") == read_logged_numbers(tmp_path / "whole")


def test_defer_signals_other_thread_is_unaffected():
    seen = []

    def work():
        with defer_signals():
            seen.append("ran")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["ran"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_interrupted_saves_checkpoint_of_last_step(tmp_path, number):
    save_tiny(tmp_path / "tiny")
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype float32 --n-grpo-steps 100000 "
        "--rollout-batch-size 8 --group-size 4 --train-batch-size 8 --gradient-accumulation-steps 2 "
        "--sampling-max-tokens 4 --n-val-examples 4 --eval-steps 100000 --checkpoint-steps 100000 "
        "--save-dir out --wandb-project None"
    )
    program = ForkedProgram(train.main, flags.split(), output=tmp_path / "said", folder=tmp_path)
    try:
        wait_until(lambda: re.search(r"^step +3/100000", program.output, flags=re.MULTILINE), 120)
        os.kill(program.process.pid, number)
        assert program.wait(60) == 130, program.output
    finally:
        program.process.kill()
    assert "Traceback" not in program.output
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    step = json.loads((folder / "trainer_state.json").read_text())["step"]
    assert step >= 3
    assert folder.name == f"checkpoint-{step}-stopped"
    said = " ".join(program.output.split())
    assert re.search(rf"Stopped after step {step}\. To resume: \S*python \S*drivers/train\.py --resume out", said)
    AutoModelForCausalLM.from_pretrained(folder)
    rows = read_rows(tmp_path / "out")
    assert max(row["step"] for row in rows if row["phase"] == "train") == step
    assert (tmp_path / "out/curves.png").exists()
