"""Turn logged runs into panels: the curves and bars that every picture of runs shows."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from drivers.common.display import rates_at_most
from drivers.reports.logged_run import PHASES, Row, Series

MAX_BARS = 100
"""Bars in the picture of times; a longer run has several steps in one bar."""
PASS_PREFIX = "pass_at_"
"""Prefix of the metrics that hold pass@k of the training groups."""
PART_PREFIX = "part_"
"""Prefix of the metrics that hold the named numbers of a reward function."""


# --- what a panel shows ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PanelSpec:
    """A panel and the logged metrics that it shows."""

    title: str
    unit: str
    quantities: dict[str, str]
    """Name in the legend -> `phase/name` of the metric. Metrics that were not logged are omitted."""
    is_share: bool = False
    """True if the values are shares, so that the axis spans 0 to 1."""
    hides_constants: bool = False
    """Omit the panel if no line changes its value: a constant setting is in the table of settings."""


REWARD = PanelSpec("Reward", "mean over rollouts", {"reward": "train/reward", "format": "train/format_reward"})
DEMONSTRATIONS = PanelSpec("Demonstrations", "nats per token", {"-log π": "train/nll"})
PANELS = (
    PanelSpec(
        "Entropy", "nats per token", {"sampled": "train/rollout_entropy", "policy, trained on": "train/entropy"}
    ),
    PanelSpec("Response length", "tokens", {"rollouts": "train/response_tokens", "held-out": "eval/response_tokens"}),
    PanelSpec(
        "Excluded",
        "share",
        {"zero-signal groups": "train/zero_std_groups", "truncated": "train/truncated", "unscored": "train/unscored"},
        is_share=True,
    ),
    PanelSpec(
        "Distance",
        "nats per token",
        {
            "to the reference": "train/kl",
            "to the old policy": "train/approx_kl",
            "to the sampler": "train/sampler_log_prob_diff",
        },
    ),
    PanelSpec("Clip fraction", "share of tokens", {"clipped": "train/clip_fraction"}),
    PanelSpec("Gradient norm", "before clipping", {"norm": "train/grad_norm"}),
    PanelSpec("Learning rate", "of each update", {"rate": "train/learning_rate"}, hides_constants=True),
    PanelSpec(
        "Speed", "tokens per second", {"sampled": "train/rollout_tokens_per_s", "trained": "train/update_tokens_per_s"}
    ),
)
"""All panels after those of the rewards, the demonstrations and the held-out questions, in order."""


# --- curves ----------------------------------------------------------------------------------------------------------
class Point(NamedTuple):
    """The value of a quantity at a step; over several runs, the mean with the minimum and the maximum."""

    step: int
    seconds: float
    value: float
    low: float | None
    high: float | None
    n_runs: int


class Line(NamedTuple):
    """One quantity of one series, both as numbers in the order of the legend."""

    series: int
    quantity: int
    points: list[Point]


class Panel(NamedTuple):
    """The lines of one picture."""

    title: str
    unit: str
    is_share: bool
    quantities: list[str]
    lines: list[Line]


def make_panels(groups: Sequence[Series]) -> list[Panel]:
    """Return the panels for which some run has logged a quantity."""
    specs = (REWARD, _reward_parts(groups), DEMONSTRATIONS, *_held_out(groups), *PANELS, _pass_at_k(groups))
    panels = (_make_panel(spec, groups) for spec in specs)
    return [panel for panel in panels if panel.lines]


def _reward_parts(groups: Sequence[Series]) -> PanelSpec:
    """Return the panel of the numbers that the reward functions have returned by name."""
    keys = [key for key in _logged_keys(groups, "train") if key.startswith(PART_PREFIX)]
    return PanelSpec("Parts of the reward", "mean", {key.removeprefix(PART_PREFIX): f"train/{key}" for key in keys})


def _pass_at_k(groups: Sequence[Series]) -> PanelSpec:
    """Return the panel of pass@k of the training groups."""
    prefixed = [key for key in _logged_keys(groups, "train") if key.startswith(PASS_PREFIX)]
    ks = sorted(int(key.removeprefix(PASS_PREFIX)) for key in prefixed)
    quantities = {f"pass@{k}": f"train/{PASS_PREFIX}{k}" for k in ks}
    return PanelSpec("Groups solved", "share of groups", quantities, is_share=True)


def _held_out(groups: Sequence[Series]) -> tuple[PanelSpec, PanelSpec]:
    """Return the panels of the accuracy on each set of held-out questions, and of pass@k and maj@k."""
    keys = _logged_keys(groups, "eval")
    others = [key.removesuffix("/accuracy") for key in keys if key.endswith("/accuracy")]
    accuracies = {"accuracy": "eval/accuracy"} | {f"accuracy, {name}": f"eval/{name}/accuracy" for name in others}
    rates: dict[str, str] = {}
    for suffix, prefix in [("", ""), *((f", {name}", f"{name}/") for name in others)]:
        of_set = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        rates |= {f"{label}{suffix}": f"eval/{prefix}{key}" for label, key in rates_at_most(of_set).items()}
    unit = "share of questions"
    return (
        PanelSpec("Held-out accuracy", unit, accuracies | {"format": "eval/format_reward"}, is_share=True),
        PanelSpec("Held-out, several responses", unit, rates, is_share=True),
    )


def _logged_keys(groups: Sequence[Series], phase: str) -> list[str]:
    """Return the names of all metrics that some run has logged in a phase."""
    rows = (row for series in groups for run in series.runs for row in run.rows.get(phase, ()))
    return sorted({key for row in rows for key in row})


def _make_panel(spec: PanelSpec, groups: Sequence[Series]) -> Panel:
    names: list[str] = []
    lines: list[Line] = []
    for name, metric in spec.quantities.items():
        points = [_make_points(series, metric) for series in groups]
        if any(points):
            lines += [Line(place, len(names), drawn) for place, drawn in enumerate(points) if drawn]
            names.append(name)
    if spec.hides_constants and all(len({point.value for point in line.points}) == 1 for line in lines):
        lines = []
    is_only_one_left = len(names) == 1 < len(spec.quantities)
    unit = f"{names[0]}, {spec.unit}" if is_only_one_left else spec.unit  # a single line has no legend
    return Panel(spec.title, unit, spec.is_share, names, lines)


def _make_points(series: Series, metric: str) -> list[Point]:
    """Average the metric at each step over the runs that have logged it there."""
    estimates_of = [(run, run.estimates(metric)) for run in series.runs]
    points = []
    for step in sorted({step for _, estimates in estimates_of for step in estimates}):
        known = [(run, estimates[step]) for run, estimates in estimates_of if step in estimates]
        seconds = fmean(run.clock.get(step, run.wall_clock) for run, _ in known)
        if len(series.runs) == 1:
            points.append(Point(step, seconds, *known[0][1], n_runs=1))
        else:
            values = [estimate.value for _, estimate in known]
            points.append(Point(step, seconds, fmean(values), min(values), max(values), len(known)))
    return points


# --- times -----------------------------------------------------------------------------------------------------------
class Times(NamedTuple):
    """Seconds by phase: of each step for a single series, otherwise of the mean step of each series."""

    labels: list[str]
    by_phase: dict[str, list[float]]
    step_by_step: bool


def make_times(groups: Sequence[Series]) -> Times | None:
    """Return the times of all bars, or None if no step has finished."""
    bars = _bars_of_steps(groups[0]) if len(groups) == 1 else _bars_of_series(groups)
    bars = {label: steps for label, steps in bars.items() if steps}
    by_phase = {}
    for phase in PHASES:
        seconds = [fmean(times.get(phase, 0.0) for times in steps) for steps in bars.values()]
        if any(seconds):
            by_phase[phase] = seconds
    return Times(list(bars), by_phase, len(groups) == 1) if by_phase else None


def _bars_of_steps(series: Series) -> dict[str, list[dict[str, float]]]:
    """Group steps into bars: neighbors share a bar, as their mean, if there are more steps than bars."""
    steps = sorted({step for run in series.runs for step in run.seconds_of})
    width = max(1, -(-len(steps) // MAX_BARS))
    return {
        str(steps[start]): [
            run.seconds_of[step]
            for step in steps[start : start + width]
            for run in series.runs
            if step in run.seconds_of
        ]
        for start in range(0, len(steps), width)
    }


def _bars_of_series(groups: Sequence[Series]) -> dict[str, list[dict[str, float]]]:
    """Collect the training steps of each series."""
    return {
        series.name: [times for run in series.runs for step, times in run.seconds_of.items() if step > 0]
        for series in groups
    }


# --- fewer points ----------------------------------------------------------------------------------------------------
def downsample(items: Sequence[Any], max_items: int) -> list[Any]:
    """Return about `max_items` evenly spaced items and always the last one."""
    stride = max(1, -(-len(items) // max_items))
    kept = list(items[::stride])
    if (len(items) - 1) % stride:
        kept.append(items[-1])
    return kept


def steps_within(rows: Iterable[Row], max_characters: int) -> set[int]:
    """Return evenly spaced steps, the last among them, whose rows fit; at least the first and the last step."""
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row["step"]] = sizes.get(row["step"], 0) + len(json.dumps(row, ensure_ascii=False))
    steps = sorted(sizes)
    for n_steps in range(len(steps), 0, -1):
        kept = downsample(steps, n_steps)
        if sum(sizes[step] for step in kept) <= max_characters or n_steps == 1:
            return set(kept)
    return set()
