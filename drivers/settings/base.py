"""The base class of all settings, and bounds that stand at a field."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_args, get_type_hints
from urllib.parse import urlsplit

from drivers.common.errors import UsageError


@dataclass(frozen=True)
class Bounds:
    """The range of a number. A bounded number is finite."""

    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def find_problem(self, value: float) -> str | None:
        """Return what is wrong with the value, or None."""
        if not math.isfinite(value):
            return "must be a finite number"
        if value <= self.above or value < self.at_least or value > self.at_most:
            return f"must be {self}"
        return None

    def __str__(self) -> str:
        limits = {"greater than": self.above, "at least": self.at_least, "at most": self.at_most}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if math.isfinite(limit))


PositiveInt = Annotated[int, Bounds(above=0)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
Share = Annotated[float, Bounds(above=0, at_most=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. Each group checks itself after the groups that it builds on."""

    heading: ClassVar[str]
    """Heading of the group's flags in `--help`."""

    def __post_init__(self) -> None:
        kind: type = type(self)  # type[Settings] is not hashable to mypy
        bounds = read_bounds(kind)
        for name, value in vars(self).items():
            if name in bounds and value is not None:
                problem = bounds[name].find_problem(value)
            else:
                parts = value if isinstance(value, tuple) else (value,)
                has_nan = any(isinstance(part, float) and math.isnan(part) for part in parts)
                problem = "must be a number" if has_nan else None
            if problem:
                raise UsageError(f"{self.flag(name)}: {problem}")

    def flag(self, name: str) -> str:
        """Return a setting as it is typed, such as `--kl-coef 0.1`."""
        return spell_flag(name, getattr(self, name))

    def is_changed(self, name: str) -> bool:
        """Return whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


def spell_flag(name: str, value: Any) -> str:
    """Return a flag and its value as they are typed."""
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return " ".join([f"--{words}", *map(str, value if isinstance(value, tuple) else (value,))])


def is_server_address(text: str) -> bool:
    """Return whether the text is the URL of a server, such as `http://127.0.0.1:8000`."""
    return urlsplit(text).scheme in ("http", "https") and bool(urlsplit(text).hostname)


@cache
def read_bounds(kind: type) -> Mapping[str, Bounds]:
    """Return the bounds of each field that has them, `Annotated[int, Bounds(above=0)] | None` included."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        extras = (extra for part in (hint, *get_args(hint)) for extra in getattr(part, "__metadata__", ()))
        bounds = next((extra for extra in extras if isinstance(extra, Bounds)), None)
        if bounds is not None:
            found[name] = bounds
    return found


def check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise a UsageError if one setting is not a multiple of another."""
    if value % divisor:
        lower = value - value % divisor
        other = f"--{divisor_name.replace('_', '-')}"
        nearest = f"{lower} or {lower + divisor}" if lower else f"{divisor}, or a lower {other} too"
        raise UsageError(
            f"{spell_flag(name, value)}: must be a multiple of {spell_flag(divisor_name, divisor)}; pass {nearest}"
        )
