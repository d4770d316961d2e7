"""Programs in processes that are forked from one which has imported everything, so that they start at once."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from drivers.engines.supervision import exit_when_trainer_exits

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


class EngineContext:
    """Fork vLLM's engine, as vLLM does on a GPU. On a CPU it starts Python anew, which takes ten seconds."""

    def __init__(self, method: str = "forkserver") -> None:
        """Fork from the process that has imported everything, or from this one with the method `fork`."""
        self._context = _CONTEXT if method == "forkserver" else multiprocessing.get_context(method)

    def Process(self, *, target: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> BaseProcess:
        """Return a process with the environment and the blocked signals that this one has now."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        arguments = (target, kwargs, dict(os.environ), blocked)
        return self._context.Process(target=_run_engine, name=name, args=arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def fork_engine_from_here() -> None:
    """Have vLLM fork its engine from this process, until the process ends."""
    import vllm.v1.engine.utils

    vllm.v1.engine.utils.get_mp_context = lambda: EngineContext("fork")


def _run_engine(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    blocked: Iterable[signal.Signals],
) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    exit_when_trainer_exits()  # a new Python does so when it imports drivers.engines.vllm_transfer
    gc.freeze()
    gc.unfreeze = lambda: None  # at its end vLLM would search all imported modules for garbage, twice
    target(**arguments)
