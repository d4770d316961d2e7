"""Several ways of doing one thing, each in its own process, asked in turn.

A benchmark is a module with a function `build(way, **options)`. It returns the calls to time, by the name of their
case, and a function that checks them and returns facts to show beside the times. `measure` runs that module in one
process per way and asks one process at a time, in an order drawn anew in each round, so that no way finds caches, an
allocator or a compiler as another way left them, and noise of the machine comes to all alike.

As a program, this module is one such process.
"""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import gc
import importlib
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "trl", "verl", "liger-kernel", "cut-cross-entropy", "transformers")
MIB = 1 << 20


@dataclass
class Result:
    """Time and memory of one way for one case; memory is in bytes above those before the first call."""

    first: float  # seconds of the first call: compilation, imports at call time, new pages
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # in a call, its gradients included
    held: list[int] = field(default_factory=list)  # after it, with all gradients freed

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, method="inclusive")
        return low, high

    @property
    def peak(self) -> int:
        return max(self.peaks)

    @property
    def kept(self) -> float:
        return statistics.median(self.held)


@dataclass
class Measured:
    results: dict[str, Result]  # by case
    facts: dict


def measure(
    module: str, ways: list[str], options: dict, *, rounds: int, warmups: int = 1, block: float = 0.0, seed: int = 0
) -> dict[str, Measured]:
    """Time all cases of all ways; `block` is how many seconds of calls make one measurement.

    Ways that cannot be built or fail in their first call are left out, each with a line that says why.
    """
    workers = {}
    try:
        for way in ways:
            worker = _Worker(module, way, options)
            try:
                first = worker.ask({"first": block})
            except RuntimeError as error:
                worker.close()
                print(f"left out: {way} ({error})", file=sys.stderr, flush=True)
            else:
                workers[way] = worker
                worker.results = {case: Result(seconds) for case, seconds in first.items()}
        draw = random.Random(seed)
        for round_ in range(-warmups, rounds):
            for case in dict.fromkeys(case for worker in workers.values() for case in worker.results):
                asked = [worker for worker in workers.values() if case in worker.results]
                for worker in draw.sample(asked, len(asked)):
                    answer = worker.ask({"case": case})
                    if round_ >= 0:
                        result = worker.results[case]
                        result.seconds.append(answer["seconds"])
                        result.peaks.append(answer["peak"])
                        result.held.append(answer["kept"])
        return {way: Measured(worker.results, worker.ask({"check": True})) for way, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


class _Worker:
    def __init__(self, module: str, way: str, options: dict):
        self.results: dict[str, Result] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks._harness", module, way, json.dumps(options)],
            cwd=ROOT,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        self.process.communicate()


def _serve(module: str, way: str, options: dict) -> None:
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    timed = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if timed is None:
                timed = _Timed(module, way, options)
            if "first" in request:
                answer = timed.first(request["first"])
            elif "case" in request:
                answer = timed.measure(request["case"])
            else:
                answer = timed.check()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
    gc.unfreeze()  # some libraries complain of what is left at the end


class _Timed:
    """The calls of one way, in this process."""

    def __init__(self, module: str, way: str, options: dict):
        self.calls, self.check = importlib.import_module(module).build(way, **options)
        self.memory = _CudaMemory if options.get("device") == "cuda" else _ProcessMemory
        self.repeats: dict[str, int] = {}

    def first(self, block: float) -> dict[str, float]:
        gc.collect()
        self.before = self.memory.held()
        seconds = {case: self._time(call) for case, call in self.calls.items()}
        for case, call in self.calls.items():
            self.repeats[case] = max(1, math.ceil(block / self._time(call))) if block else 1
        # The modules of a large library take the collector half a second a time.
        gc.collect()
        gc.freeze()
        return seconds

    def measure(self, case: str) -> dict[str, float]:
        call, repeats = self.calls[case], self.repeats[case]
        gc.collect()
        self.memory.reset_peak()
        seconds = self._time(call, repeats) / repeats
        peak = self.memory.peak()
        gc.collect()
        return {"seconds": seconds, "peak": peak - self.before, "kept": self.memory.held() - self.before}

    def _time(self, call, repeats: int = 1) -> float:
        self.memory.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        self.memory.wait()
        return time.perf_counter() - begin


class _CudaMemory:
    reset_peak = staticmethod(torch.cuda.reset_peak_memory_stats)
    peak = staticmethod(torch.cuda.max_memory_allocated)
    held = staticmethod(torch.cuda.memory_allocated)
    wait = staticmethod(torch.cuda.synchronize)


class _ProcessMemory:
    """Resident memory as the kernel reports it; without /proc, only the peak since the process began."""

    STATUS = Path("/proc/self/status")

    @staticmethod
    def reset_peak() -> None:
        if _ProcessMemory.STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def peak() -> int:
        return _ProcessMemory._read("VmHWM")

    @staticmethod
    def held() -> int:
        return _ProcessMemory._read("VmRSS")

    @staticmethod
    def wait() -> None:
        pass

    @staticmethod
    def _read(key: str) -> int:
        if not _ProcessMemory.STATUS.exists():
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return 1024 * int(_ProcessMemory.STATUS.read_text().split(f"{key}:")[1].split()[0])


def describe(device: str, *facts: str) -> str:
    """The line above a table: machine, versions, and what else the numbers depend on."""
    processor = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device == "cuda" else processor
    return "; ".join([machine, ", ".join(_versions()), *facts]) + "."


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def make_table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def digits(number: float) -> str:
    """Three significant digits, without an exponent where there is room."""
    if number == 0 or 1e-3 <= abs(number) < 1000:
        return f"{number:#.3g}".rstrip(".")
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.1e}"


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
