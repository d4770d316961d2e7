"""Write runs as one self-contained HTML page."""

import base64
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from drivers.common.atomic_files import write_text
from drivers.common.display import clock
from drivers.common.errors import UsageError, first_line
from drivers.reports.curves import DARK_PALETTE, PALETTE, draw, explain_ranges, format_steps
from drivers.reports.logged_run import (
    PHASES,
    Estimate,
    LoggedRun,
    Row,
    Series,
    differing_settings,
    format_setting,
    group_runs,
    is_number,
    read_runs,
)
from drivers.reports.series import Panel, Times, downsample, make_panels, make_times, steps_within

MAX_POINTS = 16_000
"""Points of all lines on a page."""
MAX_POINTS_PER_LINE = 400
"""More points than this cannot be seen."""
MAX_CHARACTERS = 1_500_000
"""Characters of the responses on a page."""
SUMMARY_NOTE = (
    "Accuracies are on held-out questions, with a 95 % interval over questions; for several runs, the mean with the "
    "minimum and the maximum. Wall-clock time is the logged time and excludes loading models."
)
TOKEN_VALUES = ("log_probs", "sampler_log_probs", "entropy", "advantage")
"""Values of completions.jsonl that the page can color tokens by."""


def write_report(folders: Sequence[Path], output: Path, title: str) -> Path:
    """Write report.html, curves.png and curves-by-time.png, and return the path of the page."""
    runs = read_runs(folders)
    groups = group_runs(runs)
    page = make_page(runs, groups, title)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "report.html", page)
        for name, by_time in (("curves.png", False), ("curves-by-time.png", True)):
            _draw_or_warn(groups, output / name, title, by_time=by_time)
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written to ({error.strerror or error})") from error
    return output / "report.html"


def _draw_or_warn(groups: Sequence[Series], target: Path, title: str, *, by_time: bool) -> None:
    """Draw a picture; warn if it cannot be drawn, because the page is complete without it."""
    try:
        draw(groups, target, title, by_time=by_time)
    except OSError:
        raise
    except Exception as error:
        print(f"warning: {target} could not be drawn ({type(error).__name__}: {first_line(error)})", file=sys.stderr)


def make_page(runs: Sequence[LoggedRun], groups: Sequence[Series], title: str) -> str:
    """Fill the template. Escape all logged text: as HTML here, and in the data as JSON without tags."""
    script, style = (_read_part(f"page.{kind}") for kind in ("js", "css"))
    style = _palette_css() + style
    responses, panels, anomalies = collect_responses(runs), make_panels(groups), _anomaly_data(groups)
    max_points = min(MAX_POINTS_PER_LINE, MAX_POINTS // max(1, sum(len(panel.lines) for panel in panels)))
    data = {
        "colors": len(PALETTE),
        "series": [{"name": series.name, "runs": len(series.runs)} for series in groups],
        "runs": [run.name for run in runs],
        "panels": [_panel_data(panel, max_points) for panel in panels],
        "times": _times_data(make_times(groups)),
        "anomalies": anomalies,
        "responses": responses,
    }
    page = Template(_read_part("page.html")).substitute(
        # A second barrier: even with unescaped text, a browser runs no other script and loads nothing.
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; script-src {_policy_hash(script)}; "
        f"style-src {_policy_hash(style)}",
        title=escape(title),
        style=style,
        subtitle=escape(_subtitle(runs, groups)),
        summary=summary_table(groups),
        summary_note=SUMMARY_NOTE,
        curves_note=escape(_curves_note(groups, max_points)),
        anomalies=_anomaly_list(anomalies),
        responses_note=escape(_responses_note(runs, len(responses))),
        settings=_settings_tables(runs),
        data=json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )
    return page.encode("utf-8", errors="backslashreplace").decode()  # a text may hold half of a surrogate pair


def _read_part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _policy_hash(text: str) -> str:
    """Return the name of an allowed script or style in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _palette_css() -> str:
    def variables(palette: Sequence[str]) -> str:
        return ":root{" + "".join(f"--c{number}:{color};" for number, color in enumerate(palette)) + "}"

    return f"{variables(PALETTE)}@media screen and (prefers-color-scheme: dark){{{variables(DARK_PALETTE)}}}\n"


# --- notes -----------------------------------------------------------------------------------------------------------
def _subtitle(runs: Sequence[LoggedRun], groups: Sequence[Series]) -> str:
    programs = ", ".join(dict.fromkeys(run.program for run in runs if run.program))
    count = f"{len(runs)} runs in {len(groups)} series" if len(runs) > 1 else "One run"
    return f"{count} of {programs}" if programs else count


def _curves_note(groups: Sequence[Series], max_points: int) -> str:
    runs = [run for series in groups for run in series.runs]
    if not any(run.rows for run in runs):
        return "Nothing has been logged yet."
    notes = ["Point at a curve, or step through it with the arrow keys.", *explain_ranges(groups)]
    if any(run.anomalies for run in runs):
        notes.append("▲ marks anomalies.")
    n_steps = max(run.steps[0] for run in runs)
    if n_steps > max_points:
        notes.append(f"Of {n_steps} steps, at most {max_points} evenly spaced ones and the last are drawn.")
    return " ".join(notes)


def _responses_note(runs: Sequence[LoggedRun], n_shown: int) -> str:
    n_logged = sum(len(run.completions) for run in runs)
    if not n_logged:
        return "No responses were logged (completions.jsonl)."
    count = f"All {n_logged} responses"
    if n_shown < n_logged:
        count = f"{n_shown} of the {n_logged} responses in completions.jsonl, from evenly spaced steps"
    return f"{count}. Open one to see its tokens."


# --- tables ----------------------------------------------------------------------------------------------------------
def summary_table(groups: Sequence[Series]) -> str:
    """Return a table with a row per run. The mean row of a series of several runs comes before its runs."""
    runs = [run for series in groups for run in series.runs]
    differing = differing_settings(runs)
    has_programs = len({run.program for run in runs}) > 1
    names = ["run", *(["program"] if has_programs else []), "accuracy before", "last", "best", *differing]
    names += ["steps", "wall-clock", "sampled tokens/s", "trained tokens/s", "anomalies"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)

    def row(kind: str, name: str, members: Sequence[LoggedRun]) -> str:
        first = members[0]
        cells = [escape(first.program)] if has_programs else []
        cells += [_accuracy_cell(members, which) for which in ("before", "last", "best")]
        cells += [escape(format_setting(first.settings[key])) if key in first.settings else "" for key in differing]
        cells += [_steps_cell(members), clock(fmean(run.wall_clock for run in members))]
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
        for run in series.runs:
            lines.append(row("member", f"{run.name}, seed {format_setting(run.settings.get('seed'))}", [run]))
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"


def _steps_cell(members: Sequence[LoggedRun]) -> str:
    """Return the number of finished steps, and of planned steps if some are not finished."""
    finished = [run.steps[0] for run in members]
    planned = max(run.steps[1] or 0 for run in members)
    shown = str(max(finished)) if min(finished) == max(finished) else f"{min(finished)} to {max(finished)}"
    return f"{shown} of {planned}" if planned > min(finished) else shown


def accuracy_at(run: LoggedRun, which: str) -> tuple[int, Estimate] | None:
    """Return the step and the accuracy `before` training, of the `last` evaluation after it, or the `best`."""
    trained = {step: estimate for step, estimate in run.accuracies.items() if step > 0}
    if which == "before":
        return (0, run.accuracies[0]) if 0 in run.accuracies else None
    if which == "last":
        return (max(trained), trained[max(trained)]) if trained else None
    return max(run.accuracies.items(), key=lambda item: item[1].value, default=None)


def _accuracy_cell(members: Sequence[LoggedRun], which: str) -> str:
    """Return the mean accuracy with its range over runs, or of a single run with its interval and step."""
    known = [pair for pair in (accuracy_at(run, which) for run in members) if pair is not None]
    if not known:
        return ""
    values = [estimate.value for _, estimate in known]
    if len(members) > 1:
        notes = [f"{min(values):.3f} to {max(values):.3f}"]
    else:
        step, estimate = known[0]
        notes = [] if estimate.low is None else [f"{estimate.low:.3f} to {estimate.high:.3f}"]
        notes += [] if which == "before" else [f"step {step}"]
    return "".join([f"{fmean(values):.3f}", *(f"<small>{note}</small>" for note in notes)])


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.0f}" if known else ""


def _settings_tables(runs: Sequence[LoggedRun]) -> str:
    """Return a collapsed table of settings for each run, which marks the ones that differ."""
    differing = differing_settings(runs)
    tables = []
    for run in runs:
        rows = [(f"{key} (differs)" if key in differing else key, value) for key, value in run.settings.items()]
        lines = "\n".join(
            f'<tr><th scope="row">{escape(key)}</th><td>{escape(format_setting(value))}</td></tr>'
            for key, value in [*rows, *run.environment.items()]
        )
        table = f"<table><tbody>\n{lines}\n</tbody></table>" if lines else "<p>No config.json was found.</p>"
        name = escape(run.name)
        region = f'<div class="scroll" tabindex="0" role="region" aria-label="Settings of {name}">{table}</div>'
        tables.append(f"<details><summary>{name}</summary>{region}</details>")
    return "\n".join(tables)


def _anomaly_list(anomalies: Sequence[Row]) -> str:
    lines = [
        f"<li>{escape(row['run'])}, {format_steps(row['first'], row['last'])}: {escape(row['text'])}</li>"
        for row in anomalies
    ]
    if not lines:
        return ""
    return '<h3>Anomalies</h3>\n<ul class="anomalies" tabindex="0">\n' + "\n".join(lines) + "\n</ul>"


# --- data for the script ---------------------------------------------------------------------------------------------
def _panel_data(panel: Panel, max_points: int) -> Row:
    lines = []
    for line in panel.lines:
        points = [p._replace(seconds=round(p.seconds, 2)) for p in downsample(line.points, max_points)]
        lines.append(line._replace(points=points)._asdict())
    return {**panel._asdict(), "lines": lines}


def _times_data(times: Times | None) -> Row | None:
    if times is None:
        return None
    phases = [
        {"name": phase, "color": PHASES.index(phase), "seconds": [round(value, 3) for value in seconds]}
        for phase, seconds in times.by_phase.items()
    ]
    return {"labels": times.labels, "step_by_step": times.step_by_step, "phases": phases}


def _anomaly_data(groups: Sequence[Series]) -> list[Row]:
    return [
        {
            "series": number,
            "run": run.name,
            "first": anomaly.first_step,
            "last": anomaly.last_step,
            "seconds": [run.clock.get(step, run.wall_clock) for step in (anomaly.first_step, anomaly.last_step)],
            "text": anomaly.text,
        }
        for number, series in enumerate(groups)
        for run in series.runs
        for anomaly in run.anomalies
    ]


def collect_responses(runs: Sequence[LoggedRun]) -> list[Row]:
    """Return the responses of evenly spaced steps; each run gets the same share of the page."""
    rows: list[Row] = []
    for number, run in enumerate(runs):
        steps = steps_within(run.completions, MAX_CHARACTERS // len(runs))
        rows += [_response(number, row) for row in run.completions if row["step"] in steps]
    return rows


def _response(run: int, row: Row) -> Row:
    """Return what the page needs of a row, with checked types: another program may have written the row."""
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
    shown = {*response, "tokens", "sampled", *TOKEN_VALUES}
    response["details"] = {name: format_setting(value) for name, value in row.items() if name not in shown}
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        response["tokens"] = tokens
        response |= {name: row[name] for name in TOKEN_VALUES if _is_token_value(row.get(name), len(tokens))}
        sampled = row.get("sampled")
        if isinstance(sampled, list) and list(map(type, sampled)) == [bool] * len(tokens):
            response["sampled"] = sampled
    return response


def _is_token_value(value: Any, n_tokens: int) -> bool:
    """Return whether a value is a number, or a list with a number or null for each token."""
    if isinstance(value, list):
        return len(value) == n_tokens and all(entry is None or is_number(entry) for entry in value)
    return is_number(value)
