"""Make several runs and compare them: `python drivers/sweep.py --list`, `python drivers/sweep.py learning-rates`."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.common.arguments import parse_arguments
from drivers.common.cli import exit_on_user_error
from drivers.common.commands import spell_program
from drivers.common.errors import UsageError
from drivers.common.wrapping import print_line
from drivers.sweeps.plan import SweepConfig, folder_of, keep_plan, plan
from drivers.sweeps.presets import SWEEPS
from drivers.sweeps.results import write_results
from drivers.sweeps.runner import Runner


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan the runs, make them and print the table of results."""
    with exit_on_user_error("sweep.py"):
        words = sys.argv[1:] if arguments is None else arguments
        config, shared = parse_arguments(SweepConfig, words, return_unknown_args=True)
        # With unknown flags, tyro 1.0 returns "[]" for the positional argument that was not given.
        config = replace(config, sweep=None if config.sweep == "[]" else config.sweep)
        if config.list and config.sweep is None and not config.grid:
            for name, variants in SWEEPS.items():
                print_line(f"{name:22} {(variants.__doc__ or '').strip()}")
            return
        if "--show" in shared:
            raise UsageError("--show: belongs to train.py; pass --list to see the commands of the sweep")
        planned = plan(config, shared)
        if config.list:
            for run in planned:
                print(spell_program(Path(run.command[1]).name), shlex.join(run.command[2:]))
            return
        folder = folder_of(config)
        keep_plan(folder, planned)
        runner = Runner(planned, config.devices)
        try:
            runner.run()
        finally:
            print(write_results(folder, planned, runner.status))
        print(f"Written to {folder}/: summary.md, summary.json, report.html")
        if any(runner.status.values()):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
