"""Runs as one page that needs nothing else: `python drivers/report.py runs/ONE runs/ANOTHER --output DIR`."""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from drivers.common.atomic_files import write_text
from drivers.common.display import clock
from drivers.common.errors import UsageError
from drivers.reports.curves import DARK_PALETTE, PALETTE, draw, explain_ranges, steps_text
from drivers.reports.logged_run import (
    PHASES,
    Estimate,
    LoggedRun,
    Row,
    Series,
    differing_settings,
    group_runs,
    is_number,
    read_runs,
    show,
)
from drivers.reports.series import Panel, Times, downsample, make_panels, make_times, steps_within

MAX_POINTS = 16_000
"""Of all lines on a page."""


MAX_POINTS_PER_LINE = 400
"""More would not be seen."""


MAX_CHARACTERS = 1_500_000
"""Of the responses on a page."""


SUMMARY_NOTE = (
    "Accuracies are of held-out questions, with the 95 % interval over questions; of several runs the mean, from the "
    "least to the greatest. The wall-clock is what was logged, without the loading of models."
)


OF_TOKENS = ("log_probs", "sampler_log_probs", "entropy", "advantage")
"""Values of completions.jsonl that a response is coloured by."""


def write_report(folders: Sequence[Path], output: Path, title: str) -> Path:
    """report.html, curves.png and curves-by-time.png in `output`; returns the first."""
    runs = read_runs(folders)
    groups = group_runs(runs)
    page = make_page(runs, groups, title)
    try:
        output.mkdir(parents=True, exist_ok=True)
        draw(groups, output / "curves.png", title)
        draw(groups, output / "curves-by-time.png", title, by_time=True)
        write_text(output / "report.html", page)
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written to ({error.strerror or error})") from error
    return output / "report.html"


def make_page(runs: Sequence[LoggedRun], groups: Sequence[Series], title: str) -> str:
    """All of it. What is not ours is escaped: here as HTML, in the data as JSON that holds no tag."""
    script, style = (_part(f"page.{kind}") for kind in ("js", "css"))
    style = f"{_colours()}{style}"
    responses, panels = collect_responses(runs), make_panels(groups)
    most = min(MAX_POINTS_PER_LINE, MAX_POINTS // max(1, sum(len(panel.lines) for panel in panels)))
    data = {
        "colours": len(PALETTE),
        "series": [{"name": series.name, "runs": len(series.runs)} for series in groups],
        "runs": [run.name for run in runs],
        "panels": [_panel_data(panel, most) for panel in panels],
        "times": _times_data(make_times(groups)),
        "anomalies": _anomaly_data(groups),
        "responses": responses,
    }
    page = Template(_part("page.html")).substitute(
        # Even if something were not escaped, a browser would run no other script and load nothing.
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src {_hash(script)}; "
        f"style-src {_hash(style)}",
        title=escape(title),
        style=style,
        subtitle=escape(_subtitle(runs, groups)),
        summary=summary_table(groups),
        summary_note=SUMMARY_NOTE,
        curves_note=escape(_curves_note(groups, most)),
        anomalies=_anomaly_list(groups),
        responses_note=escape(_responses_note(runs, len(responses))),
        settings=_settings(runs),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )
    return page.encode("utf-8", errors="backslashreplace").decode()  # half of a surrogate pair


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a page's policy names the one script or style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _colours() -> str:
    def of(palette: Sequence[str]) -> str:
        return ":root{" + "".join(f"--c{number}:{colour};" for number, colour in enumerate(palette)) + "}"

    return f"{of(PALETTE)}@media screen and (prefers-color-scheme: dark){{{of(DARK_PALETTE)}}}\n"


# --- in words --------------------------------------------------------------------------------------------------------
def _subtitle(runs: Sequence[LoggedRun], groups: Sequence[Series]) -> str:
    programs = ", ".join(dict.fromkeys(run.program for run in runs if run.program))
    count = f"{len(runs)} runs in {len(groups)} series" if len(runs) > 1 else "One run"
    return f"{count} of {programs}" if programs else count


def _curves_note(groups: Sequence[Series], most: int) -> str:
    if not any(run.rows for series in groups for run in series.runs):
        return "Nothing has been logged yet."
    notes = ["Point at a curve, or step through it with the arrow keys.", *explain_ranges(groups)]
    if any(run.anomalies for series in groups for run in series.runs):
        notes.append("▲ marks anomalies.")
    made = max(run.steps[0] for series in groups for run in series.runs)
    if made > most:
        notes.append(f"Of {made} steps at most {most}, evenly spread, and the last are drawn.")
    return " ".join(notes)


def _responses_note(runs: Sequence[LoggedRun], kept: int) -> str:
    there = sum(len(run.completions) for run in runs)
    if not there:
        return "No responses were logged (completions.jsonl)."
    told = (
        f"{kept} of the {there} in completions.jsonl, all of evenly spread steps" if kept < there else f"All {there}"
    )
    return f"{told}. Open one to see it token by token."


# --- tables ----------------------------------------------------------------------------------------------------------
def summary_table(groups: Sequence[Series]) -> str:
    """A row for each run; before those of one series their mean."""
    runs = [run for series in groups for run in series.runs]
    differing = differing_settings(runs)
    several = len({run.program for run in runs}) > 1
    names = ["run", *(["program"] if several else []), "accuracy before", "last", "best", *differing]
    names += ["steps", "wall-clock", "sampled tokens/s", "trained tokens/s", "anomalies"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)

    def row(kind: str, name: str, members: Sequence[LoggedRun]) -> str:
        first = members[0]
        cells = [escape(first.program)] if several else []
        cells += [_accuracy_cell(members, which) for which in ("before", "last", "best")]
        cells += [escape(show(first.settings[key])) if key in first.settings else "" for key in differing]
        cells += [_steps(members), clock(fmean(run.wall_clock for run in members))]
        cells += [_mean(run.speed("sampled_tokens", "rollout") for run in members)]
        cells += [_mean(run.speed("trained_tokens", "update") for run in members)]
        cells += [str(sum(len(run.anomalies) for run in members))]
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{columns}</tr>'

    lines = []
    for series in groups:
        if len(series.runs) == 1:
            lines.append(row("alone", series.runs[0].name, series.runs))
            continue
        lines.append(row("mean", series.name, series.runs))
        lines += [row("one", f"{run.name}, seed {show(run.settings.get('seed'))}", [run]) for run in series.runs]
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"


def _steps(members: Sequence[LoggedRun]) -> str:
    """Made, from the least to the most, of how many."""
    made = [run.steps[0] for run in members]
    planned = max(run.steps[1] or 0 for run in members)
    shown = str(max(made)) if min(made) == max(made) else f"{min(made)} to {max(made)}"
    return f"{shown} of {planned}" if planned > min(made) else shown


def accuracy_at(run: LoggedRun, which: str) -> tuple[int, Estimate] | None:
    """Before the first step, after the last that was evaluated, or the best with its step."""
    after = {step: estimate for step, estimate in run.accuracies.items() if step > 0}
    if which == "before":
        return (0, run.accuracies[0]) if 0 in run.accuracies else None
    if which == "last":
        return (max(after), after[max(after)]) if after else None
    return max(run.accuracies.items(), key=lambda item: item[1].value, default=None)


def _accuracy_cell(members: Sequence[LoggedRun], which: str) -> str:
    found = [known for run in members if (known := accuracy_at(run, which))]
    if not found:
        return ""
    values = [estimate.value for _, estimate in found]
    low, high = (min(values), max(values)) if len(members) > 1 else found[0][1][1:]
    about = [] if low is None else [f"{low:.3f} to {high:.3f}"]
    if len(members) == 1 and which != "before":
        about.append(f"step {found[0][0]}")
    return "".join([f"{fmean(values):.3f}", *(f"<small>{text}</small>" for text in about)])


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.0f}" if known else ""


def _settings(runs: Sequence[LoggedRun]) -> str:
    """Collapsed tables of each run; what differs is marked."""
    differing = differing_settings(runs)
    parts = []
    for run in runs:
        both = [(f"{key} (differs)" if key in differing else key, value) for key, value in run.settings.items()]
        lines = "\n".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(show(value))}</td></tr>'
            for key, value in [*both, *run.environment.items()]
        )
        table = f"<table><tbody>\n{lines}\n</tbody></table>" if lines else "<p>No config.json was found.</p>"
        name = escape(run.name)
        region = f'<div class="scroll" tabindex="0" role="region" aria-label="Settings of {name}">{table}</div>'
        parts.append(f"<details><summary>{name}</summary>{region}</details>")
    return "\n".join(parts)


def _anomaly_list(groups: Sequence[Series]) -> str:
    lines = [
        f"<li>{escape(run.name)}, {steps_text(first, last)}: {escape(text)}</li>"
        for series in groups
        for run in series.runs
        for first, last, text in run.anomalies
    ]
    return '<h3>Anomalies</h3>\n<ul class="anomalies" tabindex="0">\n' + "\n".join(lines) + "\n</ul>" if lines else ""


# --- data for the script ---------------------------------------------------------------------------------------------
def _panel_data(panel: Panel, most: int) -> Row:
    lines = [
        {**line._asdict(), "points": [p._replace(seconds=round(p.seconds, 2)) for p in downsample(line.points, most)]}
        for line in panel.lines
    ]
    return {**panel._asdict(), "lines": lines}


def _times_data(times: Times | None) -> Row | None:
    if times is None:
        return None
    phases = [
        {"name": phase, "colour": PHASES.index(phase), "seconds": [round(value, 3) for value in seconds]}
        for phase, seconds in times.by_phase.items()
    ]
    return {"labels": times.labels, "step_by_step": times.step_by_step, "phases": phases}


def _anomaly_data(groups: Sequence[Series]) -> list[Row]:
    return [
        {
            "series": number,
            "run": run.name,
            "first": first,
            "last": last,
            "seconds": [run.clock.get(step, run.wall_clock) for step in (first, last)],
            "text": text,
        }
        for number, series in enumerate(groups)
        for run in series.runs
        for first, last, text in run.anomalies
    ]


def collect_responses(runs: Sequence[LoggedRun]) -> list[Row]:
    """Of each run those of evenly spread steps, as many as the page has room for."""
    rows: list[Row] = []
    for number, run in enumerate(runs):
        kept = steps_within(run.completions, MAX_CHARACTERS // len(runs))
        rows += [_response(number, row) for row in run.completions if row["step"] in kept]
    return rows


def _response(run: int, row: Row) -> Row:
    """What the page needs of a row, each of the kind it should be: it may be another program's, or another time's."""
    answer, reward, tokens = row.get("answer", ""), row.get("reward"), row.get("tokens")
    response = {
        "run": run,
        "step": row["step"],
        "phase": str(row.get("phase", "eval")),
        "question": str(row.get("question", "")),
        "answer": " or ".join(map(str, answer)) if isinstance(answer, list) else str(answer),
        "response": str(row.get("response", "")),
    }
    if "reward" in row:
        response["reward"] = reward if is_number(reward) else None
    known = {*response, "tokens", *OF_TOKENS}
    response["facts"] = {name: show(value) for name, value in row.items() if name not in known}
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        response["tokens"] = tokens
        response |= {name: row[name] for name in OF_TOKENS if name in row and _fits(row[name], len(tokens))}
    return response


def _fits(value: Any, n_tokens: int) -> bool:
    """Whether it is a number, or a list with one for each token or null."""
    if isinstance(value, list):
        return len(value) == n_tokens and all(one is None or is_number(one) for one in value)
    return is_number(value)
