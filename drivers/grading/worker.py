"""A worker of a `GradingPool`: it loads the reward function and grades. Any response may hang it or end it."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.grading.loading import is_async, load_reward
from drivers.grading.messages import Chunk, Grade, Invalid, Message, Ready, Refused, decode_chunk, encode_message
from drivers.grading.verdicts import (
    Graded,
    GradeStatus,
    GradingRequest,
    bind_question,
    error_verdict,
    grade_one,
    read_return,
    timeout_verdict,
)

MAX_MEMORY_BYTES = 4 << 30
"""Address space that a worker may use beyond that of its imports."""
GRACE_S = 1.0
"""A worker ends itself at the deadline; after this many more seconds it is ended from outside."""


@dataclass(frozen=True)
class WorkerOptions:
    """Settings of a worker."""

    reward: str
    mix: dict[str, float]
    deadline_s: float


class _Sender:
    """The worker's end of the connection to the pool."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._pid = connection, os.getpid()

    def send(self, message: Message) -> None:
        """Send a message. A process that the reward function forked off ends here: it is not the worker."""
        if os.getpid() != self._pid:
            os._exit(1)
        self._connection.send_bytes(encode_message(message))

    def send_grade(self, chunk: Chunk, place: int, graded: Graded) -> None:
        """Send a grade. Exit after a MemoryError: the next response would fail because of this one."""
        is_last = graded.status is GradeStatus.ERROR and graded.detail.startswith("MemoryError")
        self.send(Grade(chunk.number, place, graded, is_last))
        if is_last:
            sys.stdout.flush()
            os._exit(0)


def work(connection: Connection, options: WorkerOptions) -> None:
    """Grade chunks until the connection is closed."""
    sender = _Sender(connection)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel kills a worker and not the trainer
    try:
        reward_fn = load_reward(options.reward)
    except UsageError as error:
        sender.send(Refused(str(error)))
        return
    limit_memory()
    call, runs_async = bind_question(reward_fn), is_async(reward_fn)
    sender.send(Ready(os.getpid(), runs_async))
    with asyncio.Runner() as runner:
        while True:
            chunk = decode_chunk(connection.recv_bytes())
            try:
                if runs_async:
                    # Each request has its own deadline; this alarm is for one that blocks the others.
                    _set_alarm(options.deadline_s + GRACE_S)
                    runner.run(_grade_concurrently(sender, chunk, call, options))
                else:
                    _grade_in_turn(sender, chunk, call, options)
            except TrainingAbortedError as error:
                sender.send(Invalid(str(error)))
            _set_alarm(0)


def _grade_in_turn(
    sender: _Sender, chunk: Chunk, call: Callable[[GradingRequest], Any], options: WorkerOptions
) -> None:
    for place, request in enumerate(chunk.requests):
        _set_alarm(options.deadline_s)
        graded = grade_one(f"--reward {options.reward}", call, options.mix, request)
        _set_alarm(0)
        sender.send_grade(chunk, place, graded)


async def _grade_concurrently(
    sender: _Sender, chunk: Chunk, call: Callable[[GradingRequest], Any], options: WorkerOptions
) -> None:
    async def grade(place: int, request: GradingRequest) -> None:
        limit = asyncio.timeout(options.deadline_s)
        try:
            async with limit:
                returned = await call(request)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            graded = timeout_verdict(options.deadline_s) if limit.expired() else error_verdict(error)
        else:
            graded = read_return(f"--reward {options.reward}", options.mix, request.response, returned)
        sender.send_grade(chunk, place, graded)

    await asyncio.gather(*(grade(place, request) for place, request in enumerate(chunk.requests)))


def limit_memory() -> None:
    """Limit the address space, so that a response that asks for too much gets a MemoryError."""
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _set_alarm(seconds: float) -> None:
    """Let the kernel end this process after `seconds`; 0 clears the alarm. The reward may have changed the handler."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
