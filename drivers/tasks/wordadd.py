"""Word problems of addition, the data of the quickstarts: `python -m drivers.tasks.wordadd` writes data/wordadd/.

The split is by operand pair: no sum of the held-out set occurs in training, in any wording.
"""

import random
import re
from collections.abc import Sequence

from drivers.common.atomic_files import write_jsonl
from drivers.common.paths import repository_path

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella")
THINGS = ("apples", "books", "coins", "marbles", "shells", "cards")
TEMPLATES = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "{name} buys {a} {things}, then {b} more. How many {things} in total?",
    "There are {a} {things} in a box and {b} in a bag. How many {things} in all?",
)
SHOTS = ((35, 2), (47, 2))
"""The pairs that the prompt solves; they stay in the training set."""
HELD_OUT_SHARE = 0.2
WORDINGS_PER_PAIR = 4
WRONG_SHARE = 0.3
"""Share of wrong demonstrations, so that filtering them matters."""


def make_wordadd(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Return rows of {"question", "answer"} for each split."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 61) for b in range(2, 10)]
    candidates = [pair for pair in pairs if pair not in SHOTS]
    held_out = set(rng.sample(candidates, round(HELD_OUT_SHARE * len(pairs))))
    splits: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "validation"):
        rows = []
        for a, b in (pair for pair in pairs if (pair in held_out) == (split == "validation")):
            texts = [
                template.format(name=name, a=a, b=b, things=things)
                for template in TEMPLATES
                for name in (NAMES if "{name}" in template else NAMES[:1])
                for things in THINGS
            ]
            rows += [{"question": text, "answer": str(a + b)} for text in rng.sample(texts, WORDINGS_PER_PAIR)]
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def make_demonstrations(rows: Sequence[dict[str, str]], seed: int = 0) -> list[dict[str, str]]:
    """Return each row with a response in the form of the prompt's examples; three of ten have a wrong sum."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(rows)), round(WRONG_SHARE * len(rows))))
    demonstrations = []
    for place, row in enumerate(rows):
        a, b = re.findall(r"\d+", row["question"])
        shift = rng.choice([by for by in range(-9, 10) if by])
        result = int(a) + int(b) + (shift if place in wrong else 0)
        response = f" {a} + {b} = {result} </think> <answer> {result} </answer>"
        demonstrations.append({**row, "response": response})
    return demonstrations


def main() -> None:
    """Write the files."""
    folder = repository_path("data") / "wordadd"
    splits = make_wordadd()
    for split, rows in {**splits, "sft": make_demonstrations(splits["train"])}.items():
        path = folder / f"{split}.jsonl"
        write_jsonl(path, rows)
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
