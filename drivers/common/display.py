"""Show the progress of a run: a live panel on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

COLUMNS = {
    "reward": "reward {:.3f}",
    "format_reward": "format {:.3f}",
    "nll": "nll {:.3f}",
    "response_tokens": "{:.1f} tokens",
    "rollout_entropy": "entropy {:.2f}",
    "right_responses": "{:.0f} right",
    "grad_norm": "grad {:.2f}",
    "zero_std_groups": "zero-signal {:.0%}",
    "rollout_tokens_per_s": "{:.0f} tok/s",
}
"""Columns of a step's line. Metrics that a step does not have are omitted."""


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Continue without output if the reader has closed the pipe; rich would end the program."""
        with suppress(SystemExit, OSError):
            super().on_broken_pipe()


class Display:
    """A panel with phase, step, reward, tokens per second and time left; above it, one permanent line per step."""

    def __init__(self, n_steps: int, *, quiet: bool = False, title: str = "GRPO") -> None:
        self.console = _Screen(quiet=quiet)
        self._title = title
        self._n_steps = n_steps
        self._step_begin = time.monotonic()
        self._step_seconds: list[float] = []
        self._panel_text = Text("no step is finished yet", style="dim")
        self._progress = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("starting", total=n_steps)
        self._live = Live(console=self.console, transient=True, get_renderable=self._panel)

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        with suppress(OSError):  # the disk is full, or the terminal was closed
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float], *, shown: bool = True) -> Iterator[None]:
        """Show `name` as the current phase, and add the time of the block to `seconds[name]`."""
        if shown:
            self._progress.update(self._task, description=name)
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begin

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._step_begin = time.monotonic()

    def end_step(self, step: int, values: Mapping[str, float]) -> None:
        """Print the step's line and update the panel."""
        self._step_seconds.append(time.monotonic() - self._step_begin)
        left = clock((self._n_steps - step) * fmean(self._step_seconds[-5:]))
        self._progress.update(self._task, completed=step)
        speed = values.get("rollout_tokens_per_s", 0)
        self._panel_text = Text(f"reward {_number(values, 'reward')}   tokens/s {speed:.0f}   time left {left}")
        shown = "  ".join(form.format(values[name]) for name, form in COLUMNS.items() if name in values)
        self.say(
            f"step {step:>{len(str(self._n_steps))}}/{self._n_steps}  {shown}  "
            f"{self._step_seconds[-1]:.1f} s, {left} left"
        )

    def show_evaluation(self, step: int, values: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the accuracy and some completions with their rewards."""
        self.say(
            f"eval at step {step}: accuracy {_number(values, 'accuracy')} (+-{_number(values, 'accuracy_stderr')}), "
            f"format {_number(values, 'format_reward')}, {values['response_tokens']:.1f} tokens, "
            f"{int(values['n_examples'])} questions"
        )
        for row in rows[:4]:
            reward = "-" if row["reward"] is None else f"{row['reward']:g}"
            self.say(f"  {reward}  {one_line(str(row['question']))}")
            self.say(f"     {one_line(str(row['response']))}  (answer: {row['answer']})")

    def _panel(self) -> Panel:
        grid = Table.grid(expand=True)
        grid.add_row(self._progress)
        grid.add_row(self._panel_text)
        return Panel(grid, title=self._title, title_align="left")


def _number(values: Mapping[str, float], name: str) -> str:
    """Format a metric, or return "-" if it is absent."""
    return f"{values[name]:.3f}" if name in values else "-"


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str, limit: int = 240) -> str:
    """Return the text on one line, shortened to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
