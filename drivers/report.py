"""Show runs on one self-contained page: `python drivers/report.py runs/ONE runs/ANOTHER --output DIR`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.common.arguments import parse_arguments
from drivers.common.cli import exit_on_user_error
from drivers.common.errors import UsageError
from drivers.reports.logged_run import count_damaged_lines
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
    with exit_on_user_error("report.py"):
        config: ReportConfig = parse_arguments(ReportConfig, sys.argv[1:] if arguments is None else arguments)
        if not config.runs:
            raise UsageError("no run folders given. Example: report.py runs/NAME")
        if config.output is None and len(config.runs) > 1:
            raise UsageError(f"--output: a folder is required for {len(config.runs)} runs")
        default = config.runs[0].resolve().name if len(config.runs) == 1 else f"{len(config.runs)} runs"
        page = write_report(config.runs, config.output or config.runs[0], config.title or default)
        for folder in config.runs:
            n_damaged = count_damaged_lines(folder / "metrics.jsonl")
            if n_damaged:
                print(
                    f"warning: {folder}/metrics.jsonl: the report leaves out {n_damaged} damaged lines",
                    file=sys.stderr,
                )
        print(f"Written to {page}")


if __name__ == "__main__":
    main()
