"""Measure pass rates by question: `python drivers/pass_rates.py EVALUATION/completions.jsonl --output FILE`.

The output is a file of questions with a `pass_rate` each. Questions that are too easy or too hard can be dropped, and
`train.py --curriculum-steps` starts with easy ones.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_on_user_error, fit_help
from drivers.common.errors import UsageError
from drivers.tasks.questions import read_jsonl


@dataclass(frozen=True)
class PassRatesConfig:
    """Turn an evaluation with --n-samples into a data file whose lines have a `pass_rate`."""

    completions: tyro.conf.Positional[tuple[str, ...]] = ()
    """completions.jsonl of evaluate.py; with several files, the responses to a question are pooled."""
    output: str | None = None
    """File to write: jsonl with `question`, `answer`, `pass_rate` and `n_samples`."""
    min_pass_rate: float = 0.0
    """Drop questions with a lower rate: 0.1 drops those that are never answered correctly."""
    max_pass_rate: float = 1.0
    """Drop questions with a higher rate: 0.9 drops those that are always answered correctly."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise UsageError(
                f"min_pass_rate={self.min_pass_rate} and max_pass_rate={self.max_pass_rate}: both must be from 0 "
                "to 1, and the first at most the second"
            )


def measure_pass_rates(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row per question, in order of appearance; `rows` are pairs of `file:line` and a row of completions.

    A response is correct if its answer reward is 1, or its reward if there is no answer reward. Responses that could
    not be scored do not count; a question without scored responses has the pass rate None.
    """
    questions = dict[str, dict[str, Any]]()
    scored = dict[str, list[bool]]()
    for where, row in rows:
        missing = [name for name in ("question", "answer", "reward") if name not in row]
        if missing:
            raise UsageError(f"{where}: no `{missing[0]}`; expected a completions.jsonl of evaluate.py")
        if "step" in row:
            raise UsageError(
                f"{where}: this is a training run, whose model changes; expected a completions.jsonl of evaluate.py"
            )
        question = {"question": row["question"], "answer": row["answer"]}
        key = json.dumps(question)
        questions.setdefault(key, question)
        value = row.get("answer_reward", row["reward"])
        scored.setdefault(key, []).extend([] if row["reward"] is None or value is None else [value == 1])
    return [
        {**question, "pass_rate": fmean(scored[key]) if scored[key] else None, "n_samples": len(scored[key])}
        for key, question in questions.items()
    ]


def write_pass_rates(config: PassRatesConfig) -> list[dict[str, Any]]:
    """Read completions, write the questions in the range, print a summary, and return the rows written."""
    if not config.completions or config.output is None:
        raise UsageError("no input or no output: pass a completions.jsonl of evaluate.py and --output FILE")
    rows = [(f"{name}:{number}", row) for name in config.completions for number, row in read_jsonl(Path(name))]
    questions = measure_pass_rates(rows)
    rated = [row for row in questions if row["pass_rate"] is not None]
    kept = [row for row in rated if config.min_pass_rate <= row["pass_rate"] <= config.max_pass_rate]
    never, always = (sum(row["pass_rate"] == rate for row in rated) for rate in (0, 1))
    print(
        f"{len(questions)} questions, {len(rows)} responses: {never} never correct, {always} always, "
        f"{len(rated) - never - always} between; {len(questions) - len(rated)} could not be scored"
    )
    if not kept:
        raise UsageError(
            f"min_pass_rate={config.min_pass_rate} and max_pass_rate={config.max_pass_rate} exclude all questions; "
            "nothing was written"
        )
    target = Path(config.output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(target, kept)
    except OSError as error:
        raise UsageError(f"--output {target}: cannot write ({error.strerror or error})") from error
    print(f"{target}: {len(kept)} questions")
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the file."""
    with exit_on_user_error("pass_rates.py"):
        with fit_help():
            config = tyro.cli(PassRatesConfig, args=arguments)
        write_pass_rates(config)


if __name__ == "__main__":
    main()
