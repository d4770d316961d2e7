r"""Decide whether two small mathematical expressions are equal, in bounded time.

Trees are not expanded or simplified. Both are evaluated at the same points: exactly in rational numbers where
possible, otherwise to more than a hundred digits. They are equal if all values are (the Schwartz-Zippel argument). The
size of every number and the number of evaluations are limited, so the verdict does not depend on the machine's load.
"""

import threading
from collections.abc import Callable
from fractions import Fraction
from math import ceil, comb, factorial, floor
from typing import Any
from zlib import crc32

from grpo_core.grading._expression import Node, Unreadable, is_infinite, is_number, read

MAX_BITS = 16_000
"""Largest size of numerator plus denominator; a larger value is undecided."""

MAX_MAGNITUDE = 100_000
"""Largest binary exponent of an inexact value."""

MAX_STEPS = 6000
"""Most evaluations of nodes in one comparison of answers; a root, a power or a function counts as six."""

DIGITS = 140
"""Working precision of inexact values."""

AGREEING = 100
"""Digits in which two inexact values must agree; the rest covers cancellation in sums."""

POINTS = 8
"""Points at which expressions with variables are compared; the first three are positive in every variable, the
fourth negative."""


class _Undefined(ArithmeticError):
    """The expression has no value at this point."""


class _Undecided(ArithmeticError):
    """A value or the count of evaluations exceeds a limit."""


def same_value(first: str, second: str, budget: "Budget") -> bool:
    """Return whether two expressions are equal wherever they are defined, and both or neither only spell a number.

    Arithmetic does not equal its result: otherwise a policy could copy the operands of a problem.

    Args:
        first: one expression.
        second: the other expression.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        True if both can be parsed and agree at every point; False if they differ or the comparison is undecided.
    """
    try:
        trees = read(first), read(second)
    except Unreadable:
        return False
    return is_number(trees[0]) == is_number(trees[1]) and _agree(trees, _Evaluator(budget), _all_equal)


def comes_to(number: str, expression: str, budget: "Budget") -> bool:
    """Return whether a spelled number is the value of arithmetic without variables.

    Args:
        number: a spelling of a number.
        expression: arithmetic, such as `8!`.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        True if the first spells a number, the second is arithmetic, and their values agree.
    """
    try:
        trees = read(number), read(expression)
    except Unreadable:
        return False
    if not is_number(trees[0]) or is_number(trees[1]) or _symbols(trees[1]):
        return False
    return _agree(trees, _Evaluator(budget), _all_equal)


def same_equation(first: tuple[str, str], second: tuple[str, str], budget: "Budget") -> bool:
    """Return whether two equations differ by a constant factor and moved terms only, like `2x = 10` and `x - 5 = 0`.

    Args:
        first: left and right side of one equation.
        second: left and right side of the other equation.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        True if the difference of the sides of one equation is a nonzero constant times that of the other. A solved
        equation such as `x = 5` equals no unsolved one.
    """
    try:
        sides = [(read(left), read(right)) for left, right in (first, second)]
    except Unreadable:
        return False
    if _is_solved(*sides[0]) != _is_solved(*sides[1]):
        return False
    differences = [Node("add", (left, Node("negative", (right,)))) for left, right in sides]
    return _agree((differences[0], differences[1]), _Evaluator(budget), _all_proportional)


def _is_solved(left: Node, right: Node) -> bool:
    """Return whether an equation has a variable on one side and its value on the other."""
    return any(one.kind == "symbol" and is_number(other) for one, other in ((left, right), (right, left)))


# Evaluating -----------------------------------------------------------------------------------------------------


_thread = threading.local()


def _arithmetic() -> Any:
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
        """Count evaluations; raise `_Undecided` beyond the limit."""
        self.steps -= steps
        if self.steps < 0:
            raise _Undecided("too many evaluations")


class _Evaluator:
    """Evaluate trees at one point: to a Fraction if exact, else to an mpmath number."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.point = 0

    @property
    def context(self) -> Any:
        """Return the arithmetic of inexact values; mpmath is imported on first use."""
        return _arithmetic()

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
            raise _Undefined("division by zero")
        return 1 / value

    def power(self, base: Any, exponent: Any) -> Any:
        """Return the principal value of base to the exponent; exact for integer powers of rationals."""
        if base == 0 and (not isinstance(exponent, Fraction) or exponent <= 0):
            raise _Undefined("zero to a power that is not positive")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            if abs(base) in (0, 1):
                return base ** int(exponent % 2 or 2)
            if abs(exponent) * (_bits(base) - 1) > MAX_BITS:
                raise _Undecided("a huge power")
            return base ** int(exponent)
        self.budget.spend(5)
        base, exponent = self.inexact(base), self.inexact(exponent)
        if abs(exponent) > MAX_MAGNITUDE or abs(exponent) * abs(self.context.mag(base)) > MAX_MAGNITUDE:
            raise _Undecided("a huge power")
        return self.context.power(base, exponent)

    def root(self, index: Any, value: Any) -> Any:
        """Return the real root if there is one, else the principal root."""
        if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= 1000:
            raise _Undecided("a root whose index is no small integer")
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
            raise _Undecided("a huge argument")
        if name in ("exp", "sinh", "cosh", "tanh") and abs(value) > MAX_MAGNITUDE // 2:
            raise _Undecided("a huge exponential")
        if base is not None:
            return self.context.ln(value) / self.context.ln(self.inexact(base))
        return getattr(self.context, {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(name, name))(value)


def _coordinate(name: str, point: int) -> Fraction:
    """Return the fixed value of a variable at a point; its magnitude is between 0 and 4."""
    seed = crc32(f"{name}@{point}".encode())
    sign = 1 if point < 3 or (point > 3 and seed & 0x10000) else -1
    return Fraction(sign * (1 + seed % 3989), 1009)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _checked(value: Any) -> Any:
    """Return the value, or raise `_Undecided` if it exceeds the limits."""
    if isinstance(value, Fraction):
        if _bits(value) > MAX_BITS:
            raise _Undecided("a huge number")
    elif value != 0 and abs(value.context.mag(value)) > MAX_MAGNITUDE:
        raise _Undecided("a huge number")
    return value


def _exact(value: Any) -> Fraction:
    if not isinstance(value, Fraction):
        raise _Undecided("not exact")
    return value


def _integer(value: Any) -> int:
    """Return an integer from 0 to 1,000, or raise `_Undefined`."""
    number = _exact(value)
    if number.denominator != 1 or not 0 <= number <= 1000:
        raise _Undefined("not a small integer")
    return int(number)


# Comparing ------------------------------------------------------------------------------------------------------


def _symbols(node: Node) -> bool:
    return node.kind == "symbol" or any(_symbols(operand) for operand in node.operands)


def _agree(
    trees: tuple[Node, Node], evaluator: _Evaluator, verdict: Callable[[_Evaluator, list[tuple[Any, Any]]], bool]
) -> bool:
    """Evaluate both trees where both are defined, and return whether `verdict` accepts the pairs of values.

    `verdict` gets the pairs after every point, so that the first difference ends the work.
    """
    if any(map(is_infinite, trees)):
        return False
    points = POINTS if any(map(_symbols, trees)) else 1
    pairs: list[tuple[Any, Any]] = []
    for evaluator.point in range(points):
        try:
            pairs.append((evaluator.value(trees[0]), evaluator.value(trees[1])))
        except _Undecided:
            return False
        except (ArithmeticError, ValueError):  # undefined here: a pole, zero to the zero, a logarithm of zero
            continue
        if not verdict(evaluator, pairs):
            return False
    return len(pairs) >= min(points, 3)


def _close(evaluator: _Evaluator, first: Any, second: Any) -> bool:
    """Return whether two values agree: exactly if both are exact, else in their first digits or near an exact 0."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    scale = 1 if 0 in (first, second) else 0
    first, second = evaluator.inexact(first), evaluator.inexact(second)
    scale = max(scale, abs(first), abs(second))
    return bool(abs(first - second) <= scale * evaluator.context.mpf(10) ** -AGREEING)


def _all_equal(evaluator: _Evaluator, pairs: list[tuple[Any, Any]]) -> bool:
    return _close(evaluator, *pairs[-1])


def _all_proportional(evaluator: _Evaluator, pairs: list[tuple[Any, Any]]) -> bool:
    """Return whether the last pair has the ratio of the first, and neither value is zero."""
    if any(_close(evaluator, value, Fraction(0)) for value in pairs[-1]):
        return False
    (a, b), (c, d) = pairs[0], pairs[-1]
    return _close(evaluator, evaluator.multiply(a, d), evaluator.multiply(b, c))
