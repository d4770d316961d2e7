"""Decide from its tree whether an expression only spells a number, and whether it has infinity in it."""

from grpo_core.grading._expression import Node


def is_number(node: Node) -> bool:
    r"""Return whether an expression only spells a rational number, with nothing left to compute.

    Args:
        node: the tree of an expression.

    Returns:
        True for an integer, a decimal, a mixed number, `2^{10}`, a fraction of integers or of such powers, and
        `1.5 \times 10^{3}`, with any sign. False for sums, other products, roots, factorials and functions.
    """
    node = _unsigned(node)
    if node.kind == "number" or _is_power(node):
        return True
    if node.kind != "multiply" or len(node.operands) != 2:
        return False
    left, right = map(_unsigned, node.operands)
    if right.kind == "inverse":
        return all(_is_integer(part) or _is_power(part) for part in (left, _unsigned(right.operands[0])))
    return left.kind == "number" and _is_power(right) and right.operands[0].value == 10


def is_infinite(node: Node) -> bool:
    r"""Return whether an expression has `\infty` or `\emptyset` beside other terms, where arithmetic is undefined.

    Args:
        node: the tree of an expression.

    Returns:
        True for `\infty - \infty`, False for `-\infty`.
    """
    return _unsigned(node).kind != "symbol" and _has_infinity(node)


def _has_infinity(node: Node) -> bool:
    return node.name in ("\\infty", "\\emptyset") or any(map(_has_infinity, node.operands))


def _unsigned(node: Node) -> Node:
    while node.kind == "negative":
        node = node.operands[0]
    return node


def _is_integer(node: Node) -> bool:
    return node.kind == "number" and node.value.denominator == 1


def _is_power(node: Node) -> bool:
    """Return whether a node is an integer to an integer power."""
    return node.kind == "power" and all(_is_integer(_unsigned(part)) for part in node.operands)
