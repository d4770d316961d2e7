r"""Compare sets of real numbers in any notation: intervals, inequalities, set builders, complements, all of them."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_core.grading._answer import Answer

_LOW, _HIGH = Answer("leaf", (), r"-\infty"), Answer("leaf", (), r"\infty")
_REALS = {r"\mathbb{R}", "R"}
_BOUNDS = {"<", r"\le", "< <", r"< \le", r"\le <", r"\le \le"}
_VARIABLE = re.compile(r"[A-Za-df-hj-z](?:_\{?\w+\}?)?|\\(?!pi\b|infty|emptyset)[A-Za-z]+")
_ABSOLUTE = re.compile(r"\|([A-Za-z])\|")

Value = Callable[[str], Any]
"""From the text of an endpoint to its value, or None."""


class Piece(NamedTuple):
    """An interval: its ends, and its brackets, such as `[)`."""

    low: Answer
    high: Answer
    marks: str


class Region(NamedTuple):
    """A set of real numbers: the variable that an inequality names, if any, and the intervals."""

    variable: str
    pieces: tuple[Piece, ...]


_ZERO = Answer("leaf", (), "0")
_SIGNED = {r"\mathbb{R}^+": Piece(_ZERO, _HIGH, "()"), r"\mathbb{R}^-": Piece(_LOW, _ZERO, "()")}


def is_set(answer: Answer) -> bool:
    """Return whether the notation can only mean a set of real numbers; brackets alone may be a point."""
    if answer.kind in ("union", "intersection", "difference", "builder"):
        return True
    if answer.kind == "relation":
        return answer.text in _BOUNDS or answer.text == r"\ne"
    if answer.kind == "label":
        return answer.text.endswith(r"\in")
    if answer.kind == "list":
        return any(map(is_set, answer.parts)) and all(part.kind in ("label", "relation") for part in answer.parts)
    return answer.kind == "leaf" and (answer.text.startswith(r"\mathbb{R}") or answer.text == r"\emptyset")


def region(answer: Answer, value: Value) -> Region | None:
    """Return the set that an answer denotes, or None if it denotes none for certain.

    Args:
        answer: the structure of an answer.
        value: returns the value of an endpoint.

    Returns:
        The variable and the intervals, in the order of the notation.
    """
    if answer.kind in ("()", "(]", "[)", "[]"):
        return _interval(answer)
    if answer.kind in ("union", "intersection", "difference"):
        return _combined(answer, value)
    if answer.kind == "builder":
        inner = region(answer.parts[0], value)
        return Region("", inner.pieces) if inner and inner.variable in ("", answer.text) else None
    if answer.kind == "label" and answer.text.endswith(r"\in"):
        inner = _reals(answer.parts[0]) or region(answer.parts[0], value)
        return Region(answer.text.removesuffix(r"\in"), inner.pieces) if inner else None
    if answer.kind == "relation":
        return _unequal(answer, value) if answer.text == r"\ne" else _inequality(answer)
    if answer.kind == "list":
        return _joined(answer, value)
    if answer.kind == "leaf" and answer.text == r"\emptyset":
        return Region("", ())
    if answer.kind == "leaf" and answer.text.replace("{+}", "+") in _SIGNED:
        return Region("", (_SIGNED[answer.text.replace("{+}", "+")],))
    return _reals(answer) if answer.text == r"\mathbb{R}" else None


def _reals(answer: Answer) -> Region | None:
    known = answer.kind == "leaf" and answer.text in _REALS
    return Region("", (Piece(_LOW, _HIGH, "()"),)) if known else None


def _interval(answer: Answer) -> Region | None:
    if len(answer.parts) != 2 or any(part.kind != "leaf" for part in answer.parts):
        return None
    return Region("", (Piece(answer.parts[0], answer.parts[1], answer.kind),))


def _inequality(answer: Answer) -> Region | None:
    r"""Return the interval of one variable between bounds, or the two of `|x| > 1`."""
    if answer.text not in _BOUNDS or any(part.kind != "leaf" for part in answer.parts):
        return None
    signs = answer.text.split()
    if len(signs) == 1 and (found := _absolute(answer, signs[0])):
        return found
    variables = [bool(_VARIABLE.fullmatch(part.text)) for part in answer.parts]
    if variables not in ([True, False], [False, True], [False, True, False]):
        return None
    where, low, high, opening, closing = variables.index(True), _LOW, _HIGH, "(", ")"
    if where > 0:
        low, opening = answer.parts[0], "(" if signs[0] == "<" else "["
    if where + 1 < len(variables):
        high, closing = answer.parts[-1], ")" if signs[-1] == "<" else "]"
    return Region(answer.parts[where].text, (Piece(low, high, opening + closing),))


def _absolute(answer: Answer, sign: str) -> Region | None:
    r"""Return the interval of `|x| < a`, or the two of `|x| > a`."""
    for place, other in ((0, 1), (1, 0)):
        found, bound = _ABSOLUTE.fullmatch(answer.parts[place].text), answer.parts[other]
        if found and re.fullmatch(r"[\d./]+", bound.text):
            minus, strict = bound._replace(text="-" + bound.text), sign == "<"
            if place == 0:
                return Region(found[1], (Piece(minus, bound, "()" if strict else "[]"),))
            outer = (Piece(_LOW, minus, "()" if strict else "(]"), Piece(bound, _HIGH, "()" if strict else "[)"))
            return Region(found[1], outer)
    return None


def _unequal(answer: Answer, value: Value) -> Region | None:
    r"""Return everything except the values after `\ne`."""
    if len(answer.parts) != 2 or not _VARIABLE.fullmatch(answer.parts[0].text):
        return None
    points = _points(answer.parts[1])
    rest = _complement(points, value) if points else None
    return Region(answer.parts[0].text, rest) if rest else None


def _points(answer: Answer) -> tuple[Piece, ...]:
    """Return the points of a set, of a list, or of one value."""
    parts = answer.parts if answer.kind in ("set", "list") else (answer,)
    leaves = all(part.kind == "leaf" and part.text not in (r"\emptyset", *_REALS) for part in parts)
    return tuple(Piece(part, part, "[]") for part in parts) if leaves else ()


def _joined(answer: Answer, value: Value) -> Region | None:
    """Return the union of conditions joined by `or`, the intersection of others, if all are about one variable."""
    found = list[Region | None]()
    for part in answer.parts:
        point = answer.text == "or" and part.kind == "label" and part.text.endswith("=")
        found.append(Region(part.text[:-1], _points(part.parts[0])) if point else region(part, value))
    regions = [one for one in found if one is not None and one.pieces]
    if len(regions) < len(found) or len({one.variable for one in regions}) > 1 or not regions[0].variable:
        return None
    if answer.text == "or":
        return Region(regions[0].variable, tuple(piece for one in regions for piece in one.pieces))
    common = _intersection([one.pieces for one in regions], value)
    return Region(regions[0].variable, common) if common else None


def _combined(answer: Answer, value: Value) -> Region | None:
    """Return a union, intersection or difference."""
    sets = list[tuple[Piece, ...]]()
    for part in answer.parts:
        inner = region(part, value)
        sets.append(inner.pieces if inner else _points(part) if part.kind == "set" else ())
    if not all(sets):
        return None
    if answer.kind == "union":
        return Region("", tuple(piece for pieces in sets for piece in pieces))
    if answer.kind == "difference":
        rest = _complement(tuple(piece for pieces in sets[1:] for piece in pieces), value)
        sets = [sets[0], rest or ()]
    common = _intersection(sets, value) if all(sets) else None
    return Region("", common) if common else None


# On the line ----------------------------------------------------------------------------------------------------


def ordered(pieces: tuple[Piece, ...], value: Value) -> tuple[Piece, ...] | None:
    """Return disjoint intervals in ascending order; None if an end has no value or an interval is empty."""
    ends = [(value(piece.low.text), value(piece.high.text), piece) for piece in pieces]
    if any(low is None or high is None for low, high, _ in ends):
        return None
    for low, high, piece in ends:
        endless = (piece.marks[0] == "[" and low == float("-inf")) or (piece.marks[1] == "]" and high == float("inf"))
        if low > high or (low == high and piece.marks != "[]") or endless:
            return None
    merged = list[tuple[Any, Piece]]()
    for low, high, piece in sorted(ends, key=lambda end: (end[0], end[2].marks[0] == "(")):
        if merged and (
            low < merged[-1][0] or (low == merged[-1][0] and (merged[-1][1].marks[1] + piece.marks[0]) != ")(")
        ):
            last = merged[-1][1]
            if high > merged[-1][0] or (high == merged[-1][0] and piece.marks[1] == "]"):
                merged[-1] = high, Piece(last.low, piece.high, last.marks[0] + piece.marks[1])
        else:
            merged.append((high, piece))
    return tuple(piece for _, piece in merged)


def _complement(pieces: tuple[Piece, ...], value: Value) -> tuple[Piece, ...] | None:
    """Return the gaps between intervals."""
    line = ordered(pieces, value)
    if line is None:
        return None
    gaps, low, opening = list[Piece](), _LOW, "("
    for piece in line:
        if piece.low != _LOW and value(piece.low.text) != float("-inf"):
            gaps.append(Piece(low, piece.low, opening + (")" if piece.marks[0] == "[" else "]")))
        low, opening = piece.high, "(" if piece.marks[1] == "]" else "["
    if not line or value(low.text) != float("inf"):
        gaps.append(Piece(low, _HIGH, opening + ")"))
    return tuple(gaps)


def _intersection(sets: list[tuple[Piece, ...]], value: Value) -> tuple[Piece, ...] | None:
    """Return what all sets have in common: the complement of the union of their complements."""
    outside = list[Piece]()
    for pieces in sets:
        gaps = _complement(pieces, value)
        if gaps is None:
            return None
        outside += gaps
    return _complement(tuple(outside), value)
