"""Show the progress of a run: a live panel on a terminal, plain lines elsewhere."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from drivers.common.wrapping import wrap

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


class Screen(Console):
    """Standard output: a terminal, a pipe or a file."""

    def say(self, *parts: str) -> None:
        """Print a permanent line. On a terminal, a long one is wrapped between its parts, or within a single part."""
        text = wrap(parts, self.width) if self.is_terminal else "  ".join(parts)
        with suppress(OSError):  # the disk is full, or the terminal was closed
            self.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Continue without output if the reader has closed the pipe; rich would end the program."""
        with suppress(SystemExit, OSError):
            super().on_broken_pipe()


class Display:
    """A panel with the phase, steps, reward, speed and times; above it, permanent lines.

    Without a terminal there is no panel. Without steps, the panel shows the phase and the elapsed time.
    """

    def __init__(self, n_steps: int = 0, *, quiet: bool = False, title: str = "GRPO") -> None:
        self.console = Screen(quiet=quiet)
        self._title = title
        self._n_steps, self._n_done = n_steps, 0
        self._phase = "working"
        self._begin = self._phase_begin = self._step_begin = time.monotonic()
        self._step_seconds: list[float] = []
        self._is_in_step = False
        self._held_lines: list[str] = []
        """Lines about the state after a step, which follow the line of the step."""
        self._figures: list[str] = []
        self._live = Live(console=self.console, transient=True, get_renderable=self._panel)

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._print_held_lines()
        with suppress(OSError):
            self._live.stop()

    def say(self, *parts: str) -> None:
        """Print a permanent line above the panel."""
        self.console.say(*parts)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a long phase before the steps in a line, and show it in the panel while the block runs."""
        self.say(f"{name} ...")
        with self.phase(name, {}):
            yield
        self._show_phase("working")

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float], *, shown: bool = True) -> Iterator[None]:
        """Show `name` as the current phase, and add the time of the block to `seconds[name]`."""
        if shown:
            self._show_phase(name)
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - begin

    def _show_phase(self, name: str) -> None:
        self._phase, self._phase_begin = name, time.monotonic()

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._step_begin, self._is_in_step = time.monotonic(), True

    def end_step(self, step: int, values: Mapping[str, float]) -> None:
        """Print the step's line, then those of its evaluation, and update the panel."""
        self._step_seconds.append(time.monotonic() - self._step_begin)
        left = clock((self._n_steps - step) * fmean(self._step_seconds[-5:]))
        self._n_done = step
        speed = values.get("rollout_tokens_per_s", 0)
        self._figures = [f"reward {_number(values, 'reward')}", f"tokens/s {speed:.0f}", f"time left {left}"]
        shown = [form.format(values[name]) for name, form in COLUMNS.items() if name in values]
        last = f"{self._step_seconds[-1]:.1f} s, {left} left"
        head = f"step {step:>{len(str(self._n_steps))}}/{self._n_steps}"
        self.say(head, *shown, last)
        self._is_in_step = False
        self._print_held_lines()

    def _print_held_lines(self) -> None:
        for line in self._held_lines:
            self.say(line)
        self._held_lines.clear()

    def show_evaluation(
        self, step: int, values: Mapping[str, float], rows: Sequence[Mapping[str, Any]], name: str | None = None
    ) -> None:
        """Print the accuracy on the set `name` and some completions with their rewards, after the line of the step."""
        of_set = "" if name is None else f" on {name}"
        rates = "".join(f", {label} {values[key]:.3f}" for label, key in rates_at_most(values).items())
        self._held_lines.append(
            f"eval at step {step}{of_set}: accuracy {_number(values, 'accuracy')} "
            f"(+-{_number(values, 'accuracy_stderr')}){rates}, "
            f"format {_number(values, 'format_reward')}, {values['response_tokens']:.1f} tokens, "
            f"{int(values['n_examples'])} questions"
        )
        for row in rows[:4]:
            reward = "-" if row["reward"] is None else f"{row['reward']:g}"
            self._held_lines.append(f"  {reward}  {one_line(str(row['question']))}")
            self._held_lines.append(f"     {one_line(str(row['response']))}  (answer: {row['answer']})")
        if not self._is_in_step:
            self._print_held_lines()

    def _panel(self) -> Panel:
        """Draw the panel; it is drawn again four times a second."""
        now = time.monotonic()
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        phase = Text(f"{self._phase}  {clock(now - self._phase_begin)}")
        if self._n_steps:
            done = f"{self._n_done}/{self._n_steps} steps"
            bar.add_row(phase, ProgressBar(total=self._n_steps, completed=self._n_done), done)
        else:
            bar.add_row(phase)
        grid = Table.grid(expand=True)
        grid.add_row(bar)
        grid.add_row(Text("   ".join([*self._figures, f"elapsed {clock(now - self._begin)}"])))
        return Panel(grid, title=self._title, title_align="left")


def _number(values: Mapping[str, float], name: str) -> str:
    """Format a metric, or return "-" if it is absent."""
    return f"{values[name]:.3f}" if name in values else "-"


def rates_at_most(names: Iterable[str]) -> dict[str, str]:
    """Return, of metrics such as pass_at_8 and maj_at_8, those with the largest k, by the name that a reader knows."""
    found = {}
    for kind in ("pass", "maj"):
        numbers = [int(match[1]) for name in names if (match := re.fullmatch(rf"{kind}_at_(\d+)", name))]
        if numbers:
            found[f"{kind}@{max(numbers)}"] = f"{kind}_at_{max(numbers)}"
    return found


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str, limit: int = 240) -> str:
    """Return the text on one line, shortened to `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
