"""Programs in processes that are forked from one which has imported everything, so that they start at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.drivers.helpers.preloaded"])  # by name: this process may never need vLLM


class ForkedProgram:
    """A function that runs in its own process, with its own environment, folder and output file."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        output: Path,
        folder: Path | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self._output = output
        self.process = _CONTEXT.Process(target=_run, args=(function, arguments, str(output), folder, variables or {}))
        self.process.start()

    @property
    def output(self) -> str:
        """Return what the process has printed, errors included."""
        return self._output.read_text() if self._output.exists() else ""

    def wait(self, seconds: float) -> int | None:
        """Wait for the end and return the exit code: negative if a signal ended the process, None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode


def _run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    output: str,
    folder: Path | None,
    variables: dict[str, str],
) -> None:
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    if folder is not None:
        os.chdir(folder)
    function(*arguments)
