"""Checks and base classes that all settings share."""

import math
from dataclasses import dataclass
from typing import ClassVar

from drivers.common.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Of a program that trains."""

    program: ClassVar[str]
    """Its name; a run is gone on with by the program that began it."""
    title: ClassVar[str]
    more: ClassVar[str]
    """The flag that makes a run longer."""


def stop_strings(reward: str) -> tuple[str, ...]:
    """Where a response ends under each reward."""
    return ("</answer>",) if reward in ("r1_zero", "countdown", "gym") else ()


def check_number(
    name: str, value: float, required: str, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    if not (math.isfinite(value) and value > above and value >= least):
        raise UsageError(f"{name}={value} {required}")


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        lower = value - value % divisor
        nearest = f"{lower} or {lower + divisor}" if lower else f"{divisor}"
        raise UsageError(f"{name}={value} must be a multiple of {divisor_name}={divisor}: {nearest}, say")
