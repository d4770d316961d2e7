"""Show runs on one self-contained page: `python drivers/report.py runs/ONE runs/ANOTHER --output DIR`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch, because OpenMP reads its settings once

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
    """Write report.html, a page with the results, curves, responses and settings of runs, and the curves as PNG.

    Runs that differ only in their seed are shown as one series.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path | None = None
    """Folder for the files. Default: the folder of the run; required for several runs."""
    title: str | None = None
    """Title of the page. Default: the name of the run, or the number of runs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the report."""
    config = tyro.cli(ReportConfig, args=sys.argv[1:] if arguments is None else list(arguments))
    try:
        if not config.runs:
            raise UsageError("no run folders given. Example: report.py runs/NAME")
        if config.output is None and len(config.runs) > 1:
            raise UsageError(f"--output: a folder is required for {len(config.runs)} runs")
        title = config.title or (
            config.runs[0].resolve().name if len(config.runs) == 1 else f"{len(config.runs)} runs"
        )
        print(f"Written to {write_report(config.runs, config.output or config.runs[0], title)}")
    except UsageError as error:
        exit_with("report.py", error, status=2)


if __name__ == "__main__":
    main()
