"""The trainer's side of the grading processes: the fork server and its workers."""

import json
import math
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from drivers.common.errors import TrainingAbortedError
from drivers.grading.messages import Chunk, Message, decode_message, encode_chunk
from drivers.grading.worker import WorkerOptions

LOADING_S = 300.0
"""Longest import of a custom reward."""
STUCK_S = 30.0
"""Longest wait for an idle worker to read its chunk, or for a worker to finish a message."""
MAX_MESSAGE_BYTES = 1 << 20
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; from drivers.grading.fork_server import fork_server_main; "
    "fork_server_main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
)


class ForkServerDiedError(TrainingAbortedError):
    """The process that starts workers has exited. Its last output on stderr says why."""

    def __init__(self) -> None:
        super().__init__("the process that starts graders has exited; see its last output above")


@dataclass(frozen=True)
class WorkerExit:
    """A worker that has ended, or sent what no worker sends, or (`is_late`) did not answer in time."""

    is_late: bool


class Worker:
    """A grading process, as the trainer sees it."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number, self.connection = number, connection
        self.pid: int | None = None
        """Set once the reward is loaded."""
        self.chunk_number = 0
        self.work: dict[int, int] = {}
        """Requests of its chunk that are not graded yet: position in the chunk -> position in the batch."""
        self.due = time.monotonic() + LOADING_S

    def send_chunk(self, chunk: Chunk, indices: list[int], deadline_s: float) -> None:
        """Send a chunk; raise an OSError if the worker has ended."""
        self.chunk_number, self.work = chunk.number, dict(enumerate(indices))
        self.due = time.monotonic() + deadline_s
        self.connection.send_bytes(encode_chunk(chunk))


class ForkServer:
    """The process that forks workers; it starts at construction and imports in the background."""

    def __init__(self, options: WorkerOptions) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _limit_waits(self._control, LOADING_S)  # it does not answer while it imports
        with theirs:
            arguments = (str(theirs.fileno()), json.dumps(asdict(options)), str(os.getpid()), *sys.path)
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # on Ctrl-C, the trainer decides what happens
                env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            )
        self._selector = selectors.DefaultSelector()
        self._n_started = 0

    def start_worker(self) -> Worker:
        """Fork a worker."""
        ours, theirs = socket.socketpair()
        _limit_waits(ours, STUCK_S)
        self._n_started += 1
        with theirs:
            try:
                socket.send_fds(self._control, [b"%d" % self._n_started], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise ForkServerDiedError from error
        worker = Worker(self._n_started, Connection(ours.detach()))
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def end_worker(self, worker: Worker) -> int:
        """Kill a worker if it still runs, and return its exit code."""
        try:
            self._control.send(b"%d" % worker.number)
            code = None
            while code is None:  # an answer may be left over from a batch that was interrupted
                number, reported = map(int, self._control.recv(64).split())
                code = reported if number == worker.number else None
        except (OSError, ValueError) as error:
            raise ForkServerDiedError from error
        return code

    def forget_worker(self, worker: Worker) -> None:
        """Close the connection to an ended worker."""
        self._selector.unregister(worker.connection)
        worker.connection.close()

    def receive(self, workers: list[Worker]) -> Iterator[tuple[Worker, Message | WorkerExit]]:
        """Yield messages and exits, as soon as there is one or a worker is late."""
        due = min(worker.due for worker in workers)
        timeout = None if due == math.inf else max(0.0, due - time.monotonic())
        readable = [key.data for key, _ in self._selector.select(timeout)]
        for worker in list(workers):
            if worker in readable:
                try:
                    message = decode_message(worker.connection.recv_bytes(MAX_MESSAGE_BYTES))
                except (EOFError, OSError):
                    message = None
                yield worker, message or WorkerExit(is_late=False)
            elif time.monotonic() > worker.due:
                yield worker, WorkerExit(is_late=True)

    def disconnect(self) -> None:
        """Make every wait for the server return; another thread may be in one."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the server, which ends its workers."""
        self._control.close()
        self.process.terminate()  # while it is importing; afterwards the closed control socket ends it
        try:
            self.process.wait(STUCK_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._selector.close()


def describe_exit(code: int) -> str:
    """Return an exit code of a process in words."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        return f"its process ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process ended by signal {-code}"


def _limit_waits(connection: socket.socket, seconds: float) -> None:
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))
