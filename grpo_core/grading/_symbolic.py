r"""Decide whether two small mathematical expressions are equal, in bounded time.

Trees are not expanded or simplified. Both are evaluated at the same points: exactly in rational numbers where
possible, otherwise to more than a hundred digits. They are equal if all values are (the Schwartz-Zippel argument). The
size of every number and the number of evaluations are limited, so the verdict does not depend on the machine's load.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from grpo_core.grading._evaluation import Budget, Evaluator, Undecided, arithmetic
from grpo_core.grading._expression import Node, Unreadable, read
from grpo_core.grading._numbers import is_infinite, is_number

AGREEING = 100
"""Digits in which two inexact values must agree; the rest covers cancellation in sums."""

POINTS = 8
"""Points at which expressions with variables are compared; the first three are positive in every variable, the
fourth negative."""


def same_value(first: str, second: str, budget: Budget) -> bool:
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
    return is_number(trees[0]) == is_number(trees[1]) and _agree(trees, Evaluator(budget), _all_equal)


def comes_to(number: str, expression: str, budget: Budget) -> bool:
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
    return _agree(trees, Evaluator(budget), _all_equal)


def same_scaled(first: tuple[str, str], second: tuple[str, str], budget: Budget) -> bool:
    """Return whether two products of a factor and an entry of a matrix are equal.

    Args:
        first: factor and entry; the factor may be empty.
        second: the other factor and entry.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        True if the products are equal and no part is arithmetic that comes to a rational number.
    """
    try:
        trees = [[read(text) for text in pair if text] for pair in (first, second)]
    except Unreadable:
        return False
    for tree in trees[0] + trees[1]:
        if not is_number(tree) and isinstance(_constant(tree, budget), Fraction):
            return False
    products = [Node("multiply", tuple(parts)) for parts in trees]
    return _agree((products[0], products[1]), Evaluator(budget), _all_equal)


def real_value(text: str, budget: Budget) -> Any:
    """Return the value of an expression without variables as an mpmath number, or None if it is not real.

    Args:
        text: an expression, or infinity with a sign.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        The value; None if the text has a variable or cannot be parsed.
    """
    if text.lstrip("+-") == r"\infty":
        return arithmetic().mpf("-inf" if text.startswith("-") else "inf")
    try:
        value = _constant(read(text), budget)
    except Unreadable:
        return None
    value = value if value is None else Evaluator(budget).inexact(value)
    return value if value is not None and arithmetic().im(value) == 0 else None


def exact_value(tree: Node) -> Fraction | None:
    """Return the rational value of a tree, or None if it has none."""
    value = _constant(tree, Budget())
    return value if isinstance(value, Fraction) else None


def rounds_to(expression: str, decimal: str, budget: Budget) -> bool:
    """Return whether a decimal is the value of an expression, rounded to its last digit or cut off there.

    Args:
        expression: an expression without variables.
        decimal: a plain decimal.
        budget: the evaluations left to this comparison; it is reduced.

    Returns:
        True if the decimal differs from the value by less than one unit of its last digit.
    """
    value, (_, dot, part) = real_value(expression, budget), decimal.partition(".")
    if value is None or not dot or not part.isdigit() or len(part) > 20:
        return False
    rounded = real_value(decimal, budget)
    return rounded is not None and bool(abs(value - rounded) * 10 ** len(part) < 1)


def _constant(tree: Node, budget: Budget) -> Any:
    """Return the value of a tree without variables, exact if possible; None if there is none."""
    try:
        return None if _symbols(tree) else Evaluator(budget).value(tree)
    except (ArithmeticError, ValueError):
        return None


def same_equation(first: tuple[str, str], second: tuple[str, str], budget: Budget, *, directed: bool = False) -> bool:
    """Return whether two equations differ by a constant factor and moved terms only, like `2x = 10` and `x - 5 = 0`.

    Args:
        first: left and right side of one equation.
        second: left and right side of the other equation.
        budget: the evaluations left to this comparison; it is reduced.
        directed: the relation is an inequality, so the factor must be positive.

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
    verdict = _all_proportional_upwards if directed else _all_proportional
    return _agree((differences[0], differences[1]), Evaluator(budget), verdict)


def _is_solved(left: Node, right: Node) -> bool:
    """Return whether an equation has a variable on one side and its value on the other."""
    return any(one.kind == "symbol" and is_number(other) for one, other in ((left, right), (right, left)))


# Comparing ------------------------------------------------------------------------------------------------------


def _symbols(node: Node) -> bool:
    return node.kind == "symbol" or any(_symbols(operand) for operand in node.operands)


def _agree(
    trees: tuple[Node, Node], evaluator: Evaluator, verdict: Callable[[Evaluator, list[tuple[Any, Any]]], bool]
) -> bool:
    """Evaluate both trees where both are defined, and return whether `verdict` accepts the pairs of values.

    `verdict` gets the pairs after every point, so that the first difference ends the work.
    """
    if any(map(is_infinite, trees)):
        return False
    points = POINTS if any(map(_symbols, trees)) else 1
    complex_allowed = any(_has_constant_i(tree) for tree in trees)
    pairs: list[tuple[Any, Any]] = []
    for evaluator.point in range(points):
        try:
            pairs.append((evaluator.value(trees[0]), evaluator.value(trees[1])))
        except Undecided:
            return False
        except (ArithmeticError, ValueError):  # undefined here: a pole, zero to the zero, a logarithm of zero
            continue
        if pairs[1:] and not complex_allowed and all(map(_is_complex, pairs[-1])):
            pairs.pop()  # for real variables, neither side is defined here: a root or logarithm of a negative number
        elif not verdict(evaluator, pairs):
            return False
    return len(pairs) >= min(points, 3)


def _has_constant_i(node: Node) -> bool:
    return node == Node("constant", name="i") or any(map(_has_constant_i, node.operands))


def _is_complex(value: Any) -> bool:
    return not isinstance(value, Fraction) and getattr(value, "imag", 0) != 0


def _close(evaluator: Evaluator, first: Any, second: Any) -> bool:
    """Return whether two values agree: exactly if both are exact, else in their first digits or near an exact 0."""
    if isinstance(first, Fraction) and isinstance(second, Fraction):
        return first == second
    scale = 1 if 0 in (first, second) else 0
    first, second = evaluator.inexact(first), evaluator.inexact(second)
    scale = max(scale, abs(first), abs(second))
    return bool(abs(first - second) <= scale * evaluator.context.mpf(10) ** -AGREEING)


def _all_equal(evaluator: Evaluator, pairs: list[tuple[Any, Any]]) -> bool:
    return _close(evaluator, *pairs[-1])


def _all_proportional(evaluator: Evaluator, pairs: list[tuple[Any, Any]]) -> bool:
    """Return whether the last pair has the ratio of the first, and neither value is zero."""
    if any(_close(evaluator, value, Fraction(0)) for value in pairs[-1]):
        return False
    (a, b), (c, d) = pairs[0], pairs[-1]
    return _close(evaluator, evaluator.multiply(a, d), evaluator.multiply(b, c))


def _all_proportional_upwards(evaluator: Evaluator, pairs: list[tuple[Any, Any]]) -> bool:
    """Return whether the last pair has the ratio of the first, which is positive."""
    context = evaluator.context
    product = evaluator.inexact(evaluator.multiply(*pairs[0]))
    return context.im(product) == 0 and context.re(product) > 0 and _all_proportional(evaluator, pairs)
