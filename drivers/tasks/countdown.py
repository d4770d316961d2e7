"""Countdown puzzles: reach a target with an expression of given numbers. `--reward countdown` grades them."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from drivers.common.cli import check_number
from drivers.common.errors import UsageError

MAX_REPEATS = 1000
"""Repeated puzzles in a row after which the generator gives up."""


@dataclass(frozen=True)
class CountdownConfig:
    """Write Countdown puzzles: train.jsonl and validation.jsonl, each with `question` and `answer`."""

    output_dir: str = "data/countdown"
    """Folder for the two files."""
    n_train: int = 8192
    """Training puzzles. A smaller number gives the first puzzles of a larger one."""
    n_validation: int = 1024
    """Held-out puzzles. Their sets of numbers do not occur in training puzzles."""
    sizes: tuple[int, ...] = (3, 4)
    """Numbers per puzzle: one of these sizes, all equally likely."""
    largest_number: int = 99
    """Draw numbers from 1 to this number."""
    largest_target: int = 99
    """Use integer targets from 1 to this number."""
    seed: int = 0
    """Random seed; the same seed writes the same files."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "largest_number", "largest_target"):
            check_number(name, getattr(self, name), 1, "must be greater than 0")
        if not self.sizes or not all(2 <= size <= 8 for size in self.sizes):
            typed = " ".join(["--sizes", *map(str, self.sizes)])
            raise UsageError(f"{typed}: each size must be from 2 to 8; pass `--sizes 3 4`")


def make_countdown(config: CountdownConfig) -> dict[str, list[dict[str, str]]]:
    """Return rows of {"question", "answer"} for each split.

    Held-out puzzles come first: a set of numbers that is held out is never used for training, with any target.
    """
    puzzles = _draw_puzzles(config)
    splits: dict[str, list[dict[str, str]]] = {"validation": [], "train": []}
    held_out, seen = set[tuple[int, ...]](), set[tuple[tuple[int, ...], int]]()
    for split, n_wanted in (("validation", config.n_validation), ("train", config.n_train)):
        rows, n_repeats = splits[split], 0
        while len(rows) < n_wanted:
            numbers, target = next(puzzles)
            key = tuple(sorted(numbers))
            if key in held_out or (key, target) in seen:
                n_repeats += 1
                if n_repeats == MAX_REPEATS:
                    raise UsageError(
                        f"--n-{split} {n_wanted}: only {len(rows)} different puzzles were found; raise "
                        "--largest-number or --largest-target, add larger --sizes, or ask for fewer"
                    )
                continue
            n_repeats = 0
            seen.add((key, target))
            if split == "validation":
                held_out.add(key)
            rows.append(_make_row(numbers, target))
    return splits


def _draw_puzzles(config: CountdownConfig) -> Iterator[tuple[list[int], int]]:
    """Yield numbers and a target that some expression of them reaches."""
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


def _make_row(numbers: Sequence[int], target: int) -> dict[str, str]:
    *most, last = map(str, numbers)
    question = (
        f"Write an expression that equals {target}, with each of the numbers {', '.join(most)} and {last} exactly "
        "once, and with +, -, *, / and parentheses."
    )
    return {"question": question, "answer": json.dumps({"numbers": list(numbers), "target": target})}
