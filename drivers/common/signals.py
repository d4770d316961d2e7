"""Ctrl-C, SIGTERM and SIGHUP: they end a run between two updates, never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does: both save a checkpoint.

    So does SIGHUP, of a connection that was lost; under nohup it is ignored as before.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _handled_signals(signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled_signals(*numbers: int) -> list[int]:
    """Those that are not ignored, as whoever started the program may have asked, and that Python handles."""
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


class _Hold:
    """A handler that keeps what comes."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.is_waiting = False
        """For somebody who may never answer: then the second one is heard."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)
        if self.is_waiting and len(self.pending) > 1:
            raise KeyboardInterrupt


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold these signals back until the block is done: half an update must not be saved."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    hold, watched = _Hold(), _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if any(isinstance(signal.getsignal(number), _Hold) for number in watched):  # until the block around this is done
        yield
        return
    before = {number: signal.signal(number, hold) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if hold.pending:
        raise KeyboardInterrupt


@contextmanager
def allow_second_signal() -> Iterator[None]:
    """Around a wait: whoever asks a second time is heard, though the block is uninterrupted."""
    watched = _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found = [hold for hold in map(signal.getsignal, watched) if isinstance(hold, _Hold)]
    if not found or threading.current_thread() is not threading.main_thread():
        yield
        return
    found[0].is_waiting = True  # there is one for all of them
    try:
        yield
    finally:
        found[0].is_waiting = False
