"""Compare two evaluations."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drivers.common.display import one_line
from drivers.common.errors import UsageError
from drivers.evaluation.outcomes import CATEGORIES, Row
from drivers.settings.evaluate import EvaluateConfig
from drivers.tasks.questions import Example, read_jsonl

Values = dict[str, dict[str, float]]


Rows = dict[str, list[Row]]


def read_earlier(config: EvaluateConfig, sets: Mapping[str, Sequence[Example]]) -> tuple[Values, Rows] | None:
    """Numbers and responses of an earlier evaluation, by data set: the same questions, each asked and graded alike.

    None if `compare_to` is no folder of one: then it is a model.
    """
    where = Path(config.compare_to or "")
    if not (where / "results.json").exists():
        if (where / "metrics.jsonl").exists():
            raise UsageError(
                f"--compare-to {where}: is the folder of a run; a model, as {where / 'final_model'}, or the folder of "
                "an evaluation is required"
            )
        return None
    try:
        written = json.loads((where / "results.json").read_text(encoding="utf-8"))
        before, values = written["config"], dict(written["results"])
        asked = {name: before[name] for name in ("reward", "reward_mix", *_ASKED_ALIKE)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--compare-to {where}: results.json cannot be read ({type(error).__name__}: {error})"
        ) from error
    now: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for name in ("reward", "reward_mix"):
        if asked[name] != now[name]:
            raise UsageError(
                f"--compare-to {where}: was graded with {name}={asked[name]}, and this is {now[name]}; grade both "
                "alike"
            )
    others = [f"{name}={asked[name]} (here {now[name]})" for name in _ASKED_ALIKE if asked[name] != now[name]]
    if others:
        print(f"warning: --compare-to {where}: was asked with {', '.join(others)}", file=sys.stderr)
    rows = [row for _, row in read_jsonl(where / "completions.jsonl")]
    found: Rows = {}
    for name, examples in sets.items():
        expected = [(one.question, one.answer) for one in examples for _ in range(config.n_samples)]
        found[name] = [row for row in rows if row.get("dataset") == name]
        if name not in values or [(row.get("question"), row.get("answer")) for row in found[name]] != expected:
            raise UsageError(
                f"--compare-to {where}: its responses are not {config.n_samples} to each of the {len(examples)} "
                f"questions of {name}; evaluate both with the same --data-path, --n-examples and --n-samples"
            )
    return values, found


_ASKED_ALIKE = (
    "prompt_path",
    "chat_template",
    "system_prompt_path",
    "sampling_temperature",
    "sampling_top_p",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "sampling_stop",
)
"""Settings whose difference may be what is to be measured; it is told."""


def flatten(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for of_set in rows.values() for row in of_set]


def print_results(
    name: str,
    config: EvaluateConfig,
    values: Mapping[str, float],
    rows: Sequence[Row],
    difference: Mapping[str, float] | None,
    compared: Mapping[str, float] | None,
) -> None:
    """What the terminal shows of a data set: numbers with their intervals, examples of each category, and who won."""
    print(f"\n{name}: {int(values['n_examples'])} questions, {config.n_samples} responses to each")
    for key, value in values.items():
        if key.endswith(("_low", "_high")) or key == "n_examples":
            continue
        interval = f"   {values[f'{key}_low']:.4g} to {values[f'{key}_high']:.4g}" if f"{key}_low" in values else ""
        print(f"  {key:22} {value:.4g}{interval}")
    for category in CATEGORIES:
        of_it = [row for row in rows if row["category"] == category]
        for row in of_it[: config.n_shown]:
            print(f"  {category}: {one_line(row['question'])}")
            print(f"    {one_line(row['response'])}  (answer: {row['answer']})")
    if difference is not None and compared is not None and difference["n_compared"]:
        low, high = difference["difference_low"], difference["difference_high"]
        p_value = f", p = {difference['p_value']:.2g}" if "p_value" in difference else ""
        better, worse, n = (round(difference[key]) for key in ("better_on", "worse_on", "n_compared"))
        print(
            f"  against {config.compare_to}, accuracy {compared['accuracy']:.4g}: {difference['difference']:+.4f} "
            f"({low:+.4f} to {high:+.4f}{p_value}); better on {better} questions, worse on {worse}, of {n}"
        )
