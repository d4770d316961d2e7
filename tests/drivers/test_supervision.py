"""vLLM in a process of its own: the same samples, and an end to every wait, whoever dies."""

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

import psutil
import pytest
import torch

from drivers import supervise
from drivers.errors import EngineDiedError, UsageError
from drivers.interrupts import terminate_as_interrupt, uninterrupted
from drivers.rollout import Sampling, make_engine
from drivers.run import choose_devices
from drivers.supervise import SupervisedEngine, is_running, within
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
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5.0, lambda: {}["a"])
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(1))
    for lives in ([], [True]):  # dead before it is asked, and while it is waited for
        with pytest.raises(EngineDiedError):
            within(60.0, lambda: time.sleep(1), lambda lives=lives: bool(lives) and lives.pop())


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
        within(seconds, call, lambda: seconds < 1 or bool(lives and lives.pop()), give_up)
    assert events == ["given up", "came out"]


def test_who_asked_and_does_not_come_out_is_left_behind(monkeypatch):
    monkeypatch.setattr(supervise, "_COME_OUT_S", 0.1)
    begin, never = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: never.wait(30))
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
            with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
                within(60, lambda seconds=seconds: never.wait(seconds))
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

    monkeypatch.setenv(supervise.TRAINER, "1")
    monkeypatch.setattr(supervise, "is_running", look)
    monkeypatch.setattr(supervise.os, "kill", lambda *one: (killed.append(one), ended.set()))
    supervise.end_with_trainer(0.01)
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


def test_a_process_that_goes_while_it_is_looked_at_is_gone(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])

    def open_and_lose(*arguments):
        file = open(*arguments)  # noqa: SIM115
        child.kill()
        child.wait()
        return file

    monkeypatch.setattr(supervise, "open", open_and_lose, raising=False)
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
        assert "died when it was to answer 3 prompts" in said[0]
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


SCRIPT = """
    import os, sys, torch
    sys.path.insert(0, {root!r})
    from drivers import environment
    import tests.conftest
    from tests.drivers.test_supervision import LONG, PROMPTS, engine_processes, start
    from tests.tiny import make_tiny_policy
    from pathlib import Path
    if __name__ == "__main__":
        policy = make_tiny_policy(3)
        engine = start(Path({folder!r}), policy)
        engine.load_weights(0)
        print("pids", *(one.pid for one in engine_processes()), flush=True)
        version = 0
        while True:
            version += 1
            {what}
"""


@VLLM
@pytest.mark.parametrize(
    ("number", "what"),
    [
        pytest.param(signal.SIGKILL, "engine.load_weights(version)", id="killed-in-a-push"),
        pytest.param(signal.SIGTERM, "engine.generate(PROMPTS, LONG, seed=version)", id="ended-in-a-generation"),
    ],
)
def test_nothing_outlives_the_trainer(tmp_path, what, number):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=root, folder=str(tmp_path / "model"), what=what))
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        try:
            line = next(line for line in trainer.stdout if line.startswith("pids"))
            pids = [int(pid) for pid in line.split()[1:]]
            assert pids
            time.sleep(0.7)
            shared = shared_memory([trainer.pid, *pids])
            trainer.send_signal(number)
            trainer.wait(60)
            wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        finally:
            trainer.kill()
    wait_until(lambda: not any(os.path.exists(name) for name in shared))


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
