"""Runs as one page that needs nothing else: `python drivers/report.py runs/ONE runs/ANOTHER --output DIR`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from drivers.common.cli import exit_with
from drivers.common.errors import UsageError
from drivers.reports.page import write_report


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html, one page with the numbers, curves, responses and settings of runs, and its curves as PNG.

    Runs whose settings differ in the seed alone are one series.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path | None = None
    """Folder for the files. Left out: that of the run, if it is one."""
    title: str | None = None
    """Of the page. Left out: the name of the run, or how many there are."""


def main(arguments: Sequence[str] | None = None) -> None:
    config = tyro.cli(ReportConfig, args=sys.argv[1:] if arguments is None else list(arguments))
    try:
        if not config.runs:
            raise UsageError("which runs? Name their folders: report.py runs/ONE")
        if config.output is None and len(config.runs) > 1:
            raise UsageError(f"--output: a folder is required, for {len(config.runs)} runs have none in common")
        title = config.title or (
            config.runs[0].resolve().name if len(config.runs) == 1 else f"{len(config.runs)} runs"
        )
        print(f"Written to {write_report(config.runs, config.output or config.runs[0], title)}")
    except UsageError as error:
        exit_with("report.py", error, status=2)


if __name__ == "__main__":
    main()
