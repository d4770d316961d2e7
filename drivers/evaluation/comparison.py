"""Read an earlier evaluation and print the comparison with it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from drivers.common.display import Screen, one_line
from drivers.common.errors import UsageError
from drivers.common.wrapping import print_line
from drivers.evaluation.outcomes import CATEGORIES, Row
from drivers.settings.base import spell_flag
from drivers.settings.evaluate import EvaluateConfig
from drivers.tasks.questions import Example, read_jsonl

Values = dict[str, dict[str, float]]
Rows = dict[str, list[Row]]


class Evaluation(NamedTuple):
    """Metrics and responses by data set."""

    values: Values
    rows: Rows


_SAMPLING_SETTINGS = (
    "prompt_path", "chat_template", "system_prompt_path", "chat_template_args", "chat_date",
    "sampling_temperature", "sampling_top_p", "sampling_top_k", "sampling_min_p",
    "sampling_min_tokens", "sampling_max_tokens", "sampling_stop",
)  # fmt: skip
"""Settings that may differ between two evaluations, because their effect may be the question; a warning names them."""


def read_earlier(config: EvaluateConfig, sets: Mapping[str, Sequence[Example]]) -> Evaluation | None:
    """Return an earlier evaluation of the same data sets, or None if `compare_to` is not the folder of one.

    Raise UsageError if its questions, its number of responses or its reward differ from those of this evaluation.
    """
    folder = Path(config.compare_to or "")
    if not (folder / "results.json").exists():
        if (folder / "metrics.jsonl").exists():
            raise UsageError(
                f"--compare-to {folder}: is the folder of a run; give a model, such as {folder / 'final_model'}, or "
                "the folder of an evaluation"
            )
        return None
    try:
        written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        values = dict(written["results"])
        before = {name: written["config"][name] for name in ("reward", "reward_mix", *_SAMPLING_SETTINGS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"--compare-to {folder}: results.json cannot be read ({reason})") from error
    _check_settings(folder, before, json.loads(json.dumps(asdict(config))))
    rows = _read_responses(folder, config, sets, values)
    return Evaluation({name: values[name] for name in sets}, rows)


def _check_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UsageError if the reward differs; warn if the sampling does."""
    for name in ("reward", "reward_mix"):
        if before[name] != now[name]:
            raise UsageError(
                f"--compare-to {folder}: was graded with {_spell(name, before[name])} instead of {now[name]}; grade "
                "both evaluations alike"
            )
    differing = [name for name in _SAMPLING_SETTINGS if before[name] != now[name]]
    if differing:
        listed = ", ".join(f"{_spell(name, before[name])} (here {now[name]})" for name in differing)
        print_line(f"warning: --compare-to {folder}: was sampled with {listed}", sys.stderr)


def _spell(name: str, value: Any) -> str:
    """Return a setting that was read from JSON, which has lists instead of tuples, as it is typed."""
    return spell_flag(name, tuple(value) if isinstance(value, list) else value)


def _read_responses(
    folder: Path, config: EvaluateConfig, sets: Mapping[str, Sequence[Example]], values: Values
) -> Rows:
    """Read the responses of an earlier evaluation by data set."""
    all_rows = [row for _, row in read_jsonl(folder / "completions.jsonl")]
    rows: Rows = {}
    for name, examples in sets.items():
        expected = [(example.question, example.answer) for example in examples for _ in range(config.n_samples)]
        rows[name] = [row for row in all_rows if row.get("dataset") == name]
        if name not in values or [(row.get("question"), row.get("answer")) for row in rows[name]] != expected:
            raise UsageError(
                f"--compare-to {folder}: its responses are not {config.n_samples} to each of the {len(examples)} "
                f"questions of {name}; evaluate both with the same --data-path, --n-examples and --n-samples"
            )
    return rows


def count_asked(n_questions: int, n_samples: int) -> str:
    """Return the number of questions and of responses in words."""
    return f"{n_questions} question{'s' * (n_questions > 1)}, {n_samples} response{'s' * (n_samples > 1)} to each"


def print_results(
    name: str,
    config: EvaluateConfig,
    values: Mapping[str, float],
    rows: Sequence[Row],
    difference: Mapping[str, float] | None,
    compared: Mapping[str, float] | None,
) -> None:
    """Print the metrics of a data set, sample responses of each category, and the comparison if there is one."""
    say = Screen().say
    say("")
    say(f"{name}: {count_asked(int(values['n_examples']), config.n_samples)}")
    for key, value in values.items():
        if key.endswith(("_low", "_high")) or key == "n_examples":
            continue
        interval = f"   {values[f'{key}_low']:.4g} to {values[f'{key}_high']:.4g}" if f"{key}_low" in values else ""
        say(f"  {key:22} {value:.4g}{interval}")
    for category in CATEGORIES:
        for row in [row for row in rows if row["category"] == category][: config.n_shown]:
            say(f"  {category}: {one_line(row['question'])}")
            say(f"    {one_line(row['response'])}  (answer: {row['answer']})")
    if difference is not None and compared is not None and difference["n_compared"]:
        _print_difference(config, difference, compared)


def _print_difference(config: EvaluateConfig, difference: Mapping[str, float], compared: Mapping[str, float]) -> None:
    low, high = difference["difference_low"], difference["difference_high"]
    p_value = f", p = {difference['p_value']:.2g}" if "p_value" in difference else ""
    better, worse, n_compared = (round(difference[key]) for key in ("better_on", "worse_on", "n_compared"))
    Screen().say(
        f"  against {config.compare_to}, accuracy {compared['accuracy']:.4g}: {difference['difference']:+.4f} "
        f"({low:+.4f} to {high:+.4f}{p_value}); better on {better} questions, worse on {worse}, of {n_compared}"
    )
