"""Report the errors of a program in one line, and fit its help to the terminal."""

import io
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from drivers.common.errors import GrpoError, UsageError, shorten
from drivers.common.wrapping import print_line


def exit_with(program: str, error: Exception, status: int) -> None:
    """Print one line instead of a traceback and exit; with several ranks, rank 0 prints first."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print_line(f"{program}: {error}", sys.stderr)
    else:
        time.sleep(5.0)  # torchrun ends the other ranks once rank 0 has exited with the same error
        print_line(f"{program}, rank {rank}: {error}", sys.stderr)
    raise SystemExit(status)


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """Turn errors that a user can act on into one line on stderr and an exit status; others keep their traceback."""
    try:
        yield
    except UsageError as error:
        exit_with(program, error, status=2)
    except GrpoError as error:
        exit_with(program, error, status=1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; `--help` does without torch
            advice = "lower --micro-batch-tokens, or pass --gradient-checkpointing on or --lora-rank 16"
            exit_with(program, RuntimeError(f"the GPU is out of memory ({shorten(error, 200)}); {advice}"), status=1)
        from drivers.common import distributed  # it imports torch

        if not distributed.is_peer_failure(error):
            raise
        exit_with(program, RuntimeError(f"another rank has exited: {error}"), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


class _Captured(io.StringIO):
    """Text that is printed later, on a terminal if `is_terminal`: tyro colors its help there."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@contextmanager
def fit_help() -> Iterator[None]:
    """Wrap what the block prints between words, at the width of the terminal.

    tyro wraps the help of flags, but prints the usage and the description in one line each.
    """
    printed, width = _Captured(is_terminal=sys.stdout.isatty()), shutil.get_terminal_size().columns
    try:
        with redirect_stdout(printed):
            yield
    finally:
        try:
            print("".join(f"{_fold(line, width)}\n" for line in printed.getvalue().splitlines()), end="", flush=True)
        except BrokenPipeError:  # `--help | head`: the rest goes nowhere, or Python would complain at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fold(line: str, width: int) -> str:
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)  # without colors
    if len(plain) <= width:
        return line
    indent = " " * (len(plain) - len(plain.lstrip()) + 4) if plain.startswith((" ", "usage:")) else ""
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def check_number(name: str, value: int, least: int, required: str) -> None:
    """Raise a UsageError if the value of a flag is below `least`."""
    if value < least:
        raise UsageError(f"--{name.replace('_', '-')} {value}: {required}")
