"""The procedural tasks of reasoning-gym as data files: `python drivers/make_gym.py chain_sum leg_counting`.

They are graded by `--reward drivers.grading.gym:reward --sampling-stop "</answer>"`.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.settings.base import check_number

TRIES = 20
"""Times as many entries as are wanted are made at most, where a task repeats itself."""


@dataclass(frozen=True)
class GymConfig:
    """Write tasks of reasoning-gym: train.jsonl and validation.jsonl, each with `question` and `answer`."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tasks."""
    params: tuple[str, ...] = ()
    """Parameters of a single task, `name=value` each, the value in JSON: `min_terms=2`."""
    output_dir: str = "data/gym"
    """Folder for the two files."""
    n_train: int = 1024
    """Questions to train on, of each task."""
    n_validation: int = 128
    """Held-out questions, of each task. No question is in both files, which two seeds would not ensure."""
    seed: int = 0
    """Of the questions and of their order."""
    list: bool = False
    """Tell the names of all tasks, and end."""

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation"):
            check_number(name, getattr(self, name), "must be greater than 0", above=0)
        check_number("seed", self.seed, "must not be negative", least=0)


def make_gym(config: GymConfig) -> dict[str, list[dict[str, str]]]:
    """Rows of {"question", "answer"} for each split."""
    if not config.tasks:
        raise UsageError("no task given: name one or several; --list tells all")
    if config.params and len(config.tasks) > 1:
        raise UsageError(
            f"--params {' '.join(config.params)}: are those of a single task; {len(config.tasks)} are given"
        )
    parameters = _parse(config.params)
    splits: dict[str, list[dict[str, str]]] = {"validation": [], "train": []}
    for task in dict.fromkeys(config.tasks):
        rows = list(_rows(config, task, parameters))
        splits["validation"] += rows[: config.n_validation]
        splits["train"] += rows[config.n_validation :]
    for rows in splits.values():
        random.Random(config.seed).shuffle(rows)
    return splits


def _rows(config: GymConfig, task: str, parameters: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Different questions of a task, as many as both files need. Each is checked to be graded as it is there."""
    from drivers.grading.gym import reward

    wanted, seen = config.n_train + config.n_validation, set[str]()
    dataset = _create(task, {**parameters, "seed": config.seed, "size": TRIES * wanted})
    for index in range(TRIES * wanted):
        entry = dataset[index]
        question, known = entry["question"], {"answer": entry["answer"], "metadata": entry["metadata"]}
        if question in seen:
            continue
        try:
            answer = json.dumps({"task": task, "parameters": parameters, "entry": known})
        except TypeError as error:
            raise UsageError(f"{task}: what its verifier needs cannot be written as JSON ({error})") from error
        own = (known["answer"] or "").strip()  # some tasks have none, and a verifier alone
        if own and reward(f"</think> <answer> {own} </answer>", answer)["reward"] != dataset.score_answer(own, entry):
            raise UsageError(
                f"{task}: cannot be used: its verifier does not know its own answer any more once that has been JSON, "
                "which has no tuples"
            )
        seen.add(question)
        yield {"question": question, "answer": answer}
        if len(seen) == wanted:
            return
    raise UsageError(
        f"{task}: {TRIES * wanted} tries gave {len(seen)} different questions, and n_train + n_validation = {wanted} "
        "are wanted: lower them, or pass --params for a wider choice"
    )


def _create(task: str, parameters: Mapping[str, Any]) -> Any:
    """The generator of a task."""
    names = task_names()
    if task not in names:
        near = ", ".join(get_close_matches(task, names)) or "no name is near it"
        raise UsageError(f"{task}: is no task of reasoning-gym ({near}); --list tells all")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, **parameters)
    except Exception as error:  # its own checks are assertions
        own = {name: value for name, value in parameters.items() if name not in ("seed", "size")}
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{task}: cannot be made with --params {own} ({reason})") from error


def task_names() -> list[str]:
    """Of the package, if it is there."""
    try:
        import drivers.grading.gym  # noqa: F401  it says what is missing
    except ImportError as error:
        raise UsageError(str(error)) from error
    import reasoning_gym

    return sorted(reasoning_gym.factory.DATASETS)


def _parse(params: Sequence[str]) -> dict[str, Any]:
    parameters = {}
    for entry in params:
        name, sign, value = entry.partition("=")
        if not (name.isidentifier() and sign) or name in ("seed", "size"):
            raise UsageError(
                f"--params {entry}: name=value is required, like min_terms=2; seed and size have own flags"
            )
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        config = tyro.cli(GymConfig, args=None if arguments is None else list(arguments))
        if config.list:
            print("\n".join(task_names()))
            return
        task_names()
        for split, rows in make_gym(config).items():
            path = Path(config.output_dir) / f"{split}.jsonl"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(path, rows)
            except OSError as error:
                raise UsageError(f"--output-dir {config.output_dir}: {path} cannot be written ({error})") from error
            print(f"{path}: {len(rows)} questions")
    except UsageError as error:
        exit_with("make_gym.py", error, status=2)


if __name__ == "__main__":
    main()
