"""Grade in processes that can be killed: hand out chunks of responses, collect grades, replace workers that end."""

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.common.own_functions import check_file
from drivers.grading.loading import BUILT_IN
from drivers.grading.messages import Chunk, Grade, Invalid, Message, Ready, Refused
from drivers.grading.processes import LOADING_S, ForkServer, ForkServerDiedError, Worker, WorkerExit, describe_exit
from drivers.grading.verdicts import Graded, GradeStatus, GradingRequest, make_requests, timeout_verdict
from drivers.grading.worker import GRACE_S, WorkerOptions
from drivers.settings.groups import GradingSettings
from drivers.settings.reward_spec import check_reward, parse_mix
from grpo_core import GroundTruth

MAX_WORKERS = 8
MAX_CHUNK_RESPONSES = 32
MAX_WARNINGS = 3
"""Failures that are printed; all are counted."""


class _Batch:
    """Requests, their verdicts so far, and the chunks that no worker has yet."""

    def __init__(self, requests: Sequence[GradingRequest], chunk_size: int) -> None:
        self.requests = requests
        self.graded: list[Graded | None] = [None] * len(requests)
        indices = list(range(len(requests)))
        self.chunks = deque(indices[start : start + chunk_size] for start in range(0, len(requests), chunk_size))


class GradingPool:
    """A `Grader` of processes that are killed when they hang: no response can stop a run or change another's grade.

    `reward` is a built-in reward, `module:function` or `path/to/file.py:function`; only workers import it. A response
    gets `deadline_s` seconds. Then the kernel ends the worker, even inside a regular expression that never returns to
    Python, and another worker takes its place. Any thread may grade; one batch is graded at a time. `warn` gets the
    first failures. All processes end with this one, however it ends.

    >>> with GradingPool("r1_zero", n_workers=1) as grade:
    ...     [graded.scores["reward"] for graded in grade(["</think> <answer> 4 </answer>"], ["4"])]
    [1.0]
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
        """Start the workers in the background. `n_workers=0` means half of the cores, at most 8."""
        check_reward(reward, mix)
        check_file("--reward", reward)
        self._n_workers = n_workers or max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // 2))
        self._options, self._warn = WorkerOptions(reward, parse_mix(mix), deadline_s), warn
        self._lock = threading.Lock()
        self._is_closed = self._is_async = False
        self._n_warnings = self._n_chunks = 0
        self._start()

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Wait until the reward is loaded; raise a UsageError if it cannot be."""
        with self._lock:
            self._await_ready_worker()

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None = None
    ) -> list[Graded]:
        """Return the verdicts in order. Raise a TrainingAbortedError if the function returns no valid reward."""
        requests = make_requests(responses, ground_truths, questions)
        with self._lock:
            try:
                graded = self._grade(requests)
            except ForkServerDiedError:
                self._check_open()
                self._stop()
                self._start()
                graded = self._grade(requests)
            self._warn_failures(requests, graded)
        return graded

    def close(self) -> None:
        """End all processes. A batch that another thread is grading ends with an error."""
        self._is_closed = True
        self._server.disconnect()
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._server = ForkServer(self._options)
        self._workers = [self._server.start_worker() for _ in range(self._n_workers)]

    def _stop(self) -> None:
        self._server.close()
        for worker in self._workers:
            worker.connection.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the GradingPool is closed")

    def _grade(self, requests: Sequence[GradingRequest]) -> list[Graded]:
        for worker in [worker for worker in self._workers if worker.work]:
            self._replace_worker(worker)  # an interrupt left it with a chunk of an earlier batch
        self._await_ready_worker()
        share = -(-len(requests) // self._n_workers)
        batch = _Batch(requests, max(1, min(MAX_CHUNK_RESPONSES, share if self._is_async else share // 4)))
        while batch.chunks or any(worker.work for worker in self._workers):
            for worker in [worker for worker in self._workers if worker.pid and not worker.work]:
                if batch.chunks:
                    self._send_chunk(worker, batch)
            self._receive(batch)
        return [graded for graded in batch.graded if graded is not None]

    def _await_ready_worker(self) -> None:
        while not any(worker.pid for worker in self._workers):
            self._receive(_Batch([], 1))

    def _receive(self, batch: _Batch) -> None:
        self._check_open()
        for worker, message in self._server.receive(self._workers):
            self._on_message(worker, message, batch)

    def _send_chunk(self, worker: Worker, batch: _Batch) -> None:
        indices = batch.chunks.popleft()
        self._n_chunks += 1
        chunk = Chunk(self._n_chunks, [batch.requests[index] for index in indices])
        try:
            grace = GRACE_S * (2 if self._is_async else 1)
            worker.send_chunk(chunk, indices, self._options.deadline_s + grace)
        except OSError:  # it ended while it was idle
            batch.chunks.appendleft(indices)
            self._replace_worker(worker)

    def _on_message(self, worker: Worker, message: Message | WorkerExit, batch: _Batch) -> None:
        match message:
            case Ready(pid, is_async) if worker.pid is None:
                worker.pid, worker.due, self._is_async = pid, math.inf, is_async
            case Refused(text) if worker.pid is None:
                raise UsageError(text)
            case Invalid(text):
                raise TrainingAbortedError(text)
            case Grade() if message.chunk == worker.chunk_number and message.place in worker.work:
                self._on_grade(worker, message, batch)
            case WorkerExit(is_late):
                self._on_worker_exit(worker, batch, is_late=is_late)
            case _:  # a response controls this worker, or a process that it forked
                self._on_worker_exit(worker, batch, is_late=False)

    def _on_grade(self, worker: Worker, grade: Grade, batch: _Batch) -> None:
        batch.graded[worker.work.pop(grade.place)] = grade.graded
        if grade.is_last:
            self._replace_worker(worker)
            self._return_work(worker, batch)
        elif not worker.work:
            worker.due = math.inf
        elif not self._is_async:
            worker.due = time.monotonic() + self._options.deadline_s + GRACE_S

    def _on_worker_exit(self, worker: Worker, batch: _Batch, *, is_late: bool) -> None:
        self._check_open()
        code = self._replace_worker(worker)
        if worker.pid is None:
            reason = f"not imported within {LOADING_S:g} s" if is_late else f"{describe_exit(code)} during its import"
            raise UsageError(f"--reward {self._options.reward}: {reason}")
        # If several requests ran at once, any of them may have blocked the others: each is graded again alone.
        if worker.work and not (self._is_async and len(worker.work) > 1):
            index = worker.work.pop(next(iter(worker.work)))
            is_timeout = is_late or code == -signal.SIGALRM
            failure = Graded({"reward": None}, GradeStatus.ERROR, describe_exit(code))
            batch.graded[index] = timeout_verdict(self._options.deadline_s) if is_timeout else failure
        self._return_work(worker, batch)

    def _replace_worker(self, worker: Worker) -> int:
        """End a worker and start another; return the exit code."""
        code = self._server.end_worker(worker)
        self._workers[self._workers.index(worker)] = self._server.start_worker()
        self._server.forget_worker(worker)
        return code

    def _return_work(self, worker: Worker, batch: _Batch) -> None:
        """Put the ungraded requests of an ended worker back into the queue."""
        left = list(worker.work.values())
        if self._is_async:
            batch.chunks.extend([index] for index in left)
        elif left:
            batch.chunks.appendleft(left)

    def _warn_failures(self, requests: Sequence[GradingRequest], graded: Sequence[Graded]) -> None:
        for request, verdict in zip(requests, graded, strict=True):
            is_failure = verdict.status in (GradeStatus.TIMEOUT, GradeStatus.ERROR, GradeStatus.NOT_FINITE)
            if is_failure and self._n_warnings < MAX_WARNINGS:
                self._n_warnings += 1
                more = "" if self._n_warnings < MAX_WARNINGS else "; further failures are only counted in the log"
                self._warn(
                    f"--reward {self._options.reward}: {verdict.status} ({verdict.detail}) for the response "
                    f"{request.response[:60]!r}: it is not scored and has no effect on training{more}"
                )


def start_grading(config: GradingSettings, warn: Callable[[str], None]) -> GradingPool:
    """Return the pool that the settings name. A custom reward is loaded before a model is."""
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
