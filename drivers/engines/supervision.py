"""Supervise an engine outside this process: every wait has a limit, and an engine that dies is started again."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

from drivers.common.errors import EngineDiedError
from drivers.common.signals import allow_second_signal
from drivers.engines.protocol import Completion, RolloutEngine
from drivers.policy.checksums import Checksum
from drivers.settings.sampling import Sampling

T = TypeVar("T")


# vLLM 0.32 keeps waiting for an answer of an engine that was killed, so its process is polled.
_POLL_INTERVAL_S = 0.2
_MAX_UNWIND_S = 10.0
"""Time for the calling thread to finish after its engine was given up."""


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Run `call` in a daemon thread, which does not keep the program alive if `call` never returns."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return answer


def call_with_timeout(
    timeout_s: float,
    call: Callable[[], T],
    is_alive: Callable[[], bool] = lambda: True,
    give_up: Callable[[], None] = lambda: None,
) -> T:
    """Return `call()`; raise TimeoutError after `timeout_s`, or EngineDiedError once the engine is not `is_alive`.

    Before either error, `give_up` must end what the calling thread waits for, and the thread gets some seconds to
    finish: it may be gathering weights, which must end before the next engine gets its push. A second Ctrl-C or
    SIGTERM ends the wait, although a push defers signals.
    """
    if not is_alive():
        raise EngineDiedError("its process has exited")
    answer = in_thread(call, "engine")
    end = time.monotonic() + timeout_s
    with allow_second_signal():
        while not wait([answer], timeout=_POLL_INTERVAL_S).done:
            has_died = not is_alive()
            if has_died or time.monotonic() > end:
                with suppress(Exception):  # an engine that failed may fail to close too
                    give_up()
                wait([answer], _MAX_UNWIND_S)
                raise EngineDiedError("its process has exited") if has_died else TimeoutError
    return answer.result()


class SupervisedEngine:
    """A `RolloutEngine` that is started again when it dies, with the current weights, and asked again.

    Requests carry seeds, so the samples are the same. If one request kills the engine twice, the run ends.
    """

    def __init__(self, start: Callable[[], RolloutEngine], say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._engine = start()
        self._version: int | None = None

    def load_weights(self, version: int) -> None:
        """Push the weights; restart a dead engine."""
        self._version = version
        try:
            self._engine.load_weights(version)
        except EngineDiedError as error:
            self._restart(error)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """Sample; restart a dead engine. In a background thread raise instead: the policy may be half updated."""
        try:
            return self._engine.generate(prompts, sampling, seed=seed)
        except EngineDiedError as error:
            if threading.current_thread() is not threading.main_thread():
                raise
            self._restart(error)
        return self._engine.generate(prompts, sampling, seed=seed)

    def sleep(self) -> None:
        self._engine.sleep()

    def received(self) -> list[dict[str, Checksum]]:
        return self._engine.received()

    def close(self) -> None:
        self._engine.close()

    def _restart(self, error: EngineDiedError) -> None:
        self._say(f"warning: {error}; restarting the engine with the policy's current weights")
        with suppress(Exception):  # a dead engine may fail to close
            self._engine.close()
        try:
            self._engine = self._start()
        except Exception as failure:  # no UsageError: the engine has started once, so the flags are right
            reason = " ".join(str(failure).split())[:600]
            raise EngineDiedError(f"{error}; the engine cannot be restarted: {reason}") from failure
        if self._version is not None:
            self._engine.load_weights(self._version)


TRAINER = "GRPO_TRAINER_PID"
"""Environment variable with the process id of the trainer, for the engine's process."""


def exit_when_trainer_exits(interval_s: float = 1.0) -> None:
    """Kill this process, which is the engine's, once the trainer has exited for any reason.

    It watches the trainer's process id: when a trainer dies while its engine starts, the engine gets another parent.
    """
    trainer = int(os.environ.get(TRAINER, "0"))
    if trainer in (0, os.getpid()):
        return

    def watch() -> None:
        is_trainer_running = True
        while is_trainer_running:
            time.sleep(interval_s)
            with suppress(Exception):  # without a free file descriptor, look again later
                is_trainer_running = is_running(trainer)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="exit-with-trainer").start()


def is_running(pid: int | None) -> bool:
    """Return whether a process runs, even if another thread has waited for it, which `multiprocessing` misses."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # a zombie has an entry too
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it exited before the file was opened, or before it was read
        return False
