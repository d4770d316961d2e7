"""vLLM in a process of its own: the same samples, and an end to every wait, whoever dies."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from drivers.common.errors import EngineDiedError, UsageError
from drivers.common.signals import defer_signals, terminate_as_interrupt
from drivers.engines import supervision
from drivers.engines.factory import make_engine
from drivers.engines.supervision import SupervisedEngine, call_with_timeout, is_running
from drivers.policy.devices import choose_devices
from drivers.runs.folder import find_checkpoint
from drivers.settings.sampling import Sampling
from tests.drivers.parts import letter_grader, make_run, tiny_config, tiny_parts
from tests.drivers.test_train import weights
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("vllm")]
PROMPTS = ((5, 6, 7, 8), (9, 10), (11, 12, 13))
LONG = Sampling(n=32, max_tokens=400, stop=())


def VLLM(test):
    """Starts vLLM in processes of its own: most of a minute each."""
    return pytest.mark.slow(pytest.mark.vllm(test))


def start(folder, policy, own_process=True, said=None, **options):
    save_tiny(folder)
    return make_engine(
        "vllm",
        model_path=str(folder),
        policy=policy,
        tokenizer=make_tiny_tokenizer(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_model_len=512,
        gpu_memory_utilization=0.5,
        reserved_bytes=0,
        seed=0,
        own_process=own_process,
        say=print if said is None else said.append,
        **options,
    )


def family_of(pid):
    """All that it has started and that has started."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def engine_processes():
    """What this process has started for vLLM, and what that has."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running()
        and child.status() != psutil.STATUS_ZOMBIE
        and not {"resource_tracker", "forkserver"} & set(re.findall(r"\w+", " ".join(child.cmdline())))
    ]


def askers():
    """Threads that wait for an engine's answer."""
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def shared_memory(pids):
    """The files in memory that these processes have open; what others have is their own affair."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split()[-1] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


# Without an engine


def test_an_answer_in_time_is_the_answer_and_an_error_is_raised():
    assert call_with_timeout(5.0, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_with_timeout(5.0, lambda: {}["a"])
    with pytest.raises(TimeoutError):
        call_with_timeout(0.05, lambda: time.sleep(1))
    for lives in ([], [True]):  # dead before it is asked, and while it is waited for
        with pytest.raises(EngineDiedError):
            call_with_timeout(60.0, lambda: time.sleep(1), lambda lives=lives: bool(lives) and lives.pop())


@pytest.mark.parametrize("seconds", [0.05, 60.0], ids=["late", "dead"])
def test_who_asked_comes_out_before_a_failure_is_told(seconds):
    """What it does with the policy's weights, it does before an engine that is started again does."""
    ended, events = threading.Event(), []

    def call():
        ended.wait(30)
        time.sleep(0.3)
        events.append("came out")

    def give_up():
        events.append("given up")
        ended.set()
        raise ValueError("it is dead anyway")

    lives = [True, True]
    with pytest.raises(TimeoutError if seconds < 1 else EngineDiedError):
        call_with_timeout(seconds, call, lambda: seconds < 1 or bool(lives and lives.pop()), give_up)
    assert events == ["given up", "came out"]


def test_who_asked_and_does_not_come_out_is_left_behind(monkeypatch):
    monkeypatch.setattr(supervision, "_COME_OUT_S", 0.1)
    begin, never = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        call_with_timeout(0.05, lambda: never.wait(30))
    assert time.monotonic() - begin < 5
    never.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_engine_that_hangs_in_a_push_does_not_make_a_run_deaf(number):
    """The first signal waits for the push to end, the second for nobody. An answer in time is taken after one."""
    never = threading.Event()

    def send(times):
        for _ in range(times):
            time.sleep(0.1)
            os.kill(os.getpid(), number)

    done = []
    with terminate_as_interrupt():
        for times, seconds in ((1, 0.6), (2, 60)):
            sender = threading.Thread(target=send, args=(times,))
            sender.start()
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt), defer_signals():  # noqa: PT012
                call_with_timeout(60, lambda seconds=seconds: never.wait(seconds))
                done.append("pushed")
            sender.join()
            assert time.monotonic() - begin < 20
    assert done == ["pushed"]
    never.set()


class Mortal:
    """Dies of the first `deaths` requests that it or its successors get."""

    deaths = 0
    started: list["Mortal"]

    def __init__(self):
        type(self).started.append(self)
        self.version, self.closed, self.dead = None, False, False

    def load_weights(self, version):
        if self.dead:
            raise EngineDiedError("it is dead")
        self.version = version

    def generate(self, prompts, sampling, *, seed):
        if type(self).deaths:
            type(self).deaths -= 1
            self.dead = True
            raise EngineDiedError("it died")
        return [(self.version, seed, *prompts)]

    def close(self):
        self.closed = True


@pytest.fixture
def mortal():
    Mortal.deaths, Mortal.started = 0, []
    return Mortal


def test_a_dead_engine_is_started_again_with_the_last_weights_and_asked_again(mortal):
    said = []
    engine = SupervisedEngine(mortal, said.append)
    engine.load_weights(7)
    mortal.deaths = 1
    assert engine.generate([(1,)], LONG, seed=5) == [(7, 5, (1,))]
    assert [one.closed for one in mortal.started] == [True, False]
    assert len(said) == 1
    assert "it died; it is started again" in said[0]


def test_an_engine_that_dies_twice_of_one_request_ends_the_run(mortal):
    engine = SupervisedEngine(mortal, lambda _: None)
    engine.load_weights(0)
    mortal.deaths = 2
    with pytest.raises(EngineDiedError):
        engine.generate([(1,)], LONG, seed=5)


def test_in_the_background_a_death_is_told_and_the_next_push_starts_it_again(mortal):
    """There the policy may be in the middle of an update: its weights are nobody's."""
    engine, errors = SupervisedEngine(mortal, lambda _: None), []
    engine.load_weights(3)
    mortal.deaths = 1

    def ask():
        try:
            engine.generate([(1,)], LONG, seed=5)
        except EngineDiedError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(errors) == len(mortal.started) == 1
    engine.load_weights(4)
    assert len(mortal.started) == 2
    assert engine.generate([(1,)], LONG, seed=5) == [(4, 5, (1,))]


@pytest.mark.parametrize("failure", [UsageError("no room"), EngineDiedError("late"), KeyError("odd"), OSError("full")])
def test_an_engine_that_cannot_be_started_again_ends_the_run_in_one_line(mortal, failure):
    """Whatever it fails of: it was started once, so no flag is wrong."""
    engine = SupervisedEngine(mortal, lambda _: None)
    mortal.deaths = 1

    def start():
        raise failure

    engine._start = start
    with pytest.raises(EngineDiedError, match=f"it died; it cannot be started again: .*{failure.args[0]}"):
        engine.generate([(1,)], LONG, seed=5)
    engine.close()


def test_an_engine_whose_trainer_is_gone_ends_itself_and_nobody_else(monkeypatch):
    """Who adopts orphans is its parent by then. What cannot be looked at is looked at again."""
    killed, looks, ended = [], iter([OSError("no descriptor is left"), True, False]), threading.Event()

    def look(_):
        found = next(looks)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setenv(supervision.TRAINER, "1")
    monkeypatch.setattr(supervision, "is_running", look)
    monkeypatch.setattr(supervision.os, "kill", lambda *one: (killed.append(one), ended.set()))
    supervision.exit_when_trainer_exits(0.01)
    assert ended.wait(10)
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert next(looks, None) is None


@pytest.mark.parametrize(
    ("gpus", "process", "message"),
    [(1, "own", "take turns on cuda:0, in one process"), (2, "shared", "on cuda:1 and the policy on cuda:0 are two")],
)
def test_what_a_process_cannot_be_is_one_clear_line(gpus, process, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=message):
        choose_devices(tiny_config(engine="vllm", rollout_process=process))


def test_a_deadline_that_nobody_keeps_is_one_clear_line(monkeypatch):
    """An engine in the trainer's own process is not waited for."""
    own = {"engine": "vllm", "rollout_process": "own"}
    servers = {"engine": "vllm", "rollout_url": ("http://one:8000",)}
    for settings in (own, servers):
        choose_devices(tiny_config(engine_deadline_s=60.0, policy_device="cpu", **settings))
    for engine in ("hf", "vllm"):
        choose_devices(tiny_config(engine=engine, policy_device="cpu"))
        with pytest.raises(UsageError, match="--engine-deadline-s 60: has no effect"):
            choose_devices(tiny_config(engine_deadline_s=60.0, policy_device="cpu", engine=engine))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    choose_devices(tiny_config(engine_deadline_s=60.0, engine="vllm"))  # on the second GPU
    with pytest.raises(UsageError, match="--engine-deadline-s 60: has no effect"):
        choose_devices(tiny_config(engine_deadline_s=60.0, engine="vllm", rollout_device="cuda:0"))


def test_a_process_is_gone_whoever_has_waited_for_it():
    """`multiprocessing` calls its child alive for ever if another has reaped it: its death would not be noticed."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    assert is_running(child.pid)
    child.kill()
    os.waitpid(child.pid, 0)
    assert child.is_alive()
    assert not is_running(child.pid)
    zombie = subprocess.Popen(["true"])
    wait_until(lambda: not is_running(zombie.pid))
    zombie.wait()


@pytest.mark.vllm
def test_how_an_engine_ended_is_told_as_far_as_it_is_known():
    from drivers.engines.vllm import VLLMEngine

    engine = object.__new__(VLLMEngine)
    told = {}
    for status in (-9, 1, 0, None):
        engine._processes = [SimpleNamespace(exitcode=status)]
        told[status] = engine._exit_reason()
    assert told == {
        -9: "it was ended by SIGKILL",
        1: "its own error stands above (exit status 1)",
        0: "its own error stands above",
        None: "its own error stands above",
    }


def test_a_process_that_goes_while_it_is_looked_at_is_gone(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])

    def open_and_lose(*arguments):
        file = open(*arguments)  # noqa: SIM115
        child.kill()
        child.wait()
        return file

    monkeypatch.setattr(supervision, "open", open_and_lose, raising=False)
    assert not is_running(child.pid)


# With vLLM


@VLLM
def test_an_engine_that_does_not_come_up_is_ended_in_time(tmp_path):
    begin = time.monotonic()
    with pytest.raises(UsageError, match=r"vLLM did not start within 2 s \(--engine-deadline-s\) and was ended"):
        start(tmp_path, make_tiny_policy(3), deadline_s=2.0)
    assert time.monotonic() - begin < 60
    wait_until(lambda: not engine_processes())


@VLLM
def test_an_engine_of_its_own_survives_a_kill_and_a_hang(tmp_path):
    """Killed in the middle of an answer, and stopped without a word: the same samples in the end, nothing orphaned."""
    policy, said = make_tiny_policy(3), []
    engine = start(tmp_path, policy, said=said, deadline_s=60.0)
    try:
        engine.load_weights(0)
        expected = engine.generate(PROMPTS, LONG, seed=1)
        first = engine_processes()
        assert [process.name() for process in first] == ["VLLM::EngineCore"]  # or another would be killed below
        killer = threading.Timer(0.5, lambda: os.kill(first[0].pid, signal.SIGKILL))
        killer.start()
        begin = time.monotonic()
        found = engine.generate(PROMPTS, LONG, seed=1)
        while killer.is_alive() or not said:  # it was faster than the killer
            found = engine.generate(PROMPTS, LONG, seed=1)
        assert found == expected
        assert time.monotonic() - begin < 120
        assert "died when it was to answer 3 prompts; it was ended by SIGKILL" in said[0]
        assert not askers()
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in first))

        second = engine_processes()
        engine._engine._deadline_s = 3.0
        for one in second:
            one.suspend()
        assert engine.generate(PROMPTS, LONG, seed=1) == expected
        assert "did not answer 3 prompts within 3 s" in said[1]
        assert not askers()
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in second))

        for one in engine_processes():
            one.kill()
        engine.load_weights(1)
        assert {c.weight_version for c in engine.generate(PROMPTS, LONG, seed=1)} == {1}
        assert "died when it was to take the weights over" in said[2]
        assert not askers()
    finally:
        engine.close()
    wait_until(lambda: not engine_processes())


PROGRAM = """
    import os, sys, threading, time
    sys.path.insert(0, {root!r})
    from drivers import environment
    import tests.conftest
    if __name__ == "__main__":
        from drivers import train
        from drivers.engines import vllm as vllm_engine
        from tests.drivers.test_supervision import engine_processes, shared_memory

        where, number, *flags = sys.argv[1:]
        owner, name = (vllm_engine.LocalClient, "update_weights") if where == "push" else (vllm_engine.LLM, "generate")
        call, calls = getattr(owner, name), []

        def strike():
            pids = [one.pid for one in engine_processes()]
            print("pids", *pids, flush=True)
            print("shared", *shared_memory([os.getpid(), *pids]), flush=True)
            os.kill(os.getpid(), int(number))

        def struck(*arguments, **named):
            calls.append(1)
            if len(calls) == 4:
                strike()
            return call(*arguments, **named)

        def watch():
            while not any(one.name() == "VLLM::EngineCore" for one in engine_processes()):
                time.sleep(0.05)
            strike()

        if where == "start":
            threading.Thread(target=watch, daemon=True).start()
        else:
            setattr(owner, name, struck)
        train.main(flags)
"""


@VLLM
def test_nothing_outlives_the_program_and_its_last_checkpoint_is_good(tmp_path):
    """train.py, ended in a push, in a generation and while its engine starts; each time it is gone on with."""
    script, out = tmp_path / "program.py", tmp_path / "out"
    script.write_text(textwrap.dedent(PROGRAM).format(root=str(Path(__file__).resolve().parents[2])))
    save_tiny(tmp_path / "tiny")
    flags = (
        "--recipe quickstart --model-path tiny --engine vllm --rollout-process own --dtype float32 "
        "--n-grpo-steps 100000 --rollout-batch-size 8 --group-size 4 --train-batch-size 8 "
        "--gradient-accumulation-steps 2 --sampling-max-tokens 4 --n-val-examples 4 --eval-steps 100000 "
        "--checkpoint-steps 1 --save-dir out --resume auto --wandb-project None"
    )
    ends = [("push", signal.SIGKILL), ("generation", signal.SIGTERM), ("push", signal.SIGINT)]
    last = 0
    for where, number in [*ends, ("start", signal.SIGKILL)]:
        done = subprocess.run(
            [sys.executable, str(script), where, str(int(number)), *flags.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            # A shell's background job is started with SIGINT ignored, and hands that on to its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert done.returncode == (-9 if number == signal.SIGKILL else 130), done.stderr[-4000:]
        told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
        assert told["pids"]
        wait_until(lambda told=told: not any(psutil.pid_exists(int(pid)) for pid in told["pids"]), 90)
        wait_until(lambda told=told: not any(os.path.exists(name) for name in told["shared"]))
        newest = find_checkpoint(out)
        step = json.loads((newest / "trainer_state.json").read_text())["step"]
        assert step > last or where == "start"
        last = step
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(row["step"] for row in rows if row["phase"] == "train") == list(range(1, last + 1))


@VLLM
def test_two_processes_take_the_steps_of_one(tmp_path):
    """The same seed and data: the same samples, and the same weights after some updates."""
    from drivers.train import train

    ends = []
    for own_process in (False, True):
        config = tiny_config(engine="vllm", n_grpo_steps=3, learning_rate=1e-3, eval_steps=2)
        parts = tiny_parts()
        folder = tmp_path / str(own_process)
        engine = start(folder / "model", parts.policy, own_process)
        run = make_run(config, folder / "run", parts.tokenizer)
        try:
            train(config, parts.policy, engine, letter_grader, parts.questions, parts.questions, run)
        finally:
            run.finish()
            engine.close()
        ends.append(weights(parts.policy))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], weights(tiny_parts().policy))
