"""What runs have logged, read back for pictures: runs that differ in their seed alone are one series."""

import json
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from drivers.reports.logged_run import PHASES, Estimate, LoggedRun, Row, Series


# --- panels: what the pictures show, whoever draws them --------------------------------------------------------------
class Point(NamedTuple):
    """A value at a step; over several runs their mean, from the least to the greatest."""

    step: int
    seconds: float
    value: float
    low: float | None
    high: float | None
    n_runs: int


class Line(NamedTuple):
    """One quantity of one series."""

    series: int
    quantity: int
    points: list[Point]


class Panel(NamedTuple):
    """One picture: lines, what they are of, and what is about them."""

    title: str
    unit: str
    is_share: bool
    quantities: list[str]
    lines: list[Line]


MAX_BARS = 100


PART = "part_"
"""What the numbers that a reward function returns by name are logged under."""


Values = Callable[[LoggedRun], dict[int, Estimate]]


def logged(phase: str, key: str) -> Values:
    """A number of metrics.jsonl."""
    return lambda run: {step: Estimate(value) for step, value in run.values(phase, key).items()}


PANELS: tuple[tuple[str, str, bool, dict[str, Values]], ...] = (
    (
        "Reward",
        "mean over rollouts",
        False,
        {"reward": logged("train", "reward"), "format": logged("train", "format_reward")},
    ),
    ("Demonstrations", "nats per token", False, {"-log π": logged("train", "nll")}),
    (
        "Held-out accuracy",
        "share of questions",
        True,
        {"accuracy": lambda run: run.accuracies, "format": logged("eval", "format_reward")},
    ),
    (
        "Entropy",
        "nats per token",
        False,
        {"sampled": logged("train", "rollout_entropy"), "policy, trained on": logged("train", "entropy")},
    ),
    (
        "Response length",
        "tokens",
        False,
        {"rollouts": logged("train", "response_tokens"), "held-out": logged("eval", "response_tokens")},
    ),
    (
        "Left out",
        "share",
        True,
        {
            "silent groups": logged("train", "zero_std_groups"),
            "cut off": logged("train", "truncated"),
            "not scored": logged("train", "unscored"),
        },
    ),
    (
        "Distance",
        "nats per token",
        False,
        {
            "to the reference": logged("train", "kl"),
            "to the old policy": logged("train", "approx_kl"),
            "to the sampler": logged("train", "sampler_log_prob_diff"),
        },
    ),
    ("Clip fraction", "share of tokens", False, {"clipped": logged("train", "clip_fraction")}),
    ("Gradient norm", "before clipping", False, {"norm": logged("train", "grad_norm")}),
    (
        "Speed",
        "tokens per second",
        False,
        {"sampled": logged("train", "rollout_tokens_per_s"), "trained": logged("train", "update_tokens_per_s")},
    ),
)
"""Title, unit, whether it is a share of one, and quantities by name."""


def make_panels(groups: Sequence[Series]) -> list[Panel]:
    """Those of which some run has logged anything, each with the quantities that there are."""
    panels = []
    rows = (row for series in groups for run in series.runs for row in run.rows.get("train", ()))
    parts = {
        name: logged("train", name) for name in sorted({name for row in rows for name in row}) if name.startswith(PART)
    }
    named = {name.removeprefix(PART): values for name, values in parts.items()}
    first, *others = PANELS
    for title, unit, is_share, quantities in (first, ("Parts of the reward", "mean", False, named), *others):
        drawn = {
            name: {number: points for number, series in enumerate(groups) if (points := _points(series, values))}
            for name, values in quantities.items()
        }
        names = [name for name, of_series in drawn.items() if of_series]
        lines = [
            Line(number, place, points) for place, name in enumerate(names) for number, points in drawn[name].items()
        ]
        if lines:  # which of several there may be, where it is alone, no legend says
            what = f"{names[0]}, {unit}" if len(names) == 1 < len(quantities) else unit
            panels.append(Panel(title, what, is_share, names, lines))
    return panels


def _points(series: Series, values: Values) -> list[Point]:
    """Over the runs of a series the mean of those that have a step."""
    of_runs = [(run, values(run)) for run in series.runs]
    points = []
    for step in sorted({step for _, found in of_runs for step in found}):
        known = [(run, found[step]) for run, found in of_runs if step in found]
        seconds = fmean(run.clock.get(step, run.wall_clock) for run, _ in known)
        numbers = [estimate.value for _, estimate in known]
        if len(series.runs) == 1:
            points.append(Point(step, seconds, *known[0][1], 1))
        else:
            points.append(Point(step, seconds, fmean(numbers), min(numbers), max(numbers), len(known)))
    return points


class Times(NamedTuple):
    """Seconds by phase: in each step of a single series, else in the mean step of each."""

    labels: list[str]
    by_phase: dict[str, list[float]]
    step_by_step: bool


def make_times(groups: Sequence[Series]) -> Times | None:
    """None if no step was made. Of very many steps, neighbours are one bar, and each is as long as their mean."""
    spent_of: dict[str, list[dict[str, float]]] = {}
    if len(groups) == 1:
        steps = sorted({step for run in groups[0].runs for step in run.seconds_of})
        width = max(1, -(-len(steps) // MAX_BARS))
        for place, step in enumerate(steps):
            spent = [run.seconds_of[step] for run in groups[0].runs if step in run.seconds_of]
            spent_of.setdefault(str(steps[place - place % width]), []).extend(spent)
    else:
        for series in groups:
            spent_of[series.name] = [times for run in series.runs for step, times in run.seconds_of.items() if step]
    bars = [(label, spent) for label, spent in spent_of.items() if spent]
    by_phase = {phase: [fmean(times.get(phase, 0.0) for times in spent) for _, spent in bars] for phase in PHASES}
    found = {phase: seconds for phase, seconds in by_phase.items() if any(seconds)}
    return Times([label for label, _ in bars], found, len(groups) == 1) if found else None


def downsample(items: Sequence[Any], most: int) -> list[Any]:
    """Evenly spread ones and the last, if there are more than so many."""
    stride = max(1, -(-len(items) // most))
    return [*items[::stride], *(items[-1:] if (len(items) - 1) % stride else ())]


def steps_within(rows: Iterable[Row], budget: int) -> set[int]:
    """Evenly spread steps, the last one among them, whose rows are together no longer than that; at least two."""
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row["step"]] = sizes.get(row["step"], 0) + len(json.dumps(row, ensure_ascii=False))
    most, steps = len(sizes), sorted(sizes)
    while most > 1 and sum(sizes[step] for step in downsample(steps, most)) > budget:
        most -= 1
    return set(downsample(steps, most)) if steps else set()
