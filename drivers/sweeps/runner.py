"""Run the planned runs of a sweep."""

import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from drivers.common.signals import terminate_as_interrupt
from drivers.sweeps.plan import Planned

PATIENCE_S = 120.0
"""For a run that is told to stop: it writes a checkpoint first."""


STOPPED = 130
"""Exit status of a run that was told to stop."""


# --- running it ------------------------------------------------------------------------------------------------------
class Runner:
    """Starts runs, one per device at a time, and tells what they say of their steps."""

    def __init__(self, planned: Sequence[Planned], devices: Sequence[str]) -> None:
        self.planned, self.devices = planned, devices or (None,)
        self.status: dict[str, int] = {}
        """Exit status by name, of the runs that have ended."""
        self._waiting = deque(planned)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def run(self) -> None:
        """All of them. Ctrl-C and SIGTERM are handed to those that are running, which keep what they have made."""
        with ThreadPoolExecutor(len(self.devices)) as threads, terminate_as_interrupt():
            working = [threads.submit(self._work, device) for device in self.devices]
            try:
                for one in working:
                    one.result()
            except BaseException:
                self._stop()
                raise

    def _work(self, device: str | None) -> None:
        while True:
            with self._lock:
                if self._is_stopped or not self._waiting:
                    return
                one = self._waiting.popleft()
                number = len(self.planned) - len(self._waiting)
                where = f" on device {device}" if device else ""
                print(f"[{number}/{len(self.planned)}] {one.name}{where}: {shlex.join(one.command[1:])}", flush=True)
                one.folder.parent.mkdir(parents=True, exist_ok=True)
                process = subprocess.Popen(
                    one.command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                    start_new_session=True,  # a Ctrl-C comes to it from here, once
                )
                self._running.add(process)
            last = self._follow(one, process)
            with self._lock:
                self._running.discard(process)
                # Whom the signal met before it could answer, or did not, has the status of a signal.
                status = STOPPED if self._is_stopped and process.returncode < 0 else process.returncode
                self.status[one.name] = status
            if status not in (0, STOPPED):
                print(f"  {one.name}: failed with exit status {status}: {last}", flush=True)

    def _follow(self, one: Planned, process: "subprocess.Popen[str]") -> str:
        """Until it ends: what it says goes to a file beside its folder, steps to the screen. Returns the last line."""
        last = ""
        assert process.stdout is not None
        with process, Path(f"{one.folder}.log").open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                last = line.strip() or last
                if line.startswith(("step ", "eval at", "Done", "Nothing is left", "Going on", "warning")):
                    print(f"  {one.name}: {line.rstrip()}", flush=True)
        return last

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()  # not Ctrl-C, which whoever was started in the background ignores
        for process in running:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
