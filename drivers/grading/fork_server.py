"""The process that forks the workers of a `GradingPool` and reports how they end.

It has imported what a reward needs, so a new worker takes milliseconds. It is a child of the trainer and ends with it.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import traceback
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from drivers.grading.worker import WorkerOptions, work

MAX_GENERATIONS = 100
"""Times to look for processes that start another one when they are killed."""
_CHECK_PARENT_S = 1.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def fork_server_main(control: int, settings: str, trainer: int) -> None:
    """Fork a worker per received socket; on request kill one and report its exit code. Kill all workers on exit.

    A message is the number of a worker. With a socket it starts that worker; without, it ends that worker. Processes
    that a worker has detached become children of this process once their parent is gone. They are killed when the
    next worker ends.
    """
    channel = socket.socket(fileno=control)
    options, workers = WorkerOptions(**json.loads(settings)), dict[int, int]()
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer ends this process; a handler is not inherited by exec
        signal.signal(number, lambda *_: None)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()  # so that workers share the memory of imported modules
    try:
        while True:
            if not select.select([channel], [], [], _CHECK_PARENT_S)[0]:
                if os.getppid() != trainer:  # a child of the trainer may still hold the socket open
                    return
                continue
            message, sockets, _, _ = socket.recv_fds(channel, 64, 1)
            if not message:
                return
            worker = int(message)
            if sockets:
                workers[worker] = _fork_worker(channel, sockets[0], options)
            else:
                code = _end_worker(workers.pop(worker)) if worker in workers else 0
                channel.send(b"%d %d" % (worker, code))
                _kill_strays(workers.values())
    except ConnectionError:
        pass
    finally:
        for pid in workers.values():
            _end_worker(pid)
        _kill_strays(())


def _fork_worker(channel: socket.socket, connection: int, options: WorkerOptions) -> int:
    """Fork a worker in its own process group, so that the processes it starts end with it."""
    server = os.getpid()
    pid = os.fork()
    if pid:
        with suppress(OSError):
            os.setpgid(pid, pid)
        os.close(connection)
        return pid
    try:
        channel.close()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == server:
            os.setpgid(0, 0)
            work(Connection(connection), options)
    except (EOFError, OSError):  # the pool has closed the connection
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _end_worker(pid: int) -> int:
    """Kill a worker and its process group; return its exit code, or its own one if it had exited already."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill_strays(workers: Collection[int]) -> None:
    """Kill the children of this process that are not workers; killing one may hand its children to this process."""
    for _ in range(MAX_GENERATIONS):
        files = Path("/proc/self/task").glob("*/children")
        strays = {int(pid) for file in files for pid in file.read_text().split()} - set(workers)
        if not strays:
            return
        for pid in strays:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
