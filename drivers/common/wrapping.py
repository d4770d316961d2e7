"""Wrap lines for a terminal between words."""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO


def wrap(parts: Sequence[str], width: int) -> str:
    """Wrap a line between its parts, or a single part between words, and indent what follows.

    A command stays in one piece. So does a word that is longer than a line, such as a path: the terminal breaks it,
    and it can still be copied.
    """
    line = parts[0] if len(parts) == 1 else "  ".join(part.replace(" ", _UNBROKEN) for part in parts)
    command = _COMMAND.search(line)
    if command:
        line = line[: command.start()] + command[0].replace(" ", _UNBROKEN) + line[command.end() :]
    indent = " " * (len(line) - len(line.lstrip(" ")) + 4)
    wrapped = textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapped.replace(_UNBROKEN, " ")


_COMMAND = re.compile(r"(\S*python\S* \S*drivers/|\S*wandb sync )(?:(?! \(|; ).)*")
_UNBROKEN = "\N{NO-BREAK SPACE}"
"""Stands for a space at which a line is not broken."""


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print a line, by default to standard output; on a terminal it is wrapped, elsewhere it stays one line."""
    file = sys.stdout if file is None else file
    print(wrap([text], shutil.get_terminal_size().columns) if file.isatty() else text, file=file, flush=True)
