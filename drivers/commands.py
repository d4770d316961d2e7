"""The commands that an installed package has: `grpo-train` is `python drivers/train.py`, and so on."""

import sys
from importlib import import_module


def run(program: str) -> None:
    """The program's command line. What it needs is an extra of the package, and may not be there."""
    try:
        main = import_module(f"drivers.{program}").main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("drivers", "grpo_core")):
            raise
        print(
            f"grpo-{program.replace('_', '-')}: the package {error.name} is missing; the programs need more than the "
            "functions do: pip install 'grpo_core[gpu]', or 'grpo_core[cpu]' without a GPU",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    main()


def train() -> None:
    run("train")


def sft() -> None:
    run("sft")


def expert_iteration() -> None:
    run("expert_iteration")


def evaluate() -> None:
    run("evaluate")


def sweep() -> None:
    run("sweep")


def report() -> None:
    run("report")


def convert_dataset() -> None:
    run("convert_dataset")
