"""vLLM in its own process: the same samples, and an end to every wait if a process dies."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from drivers.common.errors import EngineDiedError, UsageError
from drivers.common.signals import defer_signals, terminate_as_interrupt
from drivers.engines import supervision
from drivers.engines.supervision import SupervisedEngine, call_with_timeout, is_running
from drivers.policy.devices import choose_devices
from drivers.runs.folder import find_checkpoint
from drivers.settings.sampling import Sampling
from drivers.training.components import Components
from tests.drivers.helpers import struck_program
from tests.drivers.helpers.engines import PROMPTS, make_vllm_engine
from tests.drivers.helpers.forked import ForkedProgram
from tests.drivers.helpers.letters import flatten_weights, letter_grader, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import list_engine_processes, list_engine_threads, wait_until
from tests.drivers.helpers.runs import read_rows
from tests.tiny import make_tiny_policy, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations
LONG = Sampling(n=8, max_tokens=200, stop=())


def start_tiny(folder, policy, **options):
    """Start vLLM on the tiny model, in its own process by default."""
    return make_vllm_engine(policy, save_tiny(folder), **({"max_model_len": 512, "own_process": True} | options))


# Without vLLM


@pytest.mark.medium
def test_call_with_timeout_returns_or_raises():
    assert call_with_timeout(5.0, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_with_timeout(5.0, lambda: {}["a"])
    with pytest.raises(TimeoutError):
        call_with_timeout(0.05, lambda: time.sleep(1))
    for lives in ([], [True]):  # dead before the call, and during it
        with pytest.raises(EngineDiedError):
            call_with_timeout(60.0, lambda: time.sleep(1), lambda lives=lives: bool(lives) and lives.pop())


@pytest.mark.medium
@pytest.mark.parametrize("seconds", [0.05, 60.0], ids=["late", "dead"])
def test_call_with_timeout_waits_for_caller_before_raising(seconds):
    """Its work on the policy's weights must end before a restarted engine reads them."""
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


def test_call_with_timeout_abandons_stuck_caller(monkeypatch):
    monkeypatch.setattr(supervision, "_MAX_UNWIND_S", 0.1)
    begin, never = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError):
        call_with_timeout(0.05, lambda: never.wait(30))
    assert time.monotonic() - begin < 5
    never.set()


@pytest.mark.medium
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_hanging_push_second_signal_interrupts(number):
    """The first signal waits for the push; the second interrupts it."""
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


class MortalEngine:
    """An engine that dies at the first `deaths` requests to it or its successors."""

    deaths = 0
    started: list["MortalEngine"]

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
    MortalEngine.deaths, MortalEngine.started = 0, []
    return MortalEngine


def test_supervised_engine_death_restarts_with_last_weights(mortal):
    messages = []
    engine = SupervisedEngine(mortal, messages.append)
    engine.load_weights(7)
    mortal.deaths = 1
    assert engine.generate([(1,)], LONG, seed=5) == [(7, 5, (1,))]
    assert [one.closed for one in mortal.started] == [True, False]
    assert len(messages) == 1
    assert "it died; restarting the engine" in messages[0]


def test_supervised_engine_second_death_raises(mortal):
    engine = SupervisedEngine(mortal, lambda _: None)
    engine.load_weights(0)
    mortal.deaths = 2
    with pytest.raises(EngineDiedError):
        engine.generate([(1,)], LONG, seed=5)


def test_async_engine_crash_raises_and_restarts_on_next_push(mortal):
    """The policy may be in the middle of an update, so its weights cannot be pushed."""
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
def test_supervised_engine_restart_failure_raises_one_line(mortal, failure):
    """The engine started once, so no flag is wrong, whatever the error."""
    engine = SupervisedEngine(mortal, lambda _: None)
    mortal.deaths = 1

    def start():
        raise failure

    engine._start = start
    with pytest.raises(EngineDiedError, match=f"it died; the engine cannot be restarted: .*{failure.args[0]}"):
        engine.generate([(1,)], LONG, seed=5)
    engine.close()


def test_exit_when_trainer_exits_kills_itself_only(monkeypatch):
    """The process that adopts orphans is its parent by then. A check that fails is repeated."""
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
    [(1, "own", "take turns on cuda:0 in one process"), (2, "shared", "on cuda:1 and the policy on cuda:0 need two")],
)
def test_choose_devices_impossible_process_raises_usage_error(gpus, process, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=message):
        choose_devices(make_tiny_config(engine="vllm", rollout_process=process))


def test_engine_deadline_without_effect_raises_usage_error(monkeypatch):
    """An engine in the trainer's own process has no deadline."""
    own = {"engine": "vllm", "rollout_process": "own"}
    servers = {"engine": "vllm", "rollout_url": ("http://one:8000",)}
    for settings in (own, servers):
        choose_devices(make_tiny_config(engine_deadline_s=60.0, policy_device="cpu", **settings))
    for engine in ("hf", "vllm"):
        choose_devices(make_tiny_config(engine=engine, policy_device="cpu"))
        with pytest.raises(UsageError, match="--engine-deadline-s 60: has no effect"):
            choose_devices(make_tiny_config(engine_deadline_s=60.0, policy_device="cpu", engine=engine))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    choose_devices(make_tiny_config(engine_deadline_s=60.0, engine="vllm"))  # on the second GPU
    with pytest.raises(UsageError, match="--engine-deadline-s 60: has no effect"):
        choose_devices(make_tiny_config(engine_deadline_s=60.0, engine="vllm", rollout_device="cuda:0"))


def test_is_running_reaped_or_zombie_is_false():
    """`multiprocessing` reports a child as alive forever if another caller has reaped it."""
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


@pytest.mark.medium
def test_exit_reason_names_signal_or_status():
    from drivers.engines.vllm import VLLMEngine

    engine = object.__new__(VLLMEngine)
    found = {}
    for status in (-9, 1, 0, None):
        engine._processes = [SimpleNamespace(exitcode=status)]
        found[status] = engine._exit_reason()
    assert found == {
        -9: "killed by SIGKILL",
        1: "see its own error above (exit status 1)",
        0: "see its own error above",
        None: "see its own error above",
    }


def test_is_running_process_ending_meanwhile_is_false(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])

    def open_and_lose(*arguments):
        file = open(*arguments)  # noqa: SIM115
        child.kill()
        child.wait()
        return file

    monkeypatch.setattr(supervision, "open", open_and_lose, raising=False)
    assert not is_running(child.pid)


# With vLLM


@pytest.mark.vllm
def test_vllm_slow_start_is_ended_at_deadline(tmp_path):
    begin = time.monotonic()
    with pytest.raises(UsageError, match=r"vLLM did not start within 2 s \(--engine-deadline-s\) and was killed"):
        start_tiny(tmp_path, make_tiny_policy(3), deadline_s=2.0)
    assert time.monotonic() - begin < 60
    wait_until(lambda: not list_engine_processes())


@pytest.mark.vllm
def test_vllm_in_own_process_equals_shared_process(tmp_path):
    """The same seed and data give the same samples and weights."""
    from drivers.train import train

    start, weights = flatten_weights(make_tiny_parts().policy), []
    for name, own_process in (("shared", False), ("own", True)):
        parts = make_tiny_parts()
        engine = start_tiny(tmp_path / f"{name}-model", parts.policy, own_process=own_process, deadline_s=60.0)
        config = make_tiny_config(engine="vllm", n_grpo_steps=3, learning_rate=1e-3, eval_steps=2)
        run = make_run(config, tmp_path / name, parts.tokenizer)
        try:
            train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
        finally:
            run.finish()
            engine.close()
        weights.append(flatten_weights(parts.policy))
    assert torch.equal(*weights)
    assert not torch.equal(start, weights[0])
    wait_until(lambda: not list_engine_processes())


@pytest.mark.vllm
@pytest.mark.usefixtures("forked_engine")
def test_vllm_killed_or_hanging_restarts_with_same_samples(tmp_path):
    """It is killed during an answer and then suspended: the samples stay the same, and no process is left.

    test_ranks.py kills it during a push.
    """
    messages = []
    engine = start_tiny(tmp_path, make_tiny_policy(3), say=messages.append, deadline_s=60.0)
    engine.load_weights(0)
    expected = engine.generate(PROMPTS, LONG, seed=1)
    first = list_engine_processes()
    assert [process.name() for process in first] == ["VLLM::EngineCore"]  # the process that is killed below
    killer = threading.Timer(0.5, lambda: os.kill(first[0].pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    found = engine.generate(PROMPTS, LONG, seed=1)
    while killer.is_alive() or not messages:  # the answer came before the kill
        found = engine.generate(PROMPTS, LONG, seed=1)
    assert found == expected
    assert time.monotonic() - begin < 120
    assert "exited during sampling from 3 prompts: killed by SIGKILL" in messages[0]
    assert not list_engine_threads()
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in first))

    second = list_engine_processes()
    engine._engine._deadline_s = 3.0
    for one in second:
        one.suspend()
    assert engine.generate(PROMPTS, LONG, seed=1) == expected
    assert "did not finish sampling from 3 prompts within 3 s" in messages[1]
    assert not list_engine_threads()
    engine.close()
    wait_until(lambda: not list_engine_processes())


@pytest.mark.vllm
def test_train_killed_leaves_no_process_and_a_good_checkpoint(tmp_path):
    """train.py is ended during a push, a generation and the start of its engine, and resumed each time.

    A Ctrl-C during a push waits for its end, as SIGTERM does: test_hanging_push_second_signal_interrupts.
    """
    out = tmp_path / "out"
    save_tiny(tmp_path / "tiny")
    flags = (
        "--recipe quickstart --model-path tiny --engine vllm --rollout-process own --dtype float32 "
        "--n-grpo-steps 100000 --rollout-batch-size 8 --group-size 4 --train-batch-size 8 "
        "--gradient-accumulation-steps 2 --sampling-max-tokens 4 --n-val-examples 4 --eval-steps 100000 "
        "--checkpoint-steps 1 --save-dir out --resume auto --wandb-project None"
    )
    last = 0
    for where, number in [("push", signal.SIGKILL), ("generation", signal.SIGTERM), ("start", signal.SIGKILL)]:
        said = tmp_path / f"said-{where}-{number.name}"
        program = ForkedProgram(struck_program.main, where, int(number), flags.split(), output=said, folder=tmp_path)
        assert program.wait(300) == (-9 if number == signal.SIGKILL else 130), program.output[-4000:]
        found = {line.split()[0]: line.split()[1:] for line in program.output.splitlines() if line.strip()}
        assert found["pids"]
        wait_until(lambda found=found: not any(psutil.pid_exists(int(pid)) for pid in found["pids"]), 90)
        wait_until(lambda found=found: not any(os.path.exists(name) for name in found["shared"]))
        newest = find_checkpoint(out)
        step = json.loads((newest / "trainer_state.json").read_text())["step"]
        assert step > last or where == "start"
        last = step
    rows = read_rows(out)
    assert sorted(row["step"] for row in rows if row["phase"] == "train") == list(range(1, last + 1))
