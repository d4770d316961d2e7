"""Evaluate the tree of an expression at one point, in bounded time: exactly where possible, else to many digits."""

import threading
from collections.abc import Callable
from fractions import Fraction
from math import ceil, comb, factorial, floor
from typing import Any
from zlib import crc32

from grpo_core.grading._expression import Node

MAX_BITS = 16_000
"""Largest size of numerator plus denominator; a larger value is undecided."""

MAX_MAGNITUDE = 100_000
"""Largest binary exponent of an inexact value."""

MAX_STEPS = 6000
"""Most evaluations of nodes in one comparison of answers; a root, a power or a function counts as six."""

DIGITS = 140
"""Working precision of inexact values."""


class Undefined(ArithmeticError):
    """The expression has no value at this point."""


class Undecided(ArithmeticError):
    """A value or the count of evaluations exceeds a limit."""


_thread = threading.local()


def arithmetic() -> Any:
    """Return the mpmath context of this thread; the global context would share its precision between threads."""
    if not hasattr(_thread, "context"):
        from mpmath import MPContext

        _thread.context = MPContext()
        _thread.context.dps = DIGITS
    return _thread.context


class Budget:
    """The evaluations left to one comparison of answers."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        """Count evaluations; raise `Undecided` beyond the limit."""
        self.steps -= steps
        if self.steps < 0:
            raise Undecided("too many evaluations")


class Evaluator:
    """Evaluate trees at one point: to a Fraction if exact, else to an mpmath number."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.point = 0

    @property
    def context(self) -> Any:
        """Return the arithmetic of inexact values; mpmath is imported on first use."""
        return arithmetic()

    def inexact(self, value: Any) -> Any:
        """Return the value as an mpmath number."""
        if isinstance(value, Fraction):
            return self.context.mpf(value.numerator) / value.denominator
        return value

    def value(self, node: Node) -> Any:
        """Return the value of a tree at this point."""
        self.budget.spend(1)
        if node.kind == "number":
            return node.value
        if node.kind == "symbol":
            return _coordinate(node.name, self.point)
        if node.kind == "constant":
            return {"pi": +self.context.pi, "e": +self.context.e, "i": self.context.j}[node.name]
        if node.kind == "degree":
            return self.context.pi / 180
        values = [self.value(operand) for operand in node.operands]
        return _checked(getattr(self, node.kind)(*values, **({"name": node.name} if node.name else {})))

    def add(self, *terms: Any) -> Any:
        """Return the sum of the terms."""
        return self.fold(terms, lambda a, b: a + b)

    def multiply(self, *factors: Any) -> Any:
        """Return the product of the factors."""
        return self.fold(factors, lambda a, b: a * b)

    def fold(self, values: tuple[Any, ...], operation: Callable[[Any, Any], Any]) -> Any:
        """Combine values from the left, exactly while both sides are exact."""
        result = values[0]
        for value in values[1:]:
            if not (isinstance(result, Fraction) and isinstance(value, Fraction)):
                result, value = self.inexact(result), self.inexact(value)
            result = _checked(operation(result, value))
        return result

    def negative(self, value: Any) -> Any:
        """Return minus the value."""
        return -value

    def inverse(self, value: Any) -> Any:
        """Return one over the value."""
        if value == 0:
            raise Undefined("division by zero")
        return 1 / value

    def power(self, base: Any, exponent: Any) -> Any:
        """Return the principal value of base to the exponent; exact for integer powers of rationals."""
        if base == 0 and (not isinstance(exponent, Fraction) or exponent <= 0):
            raise Undefined("zero to a power that is not positive")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            if abs(base) in (0, 1):
                return base ** int(exponent % 2 or 2)
            if abs(exponent) * (_bits(base) - 1) > MAX_BITS:
                raise Undecided("a huge power")
            return base ** int(exponent)
        self.budget.spend(5)
        base, exponent = self.inexact(base), self.inexact(exponent)
        if abs(exponent) > MAX_MAGNITUDE or abs(exponent) * abs(self.context.mag(base)) > MAX_MAGNITUDE:
            raise Undecided("a huge power")
        return self.context.power(base, exponent)

    def root(self, index: Any, value: Any) -> Any:
        """Return the real root if there is one, else the principal root."""
        if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= 1000:
            raise Undecided("a root whose index is no small integer")
        self.budget.spend(5)
        value = self.inexact(value)
        if index % 2 and self.context.im(value) == 0 and self.context.re(value) < 0:
            return -self.context.root(-value, int(index))
        return self.context.root(value, int(index))

    def absolute(self, value: Any) -> Any:
        """Return the absolute value."""
        return abs(value)

    def floor(self, value: Any) -> Any:
        """Return the floor of an exact value."""
        return Fraction(floor(_exact(value)))

    def ceiling(self, value: Any) -> Any:
        """Return the ceiling of an exact value."""
        return Fraction(ceil(_exact(value)))

    def factorial(self, value: Any) -> Any:
        """Return the factorial of a small integer."""
        return Fraction(factorial(_integer(value)))

    def binomial(self, top: Any, bottom: Any) -> Any:
        """Return the binomial coefficient of small integers."""
        return Fraction(comb(_integer(top), _integer(bottom)))

    def function(self, value: Any, base: Any = None, *, name: str) -> Any:
        """Return a named function of the value."""
        self.budget.spend(5)
        value = self.inexact(value)
        if self.context.mag(value) > 60 and name not in ("ln", "log"):
            raise Undecided("a huge argument")
        if name in ("exp", "sinh", "cosh", "tanh") and abs(value) > MAX_MAGNITUDE // 2:
            raise Undecided("a huge exponential")
        if base is not None:
            return self.context.ln(value) / self.context.ln(self.inexact(base))
        return getattr(self.context, name.replace("arc", "a"))(value)


def _coordinate(name: str, point: int) -> Fraction:
    """Return the fixed value of a variable at a point; its magnitude is between 0 and 4."""
    seed = crc32(f"{name}@{point}".encode())
    sign = 1 if point < 3 or (point > 3 and seed & 0x10000) else -1
    return Fraction(sign * (1 + seed % 3989), 1009)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _checked(value: Any) -> Any:
    """Return the value, or raise `Undecided` if it exceeds the limits."""
    if isinstance(value, Fraction):
        if _bits(value) > MAX_BITS:
            raise Undecided("a huge number")
    elif value != 0 and abs(value.context.mag(value)) > MAX_MAGNITUDE:
        raise Undecided("a huge number")
    return value


def _exact(value: Any) -> Fraction:
    if not isinstance(value, Fraction):
        raise Undecided("not exact")
    return value


def _integer(value: Any) -> int:
    """Return an integer from 0 to 1,000, or raise `Undefined`."""
    number = _exact(value)
    if number.denominator != 1 or not 0 <= number <= 1000:
        raise Undefined("not a small integer")
    return int(number)
