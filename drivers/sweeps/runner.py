"""Run the planned runs of a sweep."""

import os
import shlex
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from drivers.common.signals import terminate_as_interrupt
from drivers.sweeps.plan import PlannedRun

STOP_TIMEOUT_S = 120.0
"""Seconds for a stopped run to save its checkpoint before it is killed."""
STOPPED = 130
"""Exit status of a run that was stopped by a signal."""
PRINTED_STARTS = ("step ", "eval at", "Done", "Resuming", "warning")
"""Starts of the output lines that the sweep prints; the log of a run has all lines."""


class Runner:
    """A pool of threads that starts the runs, each of them on a free device."""

    def __init__(self, planned: Sequence[PlannedRun], devices: Sequence[str]) -> None:
        self.planned = planned
        self.status: dict[str, int] = {}
        """Exit statuses of the runs that have ended, by name."""
        self._n_workers = max(1, len(devices))
        self._free_devices: SimpleQueue[str | None] = SimpleQueue()
        for device in devices or (None,):
            self._free_devices.put(device)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def run(self) -> None:
        """Run all. On Ctrl-C or SIGTERM, stop the running ones, which save a checkpoint first."""
        with ThreadPoolExecutor(self._n_workers) as threads, terminate_as_interrupt():
            futures = [threads.submit(self._run_one, number, run) for number, run in enumerate(self.planned, 1)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def _run_one(self, number: int, run: PlannedRun) -> None:
        device = self._free_devices.get()
        try:
            process = self._start(number, run, device)
            if process is None:
                return
            last_line = _follow(run, process)
            with self._lock:
                self._running.discard(process)
                was_killed = self._is_stopped and process.returncode < 0  # stopped before it handled the signal
                status = STOPPED if was_killed else process.returncode
                self.status[run.name] = status
            if status not in (0, STOPPED):
                print(f"  {run.name}: failed with exit status {status}: {last_line}", flush=True)
        finally:
            self._free_devices.put(device)

    def _start(self, number: int, run: PlannedRun, device: str | None) -> "subprocess.Popen[str] | None":
        """Start a run, or return None if the sweep has been stopped."""
        with self._lock:
            if self._is_stopped:
                return None
            place = f" on device {device}" if device else ""
            print(f"[{number}/{len(self.planned)}] {run.name}{place}: {shlex.join(run.command[1:])}", flush=True)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            process = subprocess.Popen(
                run.command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                start_new_session=True,  # so that Ctrl-C reaches it only once, from _stop
            )
            self._running.add(process)
            return process

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()  # not SIGINT, which a process started in the background ignores
        for process in running:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _follow(run: PlannedRun, process: "subprocess.Popen[str]") -> str:
    """Log the output of a run until it ends, print the lines of its steps, and return the last line."""
    assert process.stdout is not None
    last_line = ""
    with process, Path(f"{run.folder}.log").open("a", encoding="utf-8") as log:
        for line in process.stdout:
            log.write(line)
            log.flush()
            last_line = line.strip() or last_line
            if line.startswith(PRINTED_STARTS) or "is already complete" in line:
                print(f"  {run.name}: {line.rstrip()}", flush=True)
    return last_line
