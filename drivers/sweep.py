"""Several runs and one table: `python drivers/sweep.py --list`, `python drivers/sweep.py learning-rates`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on

import shlex
from collections.abc import Sequence
from dataclasses import replace

import tyro

from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.sweeps.plan import SweepConfig, folder_of, keep_plan, plan
from drivers.sweeps.presets import SWEEPS
from drivers.sweeps.results import write_results
from drivers.sweeps.runner import Runner


def tell_sweeps() -> None:
    """What there is, by name."""
    for name, variants in SWEEPS.items():
        print(f"{name:22} {(variants.__doc__ or '').strip()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: plan, runs, table."""
    try:
        config, shared = tyro.cli(
            SweepConfig, args=None if arguments is None else list(arguments), return_unknown_args=True
        )
        # tyro 1.0 takes an empty list for the name that is not given, where there are flags that it does not know.
        config = replace(config, sweep=None if config.sweep == "[]" else config.sweep)
        if config.list and config.sweep is None and not config.grid:
            tell_sweeps()
            return
        planned = plan(config, shared)
        if config.list:
            print("\n".join(shlex.join(one.command[1:]) for one in planned))
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
    except UsageError as error:
        exit_with("sweep.py", error, status=2)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
