"""Time the phases of a step."""

from contextlib import AbstractContextManager

from drivers.common.display import Display


class StepTimer:
    """Seconds of each phase of a step. The timer of the main thread also shows the current phase."""

    def __init__(self, display: Display, *, is_shown: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._display, self._is_shown = display, is_shown

    def start_step(self) -> None:
        """Forget the phases of the step before."""
        self.seconds.clear()
        self._display.begin_step()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time of the block to `seconds[name]`."""
        return self._display.phase(name, self.seconds, shown=self._is_shown)

    def in_background(self) -> "StepTimer":
        """Return a timer for another thread, which shows nothing."""
        return StepTimer(self._display, is_shown=False)

    def add(self, other: "StepTimer") -> None:
        """Add the phases of a background timer."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
