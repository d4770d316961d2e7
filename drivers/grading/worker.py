"""The processes of a `GradingPool`: a nursery that forks workers, and a worker, which any answer may hang or end."""

import asyncio
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.grading.loading import is_async, load_reward
from drivers.grading.pool import GRACE_S
from drivers.grading.verdicts import (
    Graded,
    GradingRequest,
    failed,
    grade_one,
    read_return,
    taking_question,
    timeout_verdict,
)

MAX_MEMORY_BYTES = 4 << 30
"""Address space that a worker may take beyond what it has when its reward is loaded."""


MAX_GENERATIONS = 100
"""Of processes that start another one as they are killed."""


_LOOK_EVERY_S = 1.0


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def fork_server_main(control: int, settings: str) -> None:
    """Fork a worker for each socket that comes; end the one that is named, and say how it ended. Last, end them all.

    A message is the number of a worker, with its socket to start it, without to end it. What a worker has started in a
    session of its own is this process's child as soon as its parent is gone, and ends when some worker does.
    """
    ask = socket.socket(fileno=control)
    options, workers = json.loads(settings), dict[int, int]()
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer ends this; a handler is not handed on to what is run
        signal.signal(number, lambda *_: None)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()  # so that workers share what is imported
    try:
        while True:
            if not select.select([ask], [], [], _LOOK_EVERY_S)[0]:
                if os.getppid() != options["trainer"]:  # where a child of the trainer holds the socket open
                    return
                continue
            message, sockets, _, _ = socket.recv_fds(ask, 64, 1)
            if not message:
                return
            worker = int(message)
            if sockets:
                workers[worker] = _fork(ask, sockets[0], options)
            else:
                ask.send(b"%d %d" % (worker, _end(workers.pop(worker)) if worker in workers else 0))
                _end_strays(workers.values())
    except ConnectionError:
        pass
    finally:
        for pid in workers.values():
            _end(pid)
        _end_strays(())


def _fork(ask: socket.socket, connection: int, options: dict[str, Any]) -> int:
    """A worker, in a process group of its own: what it has started ends with it."""
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)
        os.close(connection)
        return pid
    try:
        ask.close()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nursery:
            os.setpgid(0, 0)
            work(Connection(connection), **options)
    except (EOFError, OSError):  # there is nobody to work for
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _end(pid: int) -> int:
    """The exit code of a worker, which is killed if it has none; and what it left behind."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_strays(workers: Collection[int]) -> None:
    """Kill what workers have left to this process. The children of what is killed are the next to come."""
    for _ in range(MAX_GENERATIONS):
        strays = _children() - set(workers)
        if not strays:
            return
        for pid in strays:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _children() -> set[int]:
    """Of this process, as far as the kernel tells."""
    found = set[int]()
    for file in Path("/proc/self/task").glob("*/children"):
        found |= set(map(int, file.read_text().split()))
    return found


def work(connection: Connection, reward: str, mix: dict[str, float], deadline_s: float, trainer: int) -> None:
    """Grade chunks of answers until there are no more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, it is not the trainer that the kernel ends
    try:
        reward_fn = load_reward(reward)
    except UsageError as error:
        _send(connection, "refused", str(error))
        return
    limit_memory()
    name, call, waits = f"--reward {reward}", taking_question(reward_fn), is_async(reward_fn)
    _send(connection, "ready", os.getpid(), waits)
    with asyncio.Runner() as runner:
        while True:
            chunk = json.loads(connection.recv_bytes())
            try:
                if waits:
                    # Each has its own deadline; this one is for what does not give way to the others.
                    _set_alarm(deadline_s + GRACE_S)
                    runner.run(_grade_at_once(connection, chunk, name, call, mix, deadline_s))
                else:
                    for place, asked in enumerate(chunk):
                        _set_alarm(deadline_s)
                        graded = grade_one(name, call, mix, asked)
                        _set_alarm(0)
                        _answer(connection, place, graded)
            except TrainingAbortedError as error:
                _send(connection, "unsound", str(error))
            _set_alarm(0)


async def _grade_at_once(
    connection: Connection,
    chunk: list[Any],
    name: str,
    call: Callable[..., Any],
    mix: dict[str, float],
    deadline_s: float,
) -> None:
    async def grade(place: int, asked: GradingRequest) -> None:
        limit = asyncio.timeout(deadline_s)
        try:
            async with limit:
                returned = await call(*asked)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            graded = timeout_verdict(deadline_s) if limit.expired() else failed(error)
        else:
            graded = read_return(name, mix, asked[0], returned)
        _answer(connection, place, graded)

    await asyncio.gather(*(grade(place, asked) for place, asked in enumerate(chunk)))


def limit_memory() -> None:
    """A response that asks for too much gets a MemoryError."""
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _set_alarm(seconds: float) -> None:
    """At which the kernel ends this process; 0: none. The function may have used the alarm for itself."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _answer(connection: Connection, place: int, graded: Graded) -> None:
    """Tell a grade. One that has used up the memory is the last of this process: the next would suffer for it."""
    spent = graded.why == "error" and graded.detail.startswith("MemoryError")
    _send(connection, "last" if spent else "graded", place, *graded)
    if spent:
        sys.stdout.flush()
        os._exit(0)


def _send(connection: Connection, *message: object) -> None:
    connection.send_bytes(json.dumps(message).encode())
