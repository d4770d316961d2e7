"""Countdown puzzles: `python drivers/make_countdown.py` writes data/countdown/; `--reward countdown` grades them.

Every puzzle has a solution, for its target is what a random expression of its numbers comes to. The held-out set is
split off by numbers: no set of numbers that is asked there is ever trained on, with any target.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.settings.base import check_number

PATIENCE = 1000
"""Puzzles in a row that are no use, after which there are taken to be no more."""


@dataclass(frozen=True)
class CountdownConfig:
    """Write Countdown puzzles: train.jsonl and validation.jsonl, each with `question` and `answer`."""

    output_dir: str = "data/countdown"
    """Folder for the two files."""
    n_train: int = 8192
    """Puzzles to train on. Those of a smaller number are the first of a larger one."""
    n_validation: int = 1024
    """Held-out puzzles, each with numbers of its own."""
    sizes: tuple[int, ...] = (3, 4)
    """How many numbers a puzzle has: one of these, all equally often."""
    largest_number: int = 99
    """Numbers are drawn from 1 to this."""
    largest_target: int = 99
    """Targets are whole numbers from 1 to this."""
    seed: int = 0
    """The same seed makes the same files."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "largest_number", "largest_target"):
            check_number(name, getattr(self, name), "must be greater than 0", above=0)
        if not self.sizes or not all(2 <= size <= 8 for size in self.sizes):
            raise UsageError(f"sizes={' '.join(map(str, self.sizes))}: from 2 to 8 numbers are required, `3 4`, say")


def make_countdown(config: CountdownConfig) -> dict[str, list[dict[str, str]]]:
    """Rows of {"question", "answer"} for each split."""
    puzzles = _puzzles(config)
    splits: dict[str, list[dict[str, str]]] = {"validation": [], "train": []}
    held_out, seen = set[tuple[int, ...]](), set[tuple[tuple[int, ...], int]]()
    for split, wanted in (("validation", config.n_validation), ("train", config.n_train)):
        rows, useless = splits[split], 0
        while len(rows) < wanted:
            numbers, target = next(puzzles)
            key = tuple(sorted(numbers))
            if key in held_out or (key, target) in seen:
                useless += 1
                if useless == PATIENCE:
                    raise UsageError(
                        f"n_{split}={wanted}: no more than {len(rows)} different puzzles were found; raise "
                        "--largest-number or --largest-target, add larger --sizes, or ask for fewer"
                    )
                continue
            useless = 0
            seen.add((key, target))
            if split == "validation":
                held_out.add(key)
            rows.append(_row(numbers, target))
    return splits


def _puzzles(config: CountdownConfig) -> Iterator[tuple[list[int], int]]:
    """Without end: numbers, and a target that they can be brought to."""
    rng = random.Random(config.seed)
    while True:
        numbers = [rng.randint(1, config.largest_number) for _ in range(rng.choice(config.sizes))]
        values = [Fraction(number) for number in numbers]
        while len(values) > 1:
            left, right = (values.pop(rng.randrange(len(values))) for _ in range(2))
            operations = [left + right, left - right, left * right, *([left / right] if right else [])]
            values.append(rng.choice(operations))
        if values[0].denominator == 1 and 1 <= values[0] <= config.largest_target:
            yield numbers, int(values[0])


def _row(numbers: Sequence[int], target: int) -> dict[str, str]:
    *most, last = map(str, numbers)
    question = (
        f"Write an expression that equals {target}, with each of the numbers {', '.join(most)} and {last} exactly "
        "once, and with +, -, *, / and parentheses."
    )
    return {"question": question, "answer": json.dumps({"numbers": list(numbers), "target": target})}


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        config = tyro.cli(CountdownConfig, args=None if arguments is None else list(arguments))
        for split, rows in make_countdown(config).items():
            path = Path(config.output_dir) / f"{split}.jsonl"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(path, rows)
            except OSError as error:
                raise UsageError(f"--output-dir {config.output_dir}: {path} cannot be written ({error})") from error
            print(f"{path}: {len(rows)} puzzles")
    except UsageError as error:
        exit_with("make_countdown.py", error, status=2)


if __name__ == "__main__":
    main()
