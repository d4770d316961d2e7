"""Read logged runs and group them into series."""

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from drivers.common.errors import UsageError

Row = dict[str, Any]


PHASES = ("rollout", "reward", "update", "wait", "push", "check", "evaluate", "save")
NO_DIFFERENCE = ("seed", "save_dir", "resume", "wandb_project", "wandb_run_name")
"""Settings that make no other experiment of a run."""


class LoggedRun:
    """One run, as its folder has it. Whatever is missing or half written there is missing here."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        written = read_json(folder / "config.json")
        self.program = str(written.get("program") or "")
        self.planned = written.get("steps")
        self.settings: Row = _object(written.get("config"))
        self.environment: Row = _object(written.get("environment"))
        self.rows = read_metrics(folder)

    @cached_property
    def completions(self) -> list[Row]:
        return [row for row in read_lines(self.folder / "completions.jsonl") if _is_step(row)]

    def values(self, phase: str, key: str) -> dict[int, float]:
        """By step, where there is one."""
        found = {row["step"]: _number(row.get(key)) for row in self.rows.get(phase, ())}
        return {step: value for step, value in sorted(found.items()) if value is not None}

    def total(self, key: str) -> float:
        """Over the steps."""
        return sum(self.values("train", key).values())

    def speed(self, tokens: str, phase: str) -> float | None:
        """Tokens a second over all steps."""
        seconds = self.total(f"time_{phase}_s")
        return self.total(tokens) / seconds if seconds and self.total(tokens) else None

    @cached_property
    def seconds_of(self) -> dict[int, dict[str, float]]:
        """What the clock was spent on in each step, 0 being the evaluation before the first.

        What was sampled ahead cost no more of it than the waiting for it.
        """
        saving, first = self.values("save", "time_save_s"), self.values("eval", "time_evaluate_s").get(0)
        spent = {} if first is None else {0: {"evaluate": first}}
        for row in sorted(self.rows.get("train", ()), key=lambda row: row["step"]):
            step = row["step"]
            times = {phase: _number(row.get(f"time_{phase}_s")) or 0.0 for phase in PHASES}
            if self.settings.get("async_steps") and step > 1:
                times |= {"rollout": 0.0, "reward": 0.0}
            times["save"] = saving.get(step, 0.0)
            spent[step] = {phase: seconds for phase, seconds in times.items() if seconds}
        return spent

    @cached_property
    def clock(self) -> dict[int, float]:
        """Seconds since the first evaluation began, at the end of each step."""
        at, total = {0: 0.0}, 0.0
        for step, times in self.seconds_of.items():
            total += sum(times.values())
            at[step] = total - times.get("save", 0.0)
        return at

    @cached_property
    def wall_clock(self) -> float:
        return sum(sum(times.values()) for times in self.seconds_of.values())

    @cached_property
    def accuracies(self) -> dict[int, "Estimate"]:
        """Held-out accuracy by step, each with its 95 % interval over questions."""
        rows = {row["step"]: row for row in self.rows.get("eval", ())}
        return {step: _accuracy(value, rows[step]) for step, value in self.values("eval", "accuracy").items()}

    @property
    def steps(self) -> tuple[int, int | None]:
        """Made, and planned if that is known."""
        made = max((row["step"] for row in self.rows.get("train", ())), default=0)
        return made, self.planned if isinstance(self.planned, int) else None

    @cached_property
    def anomalies(self) -> list[tuple[int, int, str]]:
        """First step, last step and text; what stands in one step after the other is one."""
        spans: dict[str, list[tuple[int, int, str]]] = {}
        for row in sorted(self.rows.get("anomaly", ()), key=lambda row: row["step"]):
            kind, step = str(row.get("kind")), row["step"]
            text = str(row.get("text") or f"{kind}: {row.get('value')}, the limit is {row.get('limit')}")
            earlier = spans.setdefault(kind, [])
            if earlier and earlier[-1][1] >= step - 1:
                earlier[-1] = (earlier[-1][0], step, earlier[-1][2])
            else:
                earlier.append((step, step, text))
        return sorted(span for kind in spans.values() for span in kind)


class Estimate(NamedTuple):
    """A number, and what lies about it."""

    value: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Runs that are one experiment."""

    name: str
    runs: list[LoggedRun]


# --- from files ------------------------------------------------------------------------------------------------------
def read_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Of each folder once; one that holds no run is a UsageError."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in resolved:
        if not (folder / "metrics.jsonl").is_file():
            raise UsageError(f"{folder}: is no run's folder; one with a metrics.jsonl is required")
    # As much of each path as tells them apart.
    depths = range(1, max((len(folder.parts) for folder in resolved), default=1) + 1)
    names = next(
        names
        for depth in depths
        if len(set(names := ["/".join(folder.parts[-depth:]) for folder in resolved])) == len(resolved)
    )
    return [LoggedRun(folder, name) for folder, name in zip(resolved, names, strict=True)]


def read_metrics(folder: Path) -> dict[str, list[Row]]:
    """The lines of metrics.jsonl by phase."""
    rows: dict[str, list[Row]] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        if _is_step(row):
            rows.setdefault(str(row.get("phase")), []).append(row)
    return rows


def read_lines(path: Path) -> list[Row]:
    """The objects of a jsonl file. A line that is none is left out: a run that goes on may be writing the last one."""
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: JSON leaves characters in a string that end a line
    except OSError:
        return []
    return [row for line in lines if (row := _parse(line))]


def read_json(path: Path) -> Row:
    """The object in a file; an empty one where there is none."""
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def _parse(text: bytes) -> Row:
    try:
        return _object(json.loads(text.decode("utf-8")))
    except (ValueError, RecursionError):
        return {}


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _is_step(row: Row) -> bool:
    return isinstance(row.get("step"), int) and not isinstance(row["step"], bool)


def is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def _accuracy(value: float, row: Row) -> Estimate:
    """With Wilson's interval; of a reward that leaves [0, 1], with the one that the standard error gives."""
    asked, unscored = _number(row.get("n_examples")) or 0.0, _number(row.get("unscored")) or 0.0
    answered, error = round(asked * (1 - unscored)), _number(row.get("accuracy_stderr"))
    if 0 <= value <= 1 and answered > 0:  # of the values it needs their number and mean alone
        import torch  # here, because sweep.py and report.py answer --help without it

        from grpo_core import estimate_mean_interval

        return Estimate(value, *estimate_mean_interval(torch.full((answered,), value, dtype=torch.float64))[1:])
    return Estimate(value) if error is None else Estimate(value, value - 1.96 * error, value + 1.96 * error)


# --- what is compared ------------------------------------------------------------------------------------------------
def differing_settings(runs: Sequence[LoggedRun]) -> list[str]:
    """Names of the settings in which runs differ that have them: another program has others."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NO_DIFFERENCE)
    values = {name: {_key(run.settings[name]) for run in runs if name in run.settings} for name in names}
    return [name for name, found in values.items() if len(found) > 1]


def group_runs(runs: Sequence[LoggedRun]) -> list[Series]:
    """In the order of their first runs. A run without settings is alone: nobody knows what it is one of."""
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        compared = {name: value for name, value in run.settings.items() if name not in NO_DIFFERENCE}
        groups.setdefault(_key([run.program, compared] if compared else run.name), []).append(run)
    differing = differing_settings(runs)
    return [Series(_name(members, differing, len(groups)), members) for members in groups.values()]


def _name(members: Sequence[LoggedRun], differing: Sequence[str], n_series: int) -> str:
    """By the settings that make the difference if these are few, else by the first folder."""
    own = [f"{name}={show(members[0].settings[name])}" for name in differing if name in members[0].settings]
    name = ", ".join(own) if n_series > 1 and len(differing) <= 2 and own else members[0].name
    return name if len(members) == 1 else f"{name} ({len(members)} runs)"


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def show(value: Any) -> str:
    """A setting, as a person would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


"""What the clock is spent on, by the names of their times."""
