"""Errors that a program reports in one line instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class GrpoError(Exception):
    """Base class of the errors that a user can act on."""


class UsageError(GrpoError, ValueError):
    """A flag, a file or a combination of them cannot work.

    Cause: the user's input. Remedy: the message names the flag or file, its value, and what to change.
    """


class EngineDiedError(GrpoError, RuntimeError):
    """The engine's process has exited or does not respond, so its requests have no answer.

    Cause: a crash, a kill, a hang or a lost host. Remedy: a supervised engine is started again; where that fails, read
    the engine's own output and resume from the last checkpoint.
    """


class TrainingAbortedError(GrpoError, RuntimeError):
    """The run must not continue: a number is not finite, or the engine samples from other weights than the policy's.

    Cause: named in the message. Remedy: fix it and resume from the last checkpoint with `--resume`.
    """


def shorten(error: object, width: int = 200) -> str:
    """Return the text of a library's error as one line of limited width."""
    text = " ".join(str(error).split())
    return text if len(text) <= width else f"{text[:width]}..."


def suggest(word: str, names: Iterable[str]) -> str:
    """Return the names that are spelled almost like a word, as the end of an error's message; empty if none are."""
    bare = {name.lstrip("-"): name for name in names}  # dashes would make any two flags alike
    start = word.lower().lstrip("-")
    near = [name for name in bare if start and name.startswith(start)][:3] or get_close_matches(start, bare, n=1)
    return f"; did you mean {' or '.join(bare[name] for name in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message."""
    return str(error).strip().partition("\n")[0]
