"""Collect the results of a sweep."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from drivers.common.atomic_files import write_json, write_text
from drivers.common.errors import first_line
from drivers.reports.logged_run import LoggedRun
from drivers.reports.page import write_report
from drivers.sweeps.plan import PlannedRun
from drivers.sweeps.runner import STOPPED


@dataclass(frozen=True)
class Result:
    """The outcome of one run: an object of summary.json and a part of a row in summary.md."""

    label: str
    seed: int
    folder: str
    program: str
    flags: dict[str, Any]
    state: str
    """`finished`, `failed` or `not finished`."""
    accuracy: float | None = None
    """Held-out accuracy of the last evaluation."""
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    step: int | None = None
    """Step of the last evaluation."""
    best_accuracy: float | None = None
    best_step: int | None = None
    accuracy_before: float | None = None
    reward: float | None = None
    rollout_entropy: float | None = None
    response_tokens: float | None = None
    minutes: float | None = None
    """Wall-clock time; None before the first step has finished."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields with a value, and the interval whenever there is an accuracy."""
        has_accuracy = self.accuracy is not None
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or (has_accuracy and name in ("accuracy_low", "accuracy_high"))
        }


def read_result(run: PlannedRun, status: int | None) -> Result:
    """Read the results of a run from its folder; `status` is its exit status, None if it did not start."""
    flags = run.variant.flags
    result: dict[str, Any] = {
        "label": run.variant.label,
        "seed": run.seed,
        "folder": run.name,
        "program": run.variant.program,
    }
    state = _state(run.folder, status)
    if not (run.folder / "metrics.jsonl").is_file():
        return Result(**result, flags=flags, state=state)
    logged = LoggedRun(run.folder, run.name)
    last_values: dict[str, Any] = {}
    for name in ("reward", "rollout_entropy", "response_tokens"):
        values = logged.values("train", name)
        if values:
            last_values[name] = values[max(values)]
    minutes = logged.wall_clock / 60 if logged.steps[0] else None
    return Result(**result, flags=flags, state=state, **_accuracies(logged), **last_values, minutes=minutes)


def _state(folder: Path, status: int | None) -> str:
    if (folder / "final_model").exists():
        return "finished"
    return "not finished" if status in (None, 0, STOPPED) else "failed"


def _accuracies(run: LoggedRun) -> dict[str, Any]:
    """Return the fields of a result that come from evaluations."""
    accuracies = run.accuracies
    if not accuracies:
        return {}
    last, best = max(accuracies), max(accuracies, key=lambda step: accuracies[step].value)
    return {
        "accuracy": accuracies[last].value,
        "accuracy_low": accuracies[last].low,
        "accuracy_high": accuracies[last].high,
        "step": last,
        "best_accuracy": accuracies[best].value,
        "best_step": best,
        "accuracy_before": accuracies[0].value if 0 in accuracies else None,
    }


# --- table -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A column of the table: the mean of a number over the compared seeds."""

    title: str
    format: str
    read: Callable[[Result], float | None]


COLUMNS = (
    Column("before", "{:.3f}", lambda result: result.accuracy_before),
    Column("accuracy", "{:.3f}", lambda result: result.accuracy),
    Column("best", "{:.3f}", lambda result: result.best_accuracy),
    Column("reward", "{:.3f}", lambda result: result.reward),
    Column("entropy", "{:.3f}", lambda result: result.rollout_entropy),
    Column("tokens", "{:.0f}", lambda result: result.response_tokens),
    Column("minutes", "{:.1f}", lambda result: result.minutes),
)


def make_table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row per label and a column per number that some run has."""
    columns = [column for column in COLUMNS if any(column.read(result) is not None for result in results)]
    rows = [["run", *(column.title for column in columns), "state"]]
    for label in dict.fromkeys(result.label for result in results):
        seeds = [result for result in results if result.label == label]
        compared = _farthest(seeds)
        cells = [_cell(column, compared) for column in columns]
        rows.append([label, *cells, _count_states(seeds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _farthest(seeds: Sequence[Result]) -> list[Result]:
    """Return the seeds with the latest evaluation, because numbers of different steps cannot be averaged."""
    last_step = max((result.step for result in seeds if result.step is not None), default=None)
    return [result for result in seeds if result.step == last_step]


def _cell(column: Column, compared: Sequence[Result]) -> str:
    values = [value for value in map(column.read, compared) if value is not None]
    if not values:
        return ""
    mean = column.format.format(fmean(values))
    return f"{mean}{_accuracy_range(compared)}" if column.title == "accuracy" else mean


def _accuracy_range(compared: Sequence[Result]) -> str:
    """Return the range of the accuracy over seeds, or the 95 % interval of a single seed."""
    if len(compared) > 1:
        ends = [result.accuracy for result in compared]
    else:
        ends = [compared[0].accuracy_low, compared[0].accuracy_high]
    known = [end for end in ends if end is not None]
    return f" ({min(known):.3f} to {max(known):.3f})" if known else ""


def _count_states(seeds: Sequence[Result]) -> str:
    states = [result.state for result in seeds]
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


# --- files -----------------------------------------------------------------------------------------------------------
def write_results(folder: Path, planned: Sequence[PlannedRun], status: Mapping[str, int]) -> str:
    """Write summary.json, summary.md and the report of all runs that have finished a step; return the table."""
    results = [read_result(run, status.get(run.name)) for run in planned]
    write_json(folder / "summary.json", [result.as_json() for result in results])
    table = make_table(results)
    write_text(folder / "summary.md", table + "\n")
    logged = [run.folder for run, result in zip(planned, results, strict=True) if result.minutes is not None]
    if logged:
        _write_report_or_warn(logged, folder)
    return table


def _write_report_or_warn(runs: Sequence[Path], folder: Path) -> None:
    """Write the report; warn if that fails, because the summary is complete without it."""
    try:
        write_report(runs, folder, folder.name)
    except Exception as error:
        print(f"warning: {folder}/report.html could not be written ({first_line(error)})", file=sys.stderr)
