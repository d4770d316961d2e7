"""How often a model was right, by question: `python drivers/pass_rates.py EVALUATION/completions.jsonl --output FILE`.

The file is one of questions again, each line with its `pass_rate`: what is too easy or too hard can be left out, and
`train.py --curriculum-steps` begins with what is easy.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.tasks.questions import read_jsonl


@dataclass(frozen=True)
class PassRatesConfig:
    """Turn an evaluation with --n-samples into a data file whose lines have a `pass_rate`."""

    completions: tyro.conf.Positional[tuple[str, ...]] = ()
    """completions.jsonl of evaluate.py; of several, the responses to a question are taken together."""
    output: str | None = None
    """File to write: jsonl with `question`, `answer`, `pass_rate` and `n_samples`."""
    min_pass_rate: float = 0.0
    """Leave out questions with a lower one: 0.1 leaves out what is never right."""
    max_pass_rate: float = 1.0
    """Leave out questions with a higher one: 0.9 leaves out what is always right."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise UsageError(
                f"min_pass_rate={self.min_pass_rate} and max_pass_rate={self.max_pass_rate}: from 0 to 1 is required, "
                "and the first not above the second"
            )


def measure_pass_rates(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each question, in the order in which they come; of `where` and row of each response.

    Right is an answer reward of 1, or a reward of 1 where there is none of it. What could not be scored does not
    count, and a question without a scored response has the pass rate None.
    """
    questions = dict[str, dict[str, Any]]()
    scored = dict[str, list[bool]]()
    for where, row in rows:
        missing = [name for name in ("question", "answer", "reward") if name not in row]
        if missing:
            raise UsageError(f"{where}: no `{missing[0]}`; a completions.jsonl of evaluate.py is required")
        if "step" in row:
            raise UsageError(f"{where}: is of a training run, whose model changes; one of evaluate.py is required")
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
    """Read, measure, leave out, write at once, and tell what there was. Returns the rows written."""
    if not config.completions or config.output is None:
        raise UsageError("a completions.jsonl of evaluate.py and --output, a file to write, are required")
    rows = [(f"{name}:{number}", row) for name in config.completions for number, row in read_jsonl(Path(name))]
    asked = measure_pass_rates(rows)
    rated = [row for row in asked if row["pass_rate"] is not None]
    kept = [row for row in rated if config.min_pass_rate <= row["pass_rate"] <= config.max_pass_rate]
    never, always = (sum(row["pass_rate"] == rate for row in rated) for rate in (0, 1))
    print(
        f"{len(asked)} questions, {len(rows)} responses: {never} never right, {always} always, "
        f"{len(rated) - never - always} between; {len(asked) - len(rated)} could not be scored"
    )
    if not kept:
        raise UsageError(
            f"min_pass_rate={config.min_pass_rate} and max_pass_rate={config.max_pass_rate} leave no question, so "
            "nothing was written"
        )
    target = Path(config.output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(target, kept)
    except OSError as error:
        raise UsageError(f"--output {target}: cannot be written ({error.strerror or error})") from error
    print(f"{target}: {len(kept)} questions")
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        write_pass_rates(tyro.cli(PassRatesConfig, args=None if arguments is None else list(arguments)))
    except UsageError as error:
        exit_with("pass_rates.py", error, status=2)


if __name__ == "__main__":
    main()
