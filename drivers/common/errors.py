"""The errors that a program reports in one line instead of a traceback."""


class UsageError(ValueError):
    """What the user gave cannot work: the message names the flag or file, the value, and what is required."""


class EngineDiedError(RuntimeError):
    """The engine's process has ended or hangs; what it was asked has no answer."""


class TrainingAbortedError(RuntimeError):
    """The run may not go on: a number that should be finite is not, or the engine samples from other weights."""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message."""
    return str(error).partition("\n")[0]
