"""Ctrl-C, SIGTERM and SIGHUP: they end a run between two updates, never inside one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, as Ctrl-C does, so that they save a checkpoint too.

    A signal that is ignored stays ignored: under nohup, a lost connection does not end the run.
    """
    with _handling(_handled_signals(signal.SIGTERM, signal.SIGHUP), signal.default_int_handler):
        yield


def _handled_signals(*numbers: int) -> list[int]:
    """Return the signals among `numbers` that are not ignored and have a handler that Python can restore."""
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def _handling(numbers: list[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals by `handler` during the block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier_handler in before.items():
            signal.signal(number, earlier_handler)


class _DeferringHandler:
    """A signal handler that records signals instead of raising."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.raises_on_second = False
        """Set while the block waits for an answer that may never come."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)
        if self.raises_on_second and len(self.pending) > 1:
            raise KeyboardInterrupt


@contextmanager
def defer_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt only after the block: half an update must not be saved."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    handler, numbers = _DeferringHandler(), _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if any(isinstance(signal.getsignal(number), _DeferringHandler) for number in numbers):
        yield  # an outer block defers them already
        return
    with _handling(numbers, handler):
        yield
    if handler.pending:
        raise KeyboardInterrupt


@contextmanager
def allow_second_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt at the second signal, although an outer block defers signals."""
    numbers = _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    deferring = [handler for handler in map(signal.getsignal, numbers) if isinstance(handler, _DeferringHandler)]
    if not deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferring[0].raises_on_second = True  # all signals share one handler
    try:
        yield
    finally:
        deferring[0].raises_on_second = False
