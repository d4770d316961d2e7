"""Grades of responses: verdicts that tell what is wrong from what could not be graded, made by killable processes."""

import json
import math
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, get_args

from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.grading.loading import BUILT_IN
from drivers.grading.verdicts import LARGEST, Graded, GradingRequest, Why, side_by_side, timeout_verdict
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.reward_spec import check_file, check_reward, parse_mix
from grpo_core import GroundTruth

# --- the pool --------------------------------------------------------------------------------------------------------
GRACE_S = 1.0
"""A worker ends itself at the deadline; it is ended from outside so much later."""


LOADING_S = 300.0
"""For the import of a reward of the user's own."""


STUCK_S = 30.0
"""For a worker that has nothing to do to read its work, or to end a message that it began."""


MAX_WORKERS = 8


MAX_CHUNK_RESPONSES = 32


MAX_MESSAGE_BYTES = 1 << 20
"""Of a message from a worker."""


N_TOLD = 3
"""Failures that are told; all are counted."""


_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; from drivers.grading.worker import fork_server_main; "
    "fork_server_main(int(sys.argv[1]), sys.argv[2])"
)


class ForkServerDiedError(TrainingAbortedError):
    """What starts and ends workers has ended."""

    def __init__(self) -> None:
        super().__init__("the process that starts graders has ended; what it said last stands above")


class _Worker:
    """A process that grades, as this one sees it."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number, self.connection = number, connection
        self.pid: int | None = None
        """Once its reward is loaded."""
        self.work: dict[int, int] = {}
        """Of the chunk that it has, what is not graded yet: places in the chunk, and in the batch."""
        self.due = time.monotonic() + LOADING_S


class _Batch:
    """What is to be graded, and how far that is."""

    def __init__(self, pairs: Sequence[GradingRequest], size: int) -> None:
        self.pairs = pairs
        self.graded: list[Graded | None] = [None] * len(pairs)
        self.chunks = deque(list(range(len(pairs)))[start : start + size] for start in range(0, len(pairs), size))


class GradingPool:
    """A `Grader` of processes that are ended when they hang: no response can stop a run or spoil another's grade.

    `reward` is a built-in one, or `module:function` or `path/to/file.py:function`, imported in the workers alone. A
    response gets `deadline_s` seconds; then the kernel ends the worker, even in a regular expression that never
    returns to Python, and another takes its place. Any thread may grade; one batch at a time is worked on. `warn` is
    told the first failures.

    The workers are forked by a process that has everything imported, so that a new one takes milliseconds. Their
    answers are JSON: what a hostile response makes of a worker stays there. All of them end with this process,
    whatever ends it.
    """

    def __init__(
        self,
        reward: str,
        mix: Sequence[str] = (),
        *,
        n_workers: int = 0,
        deadline_s: float = 10.0,
        warn: Callable[[str], None] = print,
    ) -> None:
        """Workers start in the background. `n_workers`: 0 for half of the cores, at most 8."""
        check_reward(reward, mix)
        check_file(reward)
        self._n_workers = n_workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // 2))
        self._reward, self._deadline_s, self._warn = reward, deadline_s, warn
        self._settings = json.dumps(
            {"reward": reward, "mix": parse_mix(mix), "deadline_s": deadline_s, "trainer": os.getpid()}
        )
        self._lock = threading.Lock()
        self._is_closed = self._is_async = False
        self._n_told = self._n_started = 0
        self._start()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def load(self) -> None:
        """Wait until the reward is known to load; a UsageError where it does not."""
        with self._lock:
            self._await_one()

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None = None
    ) -> list[Graded]:
        """Grades in order. An UnsoundRunError where the reward function returns what is no reward."""
        pairs = side_by_side(responses, ground_truths, questions)
        with self._lock:
            try:
                graded = self._grade(pairs)
            except ForkServerDiedError:
                self._check_open()
                self._abandon()
                self._start()
                graded = self._grade(pairs)
            self._tell(pairs, graded)
        return graded

    def close(self) -> None:
        """End all processes. A batch that another thread is grading ends with an error."""
        self._is_closed = True
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # not closed: another thread may wait for it
        with self._lock:
            self._abandon()

    # What starts workers, and ends them.

    def _start(self) -> None:
        """A nursery, and the workers that it will fork as soon as it has imported what they need."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _end_waits(self._control, LOADING_S)  # while it imports, it answers nobody
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, str(theirs.fileno()), self._settings, *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # On Ctrl-C it is the trainer that decides what happens.
                process_group=0,
                env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            )
        self._heard = selectors.DefaultSelector()
        self._workers = [self._spawn_worker() for _ in range(self._n_workers)]

    def _abandon(self) -> None:
        """The nursery, which takes the workers with it."""
        self._control.close()
        self._nursery.terminate()  # while it is still importing; later it is closed `control` that ends it
        try:
            self._nursery.wait(STUCK_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        self._heard.close()
        for worker in self._workers:
            worker.connection.close()

    def _spawn_worker(self) -> _Worker:
        ours, theirs = socket.socketpair()
        _end_waits(ours, STUCK_S)
        self._n_started += 1
        with theirs:
            try:
                socket.send_fds(self._control, [b"%d" % self._n_started], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise ForkServerDiedError from error
        worker = _Worker(self._n_started, Connection(ours.detach()))
        self._heard.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: _Worker) -> int:
        """End a worker, if it has not ended, and start another; the exit code."""
        try:
            self._control.send(b"%d" % worker.number)
            code = None
            while code is None:  # an answer may be left over from a batch that was interrupted
                number, found = map(int, self._control.recv(64).split())
                code = found if number == worker.number else None
        except (OSError, ValueError) as error:
            raise ForkServerDiedError from error
        self._workers[self._workers.index(worker)] = self._spawn_worker()
        self._heard.unregister(worker.connection)
        worker.connection.close()
        return code

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the GradingPool is closed")

    # A batch.

    def _grade(self, pairs: Sequence[GradingRequest]) -> list[Graded]:
        for worker in [worker for worker in self._workers if worker.work]:
            self._replace(worker)  # of a batch that was interrupted: nobody waits for its grades
        self._await_one()
        share = -(-len(pairs) // self._n_workers)
        batch = _Batch(pairs, max(1, min(MAX_CHUNK_RESPONSES, share if self._is_async else share // 4)))
        while batch.chunks or any(worker.work for worker in self._workers):
            for worker in [worker for worker in self._workers if worker.pid and not worker.work]:
                if batch.chunks:
                    self._hand_out(worker, batch)
            for worker, message in self._listen():
                self._take(worker, message, batch)
        return [graded for graded in batch.graded if graded is not None]

    def _await_one(self) -> None:
        while not any(worker.pid for worker in self._workers):
            for worker, message in self._listen():
                self._take(worker, message, _Batch([], 1))

    def _hand_out(self, worker: _Worker, batch: _Batch) -> None:
        """The next chunk to a worker that has none."""
        chunk = batch.chunks.popleft()
        worker.work = dict(enumerate(chunk))
        worker.due = time.monotonic() + self._deadline_s + GRACE_S * (2 if self._is_async else 1)
        try:
            worker.connection.send_bytes(json.dumps([batch.pairs[index] for index in chunk]).encode())
        except OSError:  # it ended while it had nothing to do
            batch.chunks.appendleft(chunk)
            self._replace(worker)

    def _listen(self) -> Iterator[tuple[_Worker, list[Any] | Literal["ended", "late"]]]:
        """What workers have to say, as soon as one has, or is late."""
        self._check_open()
        due = min(worker.due for worker in self._workers)
        timeout = None if due == math.inf else max(0.0, due - time.monotonic())
        heard = [key.data for key, _ in self._heard.select(timeout)]
        for worker in list(self._workers):
            if worker in heard:
                try:
                    yield worker, json.loads(worker.connection.recv_bytes(MAX_MESSAGE_BYTES))
                except (EOFError, OSError, ValueError, RecursionError):
                    yield worker, "ended"
            elif time.monotonic() > worker.due:
                yield worker, "late"

    def _take(self, worker: _Worker, message: object, batch: _Batch) -> None:
        """Act on a message of a worker."""
        match message:
            case ["ready", int(pid), bool(is_async)] if worker.pid is None:
                worker.pid, worker.due, self._is_async = pid, math.inf, is_async
            case ["refused", str(text)] if worker.pid is None:
                raise UsageError(text)
            case ["unsound", str(text)]:
                raise TrainingAbortedError(text)
            case ["graded" | "last" as kind, int(place), dict(scores), str(why), str(detail)] if (
                place in worker.work and _is_verdict(scores, why)
            ):
                batch.graded[worker.work.pop(place)] = Graded(scores, why, detail)  # type: ignore[arg-type]
                if kind == "last":  # it has no memory left for another
                    self._replace(worker)
                    self._put_back(worker, batch)
                elif not worker.work:
                    worker.due = math.inf
                elif not self._is_async:
                    worker.due = time.monotonic() + self._deadline_s + GRACE_S
            case _:
                self._on_worker_exit(worker, batch, is_late=message == "late")

    def _on_worker_exit(self, worker: _Worker, batch: _Batch, *, is_late: bool) -> None:
        """Replace a worker that ended or is late. What it worked on gets that for a verdict."""
        self._check_open()
        code = self._replace(worker)
        how = f"its process ended with exit code {code}" if code >= 0 else f"its process ended by {_signal_name(code)}"
        if worker.pid is None:
            how = f"not imported within {LOADING_S:g} s" if is_late else f"{how} as it was imported"
            raise UsageError(f"--reward {self._reward}: {how}")
        # Which one of several that are graded at once has blocked all of them shows when each is graded alone.
        if worker.work and not (self._is_async and len(worker.work) > 1):
            index = worker.work.pop(next(iter(worker.work)))
            timed_out = is_late or code == -signal.SIGALRM
            batch.graded[index] = (
                timeout_verdict(self._deadline_s) if timed_out else Graded({"reward": None}, "error", how)
            )
        self._put_back(worker, batch)

    def _put_back(self, worker: _Worker, batch: _Batch) -> None:
        """What a worker leaves behind that is not its fault."""
        left = list(worker.work.values())
        if self._is_async:
            batch.chunks.extend([index] for index in left)
        elif left:
            batch.chunks.appendleft(left)

    def _tell(self, pairs: Sequence[GradingRequest], graded: Sequence[Graded]) -> None:
        for (response, *_), verdict in zip(pairs, graded, strict=True):
            if verdict.why in ("timeout", "error", "not_finite") and self._n_told < N_TOLD:
                self._n_told += 1
                more = "" if self._n_told < N_TOLD else "; others are not told any more, but counted in the log"
                self._warn(
                    f"--reward {self._reward}: {verdict.why} ({verdict.detail}) for the response {response[:60]!r}: "
                    f"it is not scored, and nothing is learned from it{more}"
                )


def _end_waits(way: socket.socket, seconds: float) -> None:
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        way.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))


def _is_verdict(scores: dict[str, Any], why: str) -> bool:
    """Whether that is what a worker of ours would send, and not somebody in its name."""
    numbers = [value for value in scores.values() if value is not None]
    return (
        "reward" in scores
        and why in get_args(Why)
        and all(isinstance(value, float) and abs(value) <= LARGEST for value in numbers)
    )


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def start_grading(config: EvaluateConfig | GrpoConfig, warn: Callable[[str], None]) -> GradingPool:
    """The pool that the settings name. A reward of the user's own is known to load: no model need be loaded before."""
    pool = GradingPool(
        config.reward,
        config.reward_mix,
        n_workers=config.grader_workers,
        deadline_s=config.grader_deadline_s,
        warn=warn,
    )
    if config.reward not in BUILT_IN:
        try:
            pool.load()
        except BaseException:
            pool.close()
            raise
    return pool
