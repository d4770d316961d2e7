"""Write a generated task as data files: `drivers/make_task.py countdown` or `drivers/make_task.py gym TASK`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from drivers.common.atomic_files import write_jsonl
from drivers.common.cli import exit_on_user_error, fit_help
from drivers.common.errors import UsageError
from drivers.tasks.countdown import CountdownConfig, make_countdown
from drivers.tasks.gym import GymConfig, make_gym, task_names

Task = (
    Annotated[CountdownConfig, tyro.conf.subcommand("countdown", prefix_name=False)]
    | Annotated[GymConfig, tyro.conf.subcommand("gym", prefix_name=False)]
)


def make_splits(config: CountdownConfig | GymConfig) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each split of a task."""
    if isinstance(config, CountdownConfig):
        return make_countdown(config)
    task_names()  # a missing package is reported first
    from drivers.grading.gym import reward

    return make_gym(config, reward)


def write_splits(splits: Mapping[str, Sequence[Mapping[str, str]]], output_dir: str) -> None:
    """Write each split to `output_dir`/SPLIT.jsonl."""
    for split, rows in splits.items():
        path = Path(output_dir) / f"{split}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, rows)
        except OSError as error:
            raise UsageError(f"--output-dir {output_dir}: cannot write {path} ({error})") from error
        print(f"{path}: {len(rows)} questions")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the files."""
    with exit_on_user_error("make_task.py"):
        with fit_help():
            config: CountdownConfig | GymConfig = tyro.cli(Task, args=arguments, description=__doc__)
        if isinstance(config, GymConfig) and config.list:
            print("\n".join(task_names()))
        else:
            write_splits(make_splits(config), config.output_dir)


if __name__ == "__main__":
    main()
