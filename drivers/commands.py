"""The commands that an installed package has: `grpo-train` is `python drivers/train.py`, and so on."""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module


def run(program: str) -> None:
    """The program's command line. What it needs is an extra of the package, and may not be there."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        tell_help(program, sys.argv[1:])
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


def tell_help(program: str, arguments: Sequence[str]) -> None:
    """Of the programs that need much: from their settings alone, which need no more than the functions do."""
    from drivers.settings.command_line import parse_settings, parse_train_config
    from drivers.settings.evaluate import EvaluateConfig
    from drivers.settings.imitation import ExpertIterationConfig, SftConfig
    from drivers.settings.parser import parse

    match program:
        case "train":
            parse_train_config(arguments)
        case "sft":
            parse_settings(SftConfig, arguments)
        case "expert_iteration":
            parse_settings(ExpertIterationConfig, arguments)
        case "evaluate":
            parse(EvaluateConfig, arguments, EvaluateConfig())


train = partial(run, "train")


sft = partial(run, "sft")


expert_iteration = partial(run, "expert_iteration")


evaluate = partial(run, "evaluate")


sweep = partial(run, "sweep")


report = partial(run, "report")


pass_rates = partial(run, "pass_rates")


convert_dataset = partial(run, "convert_dataset")


make_task = partial(run, "make_task")
