"""Ctrl-C, SIGTERM and SIGHUP: they end a run between two steps if a step has begun to change the weights."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.pending: list[int] = []
        self.raises_on_second = False
        """Set while the second signal may interrupt."""
        self._on_first = on_first

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)
        if len(self.pending) == 1:
            self._on_first()
        elif self.raises_on_second:
            raise KeyboardInterrupt

    @contextmanager
    def second_signal(self, *, raises: bool) -> Iterator[None]:
        """Decide for the block whether the second signal interrupts it."""
        before, self.raises_on_second = self.raises_on_second, raises
        try:
            yield
        finally:
            self.raises_on_second = before


def _find_deferring_handler() -> _DeferringHandler | None:
    """Return the handler that defers signals now, which is the same for all of them."""
    handlers = map(signal.getsignal, _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    return next((handler for handler in handlers if isinstance(handler, _DeferringHandler)), None)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # Python delivers signals to this thread only


@contextmanager
def defer_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt only after the block: half an update must not be saved."""
    if not _is_main_thread():
        yield
        return
    outer = _find_deferring_handler()
    if outer is not None:
        with outer.second_signal(raises=False):
            yield
        if outer.raises_on_second and len(outer.pending) > 1:
            raise KeyboardInterrupt
        return
    handler = _DeferringHandler()
    with _handling(_handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handler):
        yield
    if handler.pending:
        raise KeyboardInterrupt


@contextmanager
def allow_second_signal() -> Iterator[None]:
    """Raise KeyboardInterrupt at the second signal, although an outer block defers signals."""
    handler = _find_deferring_handler() if _is_main_thread() else None
    with nullcontext() if handler is None else handler.second_signal(raises=True):
        yield


class StepSignals:
    """Signals that arrive after the first update of a step: the step is finished first, so that it can be resumed.

    A second signal raises KeyboardInterrupt at once.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        """Call `on_first` when the first signal arrives."""
        self._on_first = on_first
        self._handler: _DeferringHandler | None = None
        self._held = ExitStack()

    def hold(self) -> None:
        """Hold signals from now on, until `release`."""
        if self._handler is None and _is_main_thread():
            self._handler = _DeferringHandler(self._on_first)
            self._handler.raises_on_second = True
            numbers = _handled_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            self._held.enter_context(_handling(numbers, self._handler))

    def release(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived since `hold`."""
        if self.discard():
            raise KeyboardInterrupt

    def discard(self) -> bool:
        """Stop holding signals, and return whether one has arrived."""
        handler, self._handler = self._handler, None
        self._held.close()
        return handler is not None and bool(handler.pending)
