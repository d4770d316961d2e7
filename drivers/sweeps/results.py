"""Collect the results of a sweep."""

import sys
from collections.abc import Mapping, Sequence
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
    result: dict[str, Any] = {
        "label": run.variant.label,
        "seed": run.seed,
        "folder": run.name,
        "program": run.variant.program,
        "flags": run.variant.flags,
        "state": _state(run.folder, status),
    }
    if not (run.folder / "metrics.jsonl").is_file():
        return Result(**result)
    logged = LoggedRun(run.folder, run.name)
    for name in ("reward", "rollout_entropy", "response_tokens"):
        values = logged.values("train", name)
        result[name] = values[max(values)] if values else None
    minutes = logged.wall_clock / 60 if logged.steps[0] else None
    return Result(**result, **_accuracies(logged), minutes=minutes)


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
COLUMNS = {
    "before": ("accuracy_before", ".3f"),
    "accuracy": ("accuracy", ".3f"),
    "best": ("best_accuracy", ".3f"),
    "reward": ("reward", ".3f"),
    "entropy": ("rollout_entropy", ".3f"),
    "tokens": ("response_tokens", ".0f"),
    "minutes": ("minutes", ".1f"),
}
"""Columns of the table: title -> the field of which it shows the mean over the compared seeds, and its format."""


def make_table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row per label and a column per number that some run has."""
    titles = [title for title, (name, _) in COLUMNS.items() if _known(results, name)]
    rows = [["run", *titles, "state"]]
    for label in dict.fromkeys(result.label for result in results):
        seeds = [result for result in results if result.label == label]
        # Of the seeds, those with the latest evaluation: numbers of different steps cannot be averaged.
        last_step = max((result.step for result in seeds if result.step is not None), default=None)
        compared = [result for result in seeds if result.step == last_step]
        rows.append([label, *(_cell(title, compared) for title in titles), _count_states(seeds)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _known(results: Sequence[Result], *fields: str) -> list[float]:
    """Return the values of these fields that are known."""
    values = (getattr(result, name) for result in results for name in fields)
    return [value for value in values if value is not None]


def _cell(title: str, compared: Sequence[Result]) -> str:
    field, form = COLUMNS[title]
    values = _known(compared, field)
    if not values:
        return ""
    # The range of the accuracy over seeds, or the 95 % interval of a single seed.
    ends = values if len(compared) > 1 else _known(compared, "accuracy_low", "accuracy_high")
    accuracy_range = f" ({min(ends):.3f} to {max(ends):.3f})" if title == "accuracy" and ends else ""
    return f"{fmean(values):{form}}{accuracy_range}"


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
        try:
            write_report(logged, folder, folder.name)
        except Exception as error:  # the summary is complete without the report
            print(f"warning: {folder}/report.html could not be written ({first_line(error)})", file=sys.stderr)
    return table
