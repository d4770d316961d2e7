"""An engine in a process of its own: each wait has an end, a death is noticed, and nothing is left behind."""

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
from drivers.policy.weights import Checksum
from drivers.settings.sampling import Sampling

T = TypeVar("T")


# vLLM 0.32 waits on for an answer of an engine that was killed: its own watch closes the sockets, and wakes nobody.
_LOOK_EVERY_S = 0.2


_COME_OUT_S = 10.0


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """What `call` gives, in a thread that nobody waits for when the program ends: it may never come out."""
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True, name=name).start()
    return answer


def call_with_timeout(
    seconds: float,
    call: Callable[[], T],
    is_alive: Callable[[], bool] = lambda: True,
    give_up: Callable[[], None] = lambda: None,
) -> T:
    """The answer of `call`; a TimeoutError, or an EngineDiedError as soon as who ought to answer `is_alive` no more.

    Ctrl-C or SIGTERM that a push holds back ends the wait when it comes a second time.

    Before either error, `give_up` is to end what the thread that asked waits for, and it gets some seconds to come
    out: a successor of the engine is pushed the same weights, which that thread may be gathering.
    """
    if not is_alive():
        raise EngineDiedError("its process has ended")
    answer = in_thread(call, "engine")
    end = time.monotonic() + seconds
    with allow_second_signal():
        while not wait([answer], timeout=_LOOK_EVERY_S).done:
            died = not is_alive()
            if died or time.monotonic() > end:
                with suppress(Exception):  # what it fails of is no news of an engine that failed
                    give_up()
                wait([answer], _COME_OUT_S)
                raise EngineDiedError("its process has ended") if died else TimeoutError
    return answer.result()


class SupervisedEngine:
    """A `RolloutEngine` that is started again when it dies, with the weights as they are, and asked again.

    Requests carry their seeds, so that what was lost is sampled again as it would have been. Once for each request:
    an engine that dies of the same request twice ends the run.
    """

    def __init__(self, start: Callable[[], RolloutEngine], say: Callable[[str], None]) -> None:
        self._start, self._say = start, say
        self._engine = start()
        self._version: int | None = None

    def load_weights(self, version: int) -> None:
        """See `RolloutEngine`; a dead engine is started again."""
        self._version = version
        try:
            self._engine.load_weights(version)
        except EngineDiedError as error:
            self._start_again(error)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """See `RolloutEngine`. In the background a death is told: the policy may be in the middle of an update."""
        try:
            return self._engine.generate(prompts, sampling, seed=seed)
        except EngineDiedError as error:
            if threading.current_thread() is not threading.main_thread():
                raise
            self._start_again(error)
        return self._engine.generate(prompts, sampling, seed=seed)

    def sleep(self) -> None:
        self._engine.sleep()

    def received(self) -> list[dict[str, Checksum]]:
        return self._engine.received()

    def close(self) -> None:
        self._engine.close()

    def _start_again(self, error: EngineDiedError) -> None:
        self._say(f"warning: {error}; it is started again, with the policy's weights as they are")
        with suppress(Exception):  # of a dead engine nothing is asked but that it leaves nothing behind
            self._engine.close()
        try:
            self._engine = self._start()
        except Exception as failure:  # which ends the run, whatever it is, and was no mistake in a flag at the start
            reason = " ".join(str(failure).split())[:600]
            raise EngineDiedError(f"{error}; it cannot be started again: {reason}") from failure
        if self._version is not None:
            self._engine.load_weights(self._version)


TRAINER = "GRPO_TRAINER_PID"
"""Environment variable by which a process of the engine knows whose it is."""


def exit_when_trainer_exits(seconds: float = 1.0) -> None:
    """In the engine's process, whose worker is in it too: end it when the trainer is gone, whatever ended that.

    It alone: by then the parent of an engine that was starting is whoever adopts orphans.
    """
    trainer = int(os.environ.get(TRAINER, "0"))
    if trainer in (0, os.getpid()):
        return

    def watch() -> None:
        is_there = True
        while is_there:
            time.sleep(seconds)
            with suppress(Exception):  # what cannot be looked at (no descriptor is left) is looked at again
                is_there = is_running(trainer)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-trainer").start()


def is_running(pid: int | None) -> bool:
    """Whoever has waited for it: `multiprocessing` takes a child that somebody else has waited for to be alive."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # a zombie is there, and dead
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False
