"""Draw the curves of runs as a PNG."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drivers.common.atomic_files import UNFINISHED
from drivers.reports.logged_run import PHASES, Series, group_runs, read_runs
from drivers.reports.series import Line, Panel, Times, make_panels, make_times

PALETTE = ("#0072b2", "#d55e00", "#662244", "#004400", "#6600cc", "#cc6688", "#886644", "#aa66ff")
DARK_PALETTE = ("#56b4e9", "#ff8a3d", "#eeeeaa", "#ff00aa", "#8888ff", "#aa8866", "#aaff00", "#8844ff")
"""Colors on white and on a dark page. Any two are at least 20 apart in CIELAB with every kind of color blindness, and
each has a contrast of at least 3 with the page. More series start again from the first color, with thin lines."""
DASHES = ("solid", "dashed", "dotted", "dashdot")
"""Line styles of the quantities in one panel; more quantities start again from the first."""
MAX_MARKED_POINTS = 60
"""A line with more points has no markers."""
MAX_LISTED_ANOMALIES = 4
"""Anomalies whose text is printed under the picture."""
N_COLUMNS = 3


@dataclass(frozen=True)
class Axis:
    """The horizontal axis: steps, or wall-clock time in a unit."""

    label: str = "step"
    unit_s: int = 0
    """Seconds per unit of time; 0 for steps."""

    def position(self, step: int, seconds: float) -> float:
        return seconds / self.unit_s if self.unit_s else step


TIME_AXES = (Axis("seconds", 1), Axis("minutes", 60), Axis("hours", 3600))
"""The first with less than 180 units is used, otherwise hours."""


def draw_curves(folder: Path) -> Path:
    """Draw curves.png of the run in a folder."""
    return draw(group_runs(read_runs([folder])), folder / "curves.png", folder.name)


def draw(groups: Sequence[Series], target: Path, title: str, *, by_time: bool = False) -> Path:
    """Draw all panels into one picture, against the step or the wall-clock time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, times = make_panels(groups), make_times(groups)
    points = [point for panel in panels for line in panel.lines for point in line.points]
    longest_s = max((point.seconds for point in points), default=0.0)
    time_axis = next((axis for axis in TIME_AXES if longest_s < 180 * axis.unit_s), TIME_AXES[-1])
    axis = time_axis if by_time else Axis()
    farthest = max((axis.position(point.step, point.seconds) for point in points), default=0) or 1

    n_pictures = len(panels) + (times is not None)
    n_rows = max(1, -(-n_pictures // N_COLUMNS))
    figure = Figure(figsize=(12, 3.25 * n_rows + 0.08 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(n_rows, N_COLUMNS, squeeze=False).ravel()
    for plot, panel in zip(plots, panels, strict=False):
        _draw_panel(plot, panel, groups, axis)
        plot.set_xlim(-0.03 * farthest, 1.03 * farthest)  # equal in all panels
    if times is not None:
        _draw_times(plots[len(panels)], times)
    for plot in plots[n_pictures:]:
        plot.set_axis_off()
    _draw_title(figure, groups, title)
    figure.supxlabel(_escape_math("\n".join(_footnotes(groups))), fontsize="small", x=0.01, ha="left")

    unfinished = target.with_name(f"{UNFINISHED}{target.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font may lack letters of a run's name
        figure.savefig(unfinished, dpi=120)
    return unfinished.replace(target)


def series_color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def _dash(quantity: int) -> str:
    return DASHES[quantity % len(DASHES)]


def _width(series: int) -> float:
    return 1.6 if series < len(PALETTE) else 0.8


def _draw_title(figure: Any, groups: Sequence[Series], title: str) -> None:
    """Draw the title, and with several series their legend."""
    from matplotlib.lines import Line2D

    if len(groups) == 1:
        figure.suptitle(_escape_math(title))
        return
    handles = [Line2D([], [], color=series_color(n), linewidth=_width(n)) for n in range(len(groups))]
    names = [_escape_math(series.name) for series in groups]
    style = {"loc": "outside upper center", "ncols": min(3, len(groups)), "frameon": False}
    figure.legend(handles, names, title=_escape_math(title), title_fontsize="large", **style)


# --- panels ----------------------------------------------------------------------------------------------------------
def _draw_panel(plot: Any, panel: Panel, groups: Sequence[Series], axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    is_single = len(groups) == 1
    for line in panel.lines:
        color = series_color(line.quantity if is_single else line.series)  # a single series colors its quantities
        _draw_line(plot, line, color, axis, has_band=len(groups[line.series].runs) > 1)
    _draw_anomalies(plot, groups, axis)
    plot.set(title=panel.title, xlabel=axis.label, ylabel=panel.unit)
    plot.grid(alpha=0.3)
    if not axis.unit_s:
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.is_share:  # the accuracy of a custom reward may leave [0, 1]
        low, high = plot.get_ylim()
        plot.set_ylim(min(-0.03, low), max(1.03, high))
    if len(panel.quantities) > 1:
        _draw_legend(plot, panel, is_single)


def _draw_line(plot: Any, line: Line, color: str, axis: Axis, *, has_band: bool) -> None:
    """Draw a line with its band over seeds, or with an error bar at each point that has an interval."""
    positions = np.array([axis.position(point.step, point.seconds) for point in line.points])
    values = np.array([point.value for point in line.points])
    low = np.array([np.nan if point.low is None else point.low for point in line.points])
    high = np.array([np.nan if point.high is None else point.high for point in line.points])
    marker = {"marker": "o", "markersize": 3} if len(line.points) <= MAX_MARKED_POINTS else {}
    plot.plot(positions, values, color=color, linestyle=_dash(line.quantity), linewidth=_width(line.series), **marker)
    has_interval = ~np.isnan(low)
    if not has_interval.any():
        return
    positions, values, low, high = (array[has_interval] for array in (positions, values, low, high))
    if has_band:
        plot.fill_between(positions, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        plot.errorbar(positions, values, (values - low, high - values), color=color, linestyle="none", capsize=3)


def _draw_anomalies(plot: Any, groups: Sequence[Series], axis: Axis) -> None:
    """Mark the steps with anomalies by triangles at the bottom."""
    for number, series in enumerate(groups):
        steps = [(run, anomaly.first_step) for run in series.runs for anomaly in run.anomalies]
        positions = [axis.position(step, run.clock.get(step, 0.0)) for run, step in steps]
        color = "black" if len(groups) == 1 else series_color(number)
        style = {"marker": "^", "markersize": 5, "linestyle": "none", "transform": plot.get_xaxis_transform()}
        plot.plot(positions, [0.03] * len(positions), color=color, **style)


def _draw_legend(plot: Any, panel: Panel, is_single: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=series_color(number) if is_single else "dimgrey", linestyle=_dash(number))
        for number in range(len(panel.quantities))
    ]
    plot.legend(handles, panel.quantities, frameon=False)


# --- times -----------------------------------------------------------------------------------------------------------
def _draw_times(plot: Any, times: Times) -> None:
    """Draw stacked bars: a column for each step of a single series, otherwise a row for each series."""
    places, base = range(len(times.labels)), np.zeros(len(times.labels))
    for phase, seconds in times.by_phase.items():
        color = series_color(PHASES.index(phase))
        if times.step_by_step:
            plot.bar(places, seconds, bottom=base, label=phase, color=color, width=0.8)
        else:
            plot.barh(places, seconds, left=base, label=phase, color=color, height=0.5)
        base += seconds
    # The limits leave room for the legend beyond the bars.
    legend = {"frameon": False, "fontsize": "small", "ncols": 4, "columnspacing": 1.0, "handlelength": 1.2}
    if times.step_by_step:
        labeled = places[:: -(-len(places) // 8)]
        plot.set_xticks(labeled, [times.labels[place] for place in labeled])
        plot.set(title="Time by phase", xlabel="step", ylabel="seconds", ylim=(0, 1.4 * base.max()))
        plot.legend(loc="upper center", **legend)
    else:
        for place, label in zip(places, times.labels, strict=True):
            plot.text(0, place - 0.36, f" {_escape_math(label)}", fontsize="small", clip_on=True)
        plot.set(title="Time by phase", xlabel="seconds, mean step", yticks=[], ylim=(1.4 * len(places), -0.9))
        plot.legend(loc="lower center", **legend)


# --- notes -----------------------------------------------------------------------------------------------------------
def explain_ranges(groups: Sequence[Series]) -> list[str]:
    """Explain the error bars and bands that the pictures of these series contain."""
    notes = []
    if any(len(series.runs) == 1 and series.runs[0].accuracies for series in groups):
        notes.append("Error bars of accuracies: 95 % interval over questions.")
    if any(len(series.runs) > 1 for series in groups):
        notes.append("Runs that differ only in their seed: the line is the mean, the band spans minimum to maximum.")
    return notes


def format_steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _footnotes(groups: Sequence[Series]) -> list[str]:
    """Explain the ranges and list the first anomalies."""
    notes = [" ".join(explain_ranges(groups))]
    anomalies = [(run, anomaly) for series in groups for run in series.runs for anomaly in run.anomalies]
    for run, anomaly in anomalies[:MAX_LISTED_ANOMALIES]:
        place = f"{run.name}, " if len(groups) > 1 else ""
        notes.append(f"▲ {place}{format_steps(anomaly.first_step, anomaly.last_step)}: {anomaly.text}")
    if len(anomalies) > MAX_LISTED_ANOMALIES:
        notes.append(f"▲ and {len(anomalies) - MAX_LISTED_ANOMALIES} more")
    return notes


def _escape_math(text: str) -> str:
    """Keep matplotlib from reading dollar signs as a formula."""
    return text.replace("$", r"\$")
