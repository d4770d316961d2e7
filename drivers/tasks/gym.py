"""Procedural tasks of reasoning-gym as questions. `--reward gym` grades them."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from drivers.common.cli import check_number
from drivers.common.errors import UsageError, suggest

MAX_TRIES = 20
"""Entries generated per wanted question, because some tasks repeat themselves."""

Reward = Callable[[str, str], Mapping[str, float]]
"""From a response and the answer of a row to a dictionary with `reward`."""


@dataclass(frozen=True)
class GymConfig:
    """Write tasks of reasoning-gym: train.jsonl and validation.jsonl, each with `question` and `answer`."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tasks."""
    params: tuple[str, ...] = ()
    """Parameters of a single task, each `name=value` with the value in JSON: `min_terms=2`."""
    output_dir: str = "data/gym"
    """Folder for the two files."""
    n_train: int = 1024
    """Training questions per task."""
    n_validation: int = 128
    """Held-out questions per task. No question is in both files."""
    seed: int = 0
    """Random seed of the questions and their order."""
    list: bool = False
    """Print the names of all tasks and exit."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation"):
            check_number(name, getattr(self, name), 1, "must be greater than 0")
        check_number("seed", self.seed, 0, "must not be negative")


def make_gym(config: GymConfig, reward: Reward) -> dict[str, list[dict[str, str]]]:
    """Return rows of {"question", "answer"} for each split.

    `reward` must give each entry's own answer the score that the task gives it.
    """
    if not config.tasks:
        raise UsageError("no task given: name one or several tasks; --list prints all names")
    if config.params and len(config.tasks) > 1:
        raise UsageError(
            f"--params {' '.join(config.params)}: parameters apply to a single task, but {len(config.tasks)} are "
            "given; write one data set per task"
        )
    parameters = _parse_params(config.params)
    splits: dict[str, list[dict[str, str]]] = {"validation": [], "train": []}
    for task in dict.fromkeys(config.tasks):
        rows = list(_make_rows(config, task, parameters, reward))
        splits["validation"] += rows[: config.n_validation]
        splits["train"] += rows[config.n_validation :]
    for rows in splits.values():
        random.Random(config.seed).shuffle(rows)
    return splits


def _make_rows(
    config: GymConfig, task: str, parameters: Mapping[str, Any], reward: Reward
) -> Iterator[dict[str, str]]:
    """Yield as many different questions of a task as both files need."""
    n_wanted, seen = config.n_train + config.n_validation, set[str]()
    dataset = _create_dataset(task, {**parameters, "seed": config.seed, "size": MAX_TRIES * n_wanted})
    for index in range(MAX_TRIES * n_wanted):
        entry = dataset[index]
        question, known = entry["question"], {"answer": entry["answer"], "metadata": entry["metadata"]}
        if question in seen:
            continue
        try:
            answer = json.dumps({"task": task, "parameters": parameters, "entry": known})
        except TypeError as error:
            raise UsageError(
                f"{task}: unsupported task; its verifier's data cannot be written as JSON ({error})"
            ) from error
        own = (known["answer"] or "").strip()  # some tasks have only a verifier
        if own and reward(f"</think> <answer> {own} </answer>", answer)["reward"] != dataset.score_answer(own, entry):
            raise UsageError(
                f"{task}: unsupported task; its verifier rejects its own answer after a JSON round trip (tuples "
                "become lists)"
            )
        seen.add(question)
        yield {"question": question, "answer": answer}
        if len(seen) == n_wanted:
            return
    raise UsageError(
        f"{task}: {MAX_TRIES * n_wanted} entries contain only {len(seen)} different questions, and --n-train plus "
        f"--n-validation is {n_wanted}; lower them, or pass --params for more variety"
    )


def _create_dataset(task: str, parameters: Mapping[str, Any]) -> Any:
    names = task_names()
    if task not in names:
        raise UsageError(f"{task}: unknown task of reasoning-gym; --list prints all names{suggest(task, names)}")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, **parameters)
    except Exception as error:  # its own checks are assertions
        own = {name: value for name, value in parameters.items() if name not in ("seed", "size")}
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{task}: cannot be created with --params {own} ({reason})") from error


def task_names() -> list[str]:
    """Return the names of all tasks of reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UsageError(
            "the package reasoning-gym is not installed; in this clone, run: .venv/bin/pip install -e '.[gym]'"
        ) from error
    return sorted(reasoning_gym.factory.DATASETS)


def _parse_params(params: Sequence[str]) -> dict[str, Any]:
    parameters = {}
    for entry in params:
        name, sign, value = entry.partition("=")
        if not (name.isidentifier() and sign) or name in ("seed", "size"):
            raise UsageError(
                f"--params {entry}: expected name=value, like min_terms=2; seed and size follow from other flags"
            )
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters
