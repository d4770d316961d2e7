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
"""Phases of a step, by the names of their times in metrics.jsonl."""
IGNORED_SETTINGS = ("seed", "save_dir", "resume", "wandb_project", "wandb_run_name")
"""Settings that do not make a run a different experiment."""


class Estimate(NamedTuple):
    """A value with its interval, if the interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


class Anomaly(NamedTuple):
    """An anomaly that was logged in consecutive steps."""

    first_step: int
    last_step: int
    text: str


class LoggedRun:
    """One run as its folder records it. Missing or half-written files and lines are skipped."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        written = parse_object(_read_bytes(folder / "config.json"))
        self.program = str(written.get("program") or "")
        self.planned = written.get("steps")
        self.settings: Row = _as_object(written.get("config"))
        self.environment: Row = _as_object(written.get("environment"))
        self.rows = read_metrics(folder)

    @cached_property
    def completions(self) -> list[Row]:
        return [row for row in read_lines(self.folder / "completions.jsonl") if has_step(row)]

    def values(self, phase: str, key: str) -> dict[int, float]:
        """Return a metric by step, without the steps that did not log it."""
        logged = {row["step"]: _number(row.get(key)) for row in self.rows.get(phase, ())}
        return {step: value for step, value in sorted(logged.items()) if value is not None}

    def estimates(self, metric: str) -> dict[int, Estimate]:
        """Return the metric `phase/name` by step, with its interval; only rates of an evaluation have one."""
        phase, _, name = metric.partition("/")
        values = self.values(phase, name)
        if phase != "eval":
            return {step: Estimate(value) for step, value in values.items()}
        rows = {row["step"]: row for row in self.rows.get(phase, ())}
        return {step: _estimate(name, value, rows[step]) for step, value in values.items()}

    def speed(self, tokens: str, phase: str) -> float | None:
        """Return tokens per second over all steps, or None if either was not logged."""
        n_tokens, seconds = (sum(self.values("train", key).values()) for key in (tokens, f"time_{phase}_s"))
        return n_tokens / seconds if n_tokens and seconds else None

    @cached_property
    def seconds_of(self) -> dict[int, dict[str, float]]:
        """Seconds of wall-clock time by step and phase. Step 0 is the evaluation before the first step.

        Sampling ahead runs in the background: only waiting for it takes wall-clock time.
        """
        saving, initial = self.values("save", "time_save_s"), self.values("eval", "time_evaluate_s").get(0)
        seconds_of: dict[int, dict[str, float]] = {} if initial is None else {0: {"evaluate": initial}}
        for row in sorted(self.rows.get("train", ()), key=lambda row: row["step"]):
            step = row["step"]
            times = {phase: _number(row.get(f"time_{phase}_s")) or 0.0 for phase in PHASES}
            if self.settings.get("async_steps") and step > 1:
                times |= {"rollout": 0.0, "reward": 0.0}
            times["save"] = saving.get(step, 0.0)
            seconds_of[step] = {phase: seconds for phase, seconds in times.items() if seconds}
        return seconds_of

    @cached_property
    def clock(self) -> dict[int, float]:
        """Seconds from the start of the first evaluation to the end of each step."""
        clock, total = {0: 0.0}, 0.0
        for step, times in self.seconds_of.items():
            total += sum(times.values())
            clock[step] = total - times.get("save", 0.0)
        return clock

    @cached_property
    def wall_clock(self) -> float:
        return sum(sum(times.values()) for times in self.seconds_of.values())

    @cached_property
    def accuracies(self) -> dict[int, Estimate]:
        """Accuracy on the first set of held-out questions by step, with a 95 % interval over questions."""
        return self.estimates("eval/accuracy")

    @property
    def steps(self) -> tuple[int, int | None]:
        """The number of finished steps, and the number of planned ones if it is known."""
        finished = max((row["step"] for row in self.rows.get("train", ())), default=0)
        return finished, self.planned if isinstance(self.planned, int) else None

    @cached_property
    def anomalies(self) -> list[Anomaly]:
        """Anomalies in order of their steps; consecutive ones of one kind are merged."""
        by_kind: dict[str, list[Anomaly]] = {}
        for row in sorted(self.rows.get("anomaly", ()), key=lambda row: row["step"]):
            kind, step = str(row.get("kind")), row["step"]
            text = str(row.get("text") or f"{kind}: {row.get('value')}, the limit is {row.get('limit')}")
            spans = by_kind.setdefault(kind, [])
            if spans and spans[-1].last_step >= step - 1:
                spans[-1] = spans[-1]._replace(last_step=step)
            else:
                spans.append(Anomaly(step, step, text))
        return sorted(span for spans in by_kind.values() for span in spans)


class Series(NamedTuple):
    """Runs of one experiment, which differ only in their seed."""

    name: str
    runs: list[LoggedRun]


# --- files -----------------------------------------------------------------------------------------------------------
def read_runs(folders: Sequence[Path]) -> list[LoggedRun]:
    """Read each folder once. Raise UsageError if one is not the folder of a run."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in resolved:
        if not (folder / "metrics.jsonl").is_file():
            raise UsageError(f"{folder}: not the folder of a run; name a folder that contains metrics.jsonl")
    return [LoggedRun(folder, name) for folder, name in zip(resolved, _short_names(resolved), strict=True)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different."""
    names: list[str] = []
    for n_parts in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = ["/".join(folder.parts[-n_parts:]) for folder in folders]
        if len(set(names)) == len(folders):
            break
    return names


def read_metrics(folder: Path) -> dict[str, list[Row]]:
    """Read the lines of metrics.jsonl by phase."""
    rows: dict[str, list[Row]] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        if has_step(row):
            rows.setdefault(str(row.get("phase")), []).append(row)
    return rows


def read_lines(path: Path) -> list[Row]:
    """Read the objects of a jsonl file. Skip invalid lines: a running program may be writing the last one."""
    lines = _read_bytes(path).split(b"\n")  # splitlines would also split at characters that JSON leaves in strings
    return [row for row in map(parse_object, lines) if row]


def count_damaged_lines(path: Path) -> int:
    """Return the number of lines of a log that `read_lines` skips, without a last one that is being written."""
    finished = _read_bytes(path).split(b"\n")[:-1]
    return sum(not has_step(parse_object(line)) for line in finished if line.strip())


def _read_bytes(path: Path) -> bytes:
    """Read a file; return nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parse_object(text: bytes) -> Row:
    """Return the JSON object in a text; return an empty one if the text is invalid."""
    try:
        return _as_object(json.loads(text.decode("utf-8")))
    except (ValueError, RecursionError):
        return {}


def _as_object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def has_step(row: Row) -> bool:
    """Return whether a row of a log says to which step it belongs."""
    return isinstance(row.get("step"), int) and not isinstance(row["step"], bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float | None:
    return value if is_number(value) else None


def _estimate(name: str, value: float, row: Row) -> Estimate:
    """Add the interval of a metric: the one that was logged, or that of an accuracy from one response per question."""
    low, high = (_number(row.get(f"{name}_{end}")) for end in ("low", "high"))
    if low is not None and high is not None:
        return Estimate(value, low, high)
    of_set, slash, key = name.rpartition("/")
    return _estimate_accuracy(value, row, f"{of_set}{slash}") if key == "accuracy" else Estimate(value)


def _estimate_accuracy(value: float, row: Row, prefix: str) -> Estimate:
    """Add Wilson's interval; for rewards outside [0, 1], 1.96 standard errors on either side."""
    n_questions, unscored = (_number(row.get(f"{prefix}{key}")) or 0.0 for key in ("n_examples", "unscored"))
    n_scored, standard_error = round(n_questions * (1 - unscored)), _number(row.get(f"{prefix}accuracy_stderr"))
    if 0 <= value <= 1 and n_scored > 0:
        import torch  # here, because a program must show its help without loading torch

        from grpo_core import estimate_mean_interval

        # The interval depends only on the mean and the number of values.
        _, low, high = estimate_mean_interval(torch.full((n_scored,), value, dtype=torch.float64))
        return Estimate(value, min(low, value), max(high, value))  # the mean over equal values can differ by rounding
    if standard_error is None:
        return Estimate(value)
    return Estimate(value, value - 1.96 * standard_error, value + 1.96 * standard_error)


# --- comparison ------------------------------------------------------------------------------------------------------
def differing_settings(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the names of the settings that differ among the runs that have them."""
    names = dict.fromkeys(name for run in runs for name in _compared_settings(run))
    return [name for name in names if len({_key(run.settings[name]) for run in runs if name in run.settings}) > 1]


def group_runs(runs: Sequence[LoggedRun]) -> list[Series]:
    """Group runs whose settings differ only in the seed. A run without settings is its own series."""
    groups: dict[str, list[LoggedRun]] = {}
    for run in runs:
        compared = _compared_settings(run)
        groups.setdefault(_key([run.program, compared] if compared else run.name), []).append(run)
    differing = differing_settings(runs)
    return [Series(_series_name(members, differing, len(groups)), members) for members in groups.values()]


def _compared_settings(run: LoggedRun) -> Row:
    return {name: value for name, value in run.settings.items() if name not in IGNORED_SETTINGS}


def _series_name(members: Sequence[LoggedRun], differing: Sequence[str], n_series: int) -> str:
    """Name a run as the tables do, and several runs after at most two settings that set them apart.

    Otherwise several runs are named after the first.
    """
    first = members[0]
    if len(members) == 1:
        return first.name
    own = [f"{name}={format_setting(first.settings[name])}" for name in differing if name in first.settings]
    name = ", ".join(own) if n_series > 1 and len(differing) <= 2 and own else first.name
    return f"{name} ({len(members)} runs)"


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def format_setting(value: Any) -> str:
    """Format a setting for a reader."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
