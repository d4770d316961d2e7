"""Curves of runs as a picture; `python drivers/report.py RUN` makes one from what a run has logged."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drivers.common.atomic_files import UNFINISHED
from drivers.reports.logged_run import PHASES, Series, group_runs, read_runs
from drivers.reports.series import Panel, Times, make_panels, make_times

PALETTE = ("#0072b2", "#d55e00", "#662244", "#004400", "#6600cc", "#cc6688", "#886644", "#aa66ff")


DARK_PALETTE = ("#56b4e9", "#ff8a3d", "#eeeeaa", "#ff00aa", "#8888ff", "#aa8866", "#aaff00", "#8844ff")
"""On white and on black. Any two are 20 or more apart in CIELAB under each kind of colour blindness; each stands out
from the page by 3 or more. Begun anew where there are more series, with thin lines."""


DASHES = ("solid", "dashed", "dotted", "dashdot")
"""Of quantities in one panel; begun anew where there are more."""


MAX_DOTS = 60
"""Points of a line that are marked."""


MOST_TOLD = 4
"""Anomalies whose text stands under the picture."""


def draw_curves(folder: Path) -> Path:
    """curves.png of one run."""
    return draw(group_runs(read_runs([folder])), folder / "curves.png", folder.name)


def draw(groups: Sequence[Series], target: Path, title: str, *, by_time: bool = False) -> Path:
    """All panels in one picture, against the step or the wall-clock."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels, times, scale = make_panels(groups), make_times(groups), Scale(by_time)
    points = [point for panel in panels for line in panel.lines for point in line.points]
    if by_time:
        scale = Scale.of_seconds(max((point.seconds for point in points), default=0.0))
    n_rows = -(-(len(panels) + (times is not None)) // 3) or 1
    figure = Figure(figsize=(12, 3.25 * n_rows + 0.08 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, 3, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_lines(axis, panel, groups, scale)
        longest = max(scale.of(point.step, point.seconds) for point in points) or 1
        axis.set_xlim(-0.03 * longest, 1.03 * longest)  # the same in all panels
    if times is not None:
        _stack_times(axes[len(panels)], times)
    for axis in axes[len(panels) + (times is not None) :]:
        axis.set_axis_off()
    if len(groups) == 1:
        figure.suptitle(_plain(title))
    else:
        handles = [Line2D([], [], color=colour_of(n), linewidth=width_of(n)) for n in range(len(groups))]
        names = [_plain(series.name) for series in groups]
        style = {"loc": "outside upper center", "ncols": min(3, len(groups)), "frameon": False}
        figure.legend(handles, names, title=_plain(title), title_fontsize="large", **style)
    figure.supxlabel(_plain("\n".join(_footnotes(groups))), fontsize="small", x=0.01, ha="left")
    unfinished = target.with_name(f"{UNFINISHED}{target.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks is still a name
        figure.savefig(unfinished, dpi=120)
    return unfinished.replace(target)


class Scale(NamedTuple):
    """What lies to the right: steps, or time in a unit that suits."""

    is_time: bool
    unit: str = "step"
    seconds: int = 1

    @staticmethod
    def of_seconds(longest: float) -> "Scale":
        units = [("seconds", 1), ("minutes", 60), ("hours", 3600)]
        return Scale(True, *next((unit for unit in units if longest < 180 * unit[1]), units[-1]))

    def of(self, step: int, seconds: float) -> float:
        return seconds / self.seconds if self.is_time else step


def colour_of(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def dash_of(quantity: int) -> str:
    return DASHES[quantity % len(DASHES)]


def width_of(series: int) -> float:
    """Thin where the colours begin anew."""
    return 1.6 if series < len(PALETTE) else 0.8


def _draw_lines(axis: Any, panel: Panel, groups: Sequence[Series], scale: Scale) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    # Of a single series the quantities have the colours.
    single = len(groups) == 1
    for line in panel.lines:
        colour = colour_of(line.quantity if single else line.series)
        style = {"color": colour, "linestyle": dash_of(line.quantity), "linewidth": width_of(line.series)}
        style |= {"marker": "o", "markersize": 3} if len(line.points) <= MAX_DOTS else {}
        places = [scale.of(point.step, point.seconds) for point in line.points]
        axis.plot(places, [point.value for point in line.points], **style)
        ranged = [
            (place, *point[2:5]) for place, point in zip(places, line.points, strict=True) if point.low is not None
        ]
        if ranged:
            at, values, low, high = map(np.array, zip(*ranged, strict=True))
            if len(groups[line.series].runs) > 1:
                axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            else:
                about = (values - low, high - values)
                axis.errorbar(at, values, yerr=about, color=colour, linestyle="none", capsize=3)
    for number, series in enumerate(groups):
        places = [scale.of(first, run.clock.get(first, 0.0)) for run in series.runs for first, _, _ in run.anomalies]
        marks = {"marker": "^", "markersize": 5, "linestyle": "none", "transform": axis.get_xaxis_transform()}
        axis.plot(places, [0.03] * len(places), color="black" if single else colour_of(number), **marks)
    axis.set(title=panel.title, xlabel=scale.unit, ylabel=panel.unit)
    axis.grid(alpha=0.3)
    if not scale.is_time:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.is_share:  # a judge's accuracy may leave [0, 1]
        least, most = axis.get_ylim()
        axis.set_ylim(min(-0.03, least), max(1.03, most))
    if len(panel.quantities) > 1:
        handles = [
            Line2D([], [], color=colour_of(place) if single else "dimgrey", linestyle=dash_of(place))
            for place in range(len(panel.quantities))
        ]
        axis.legend(handles, panel.quantities, frameon=False)


def _stack_times(axis: Any, times: Times) -> None:
    places, base = range(len(times.labels)), np.zeros(len(times.labels))
    for phase, seconds in times.by_phase.items():
        colour = colour_of(PHASES.index(phase))
        if times.step_by_step:
            axis.bar(places, seconds, bottom=base, label=phase, color=colour, width=0.8)
        else:
            axis.barh(places, seconds, left=base, label=phase, color=colour, height=0.5)
        base += seconds
    # Room for the legend, beyond the bars of which any may be the longest.
    legend = {"frameon": False, "fontsize": "small", "ncols": 4, "columnspacing": 1.0, "handlelength": 1.2}
    if times.step_by_step:
        shown = places[:: -(-len(places) // 8)]
        axis.set_xticks(shown, [times.labels[place] for place in shown])
        axis.set(title="Time by phase", xlabel="step", ylabel="seconds", ylim=(0, 1.4 * base.max()))
        axis.legend(loc="upper center", **legend)
    else:
        for place, label in zip(places, times.labels, strict=True):
            axis.text(0, place - 0.36, f" {_plain(label)}", fontsize="small", clip_on=True)
        axis.set(title="Time by phase", xlabel="seconds, mean step", yticks=[], ylim=(1.4 * len(places), -0.9))
        axis.legend(loc="lower center", **legend)


def explain_ranges(groups: Sequence[Series]) -> list[str]:
    """What stands about lines."""
    notes = []
    if any(len(series.runs) == 1 and series.runs[0].accuracies for series in groups):
        notes.append("Bars about accuracies: 95 % interval over questions.")
    if any(len(series.runs) > 1 for series in groups):
        notes.append("Runs that differ in their seed alone: the line is their mean, the band from least to greatest.")
    return notes


def _footnotes(groups: Sequence[Series]) -> list[str]:
    """And what the marks are."""
    notes = [" ".join(explain_ranges(groups))]
    told = [(run, *anomaly) for series in groups for run in series.runs for anomaly in run.anomalies]
    for run, first, last, text in told[:MOST_TOLD]:
        where = f"{run.name}, " if len(groups) > 1 else ""
        notes.append(f"▲ {where}{steps_text(first, last)}: {text}")
    return [*notes, f"▲ and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else notes


def steps_text(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _plain(text: str) -> str:
    """Not as a formula."""
    return text.replace("$", r"\$")
