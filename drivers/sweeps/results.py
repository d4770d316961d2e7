"""Collect the results of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from drivers.common.atomic_files import write_json, write_text
from drivers.reports.logged_run import LoggedRun
from drivers.reports.page import write_report
from drivers.sweeps.plan import Planned
from drivers.sweeps.runner import STOPPED


# --- what came of it -------------------------------------------------------------------------------------------------
def results_of(one: Planned, status: int | None) -> dict[str, Any]:
    """A run in numbers; those of a run that has not come so far are left out."""
    row: dict[str, Any] = {"label": one.variant.label, "seed": one.seed, "folder": one.folder.name}
    row |= {"program": one.variant.program, "flags": one.variant.flags}
    is_failed = status not in (None, 0, STOPPED)
    row["state"] = "finished" if (one.folder / "final_model").exists() else "failed" if is_failed else "not finished"
    if not (one.folder / "metrics.jsonl").is_file():
        return row
    run = LoggedRun(one.folder, one.name)
    if run.accuracies:
        last, best = max(run.accuracies), max(run.accuracies, key=lambda step: run.accuracies[step].value)
        row |= {
            f"accuracy{end}": value for end, value in zip(("", "_low", "_high"), run.accuracies[last], strict=True)
        }
        row |= {"step": last, "best_accuracy": run.accuracies[best].value, "best_step": best}
        row |= {"accuracy_before": run.accuracies[0].value} if 0 in run.accuracies else {}
    for name in ("reward", "rollout_entropy", "response_tokens"):
        found = run.values("train", name)
        row |= {name: found[max(found)]} if found else {}
    if run.steps[0]:
        row["minutes"] = run.wall_clock / 60
    return row


COLUMNS = {
    "accuracy_before": ("before", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "best_accuracy": ("best", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
    "rollout_entropy": ("entropy", "{:.3f}"),
    "response_tokens": ("tokens", "{:.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, a line per label: means over seeds; accuracy with its range over seeds, or its 95 % interval.

    Of the seeds of a label those that came farthest: before the last step another number is another thing.
    """
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["run", *(COLUMNS[name][0] for name in shown), "state"]]
    for label in dict.fromkeys(row["label"] for row in rows):
        same = [row for row in rows if row["label"] == label]
        farthest = max((row["step"] for row in same if "step" in row), default=None)
        compared = [row for row in same if row.get("step") == farthest]
        cells = [label]
        for name in shown:
            values = [row[name] for row in compared if name in row]
            cell = COLUMNS[name][1].format(fmean(values)) if values else ""
            if name == "accuracy" and values:
                ends = values if len(values) > 1 else [compared[0]["accuracy_low"], compared[0]["accuracy_high"]]
                cell += f" ({min(ends):.3f} to {max(ends):.3f})" if None not in ends else ""
            cells.append(cell)
        states = [row["state"] for row in same]
        cells.append(", ".join(f"{states.count(s)} {s}" if len(same) > 1 else s for s in dict.fromkeys(states)))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write_results(folder: Path, planned: Sequence[Planned], status: Mapping[str, int]) -> str:
    """summary.md, summary.json and the report of all runs that have logged anything; returns the table."""
    rows = [results_of(one, status.get(one.name)) for one in planned]
    write_json(folder / "summary.json", rows)
    table = table_of(rows)
    write_text(folder / "summary.md", table + "\n")
    logged = [one.folder for one, row in zip(planned, rows, strict=True) if "minutes" in row]
    if logged:
        write_report(logged, folder, folder.name)
    return table
