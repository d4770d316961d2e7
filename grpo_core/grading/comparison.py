"""Compare two parsed answers part by part."""

import decimal
import re
from typing import NamedTuple

from grpo_core.grading import _symbolic
from grpo_core.grading._names import WORDS

# Structure ------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The structure of an answer: a leaf with its text and unit, or ordered or unordered parts."""

    kind: str  # leaf, list, set, union, matrix, relation, or the two brackets of a tuple
    parts: tuple["Answer", ...] = ()
    text: str = ""  # of a leaf: the expression; of a relation: its signs; of a list of alternatives: or
    unit: str = ""


_BOUNDS = {"<", r"\le", "< <", r"< \le", r"\le <", r"\le \le"}
_VARIABLE = re.compile(r"[A-Za-df-hj-z](?:_\{?\w+\}?)?|\\(?!pi\b|infty|emptyset)[A-Za-z]+")


def _interval(answer: Answer) -> tuple[str, Answer] | None:
    """Return the variable of an inequality and its interval; for inequalities joined by `or`, the union."""
    if answer.kind == "list" and answer.text == "or":
        found = [_interval(part) for part in answer.parts]
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < len(found) or len({variable for variable, _ in pieces}) > 1:
            return None
        return pieces[0][0], Answer("union", tuple(piece for _, piece in pieces))
    if answer.kind != "relation" or answer.text not in _BOUNDS:
        return None
    variables = [bool(_VARIABLE.fullmatch(part.text)) for part in answer.parts]
    if variables not in ([True, False], [False, True], [False, True, False]):
        return None
    where, signs = variables.index(True), answer.text.split()
    low, high, opening, closing = Answer("leaf", (), r"-\infty"), Answer("leaf", (), r"\infty"), "(", ")"
    if where > 0:
        low, opening = answer.parts[0], "(" if signs[0] == "<" else "["
    if where + 1 < len(variables):
        high, closing = answer.parts[-1], ")" if signs[-1] == "<" else "]"
    return answer.parts[where].text, Answer(opening + closing, (low, high))


def _membership(answer: Answer, variable: str) -> Answer | None:
    r"""Return the interval or union that an answer is, or that `x \in ...` names."""
    if answer.kind == "label" and answer.text == variable + r"\in":
        answer = answer.parts[0]
    return answer if answer.kind in ("()", "(]", "[)", "[]", "union") else None


# Comparison -----------------------------------------------------------------------------------------------------


MAX_LEAVES = 10_000
"""Most pairs of expressions in one comparison of answers."""


class Comparison:
    """One comparison of two answers, with limits on its leaves and evaluations."""

    def __init__(self) -> None:
        self.leaves = MAX_LEAVES
        self.budget = _symbolic.Budget()

    def same(self, first: Answer, second: Answer) -> bool:
        """Return whether two structures agree part by part."""
        if first == second:
            return True
        for one, other in ((first, second), (second, first)):
            if (found := _interval(one)) and (interval := _membership(other, found[0])):
                return self.same(found[1], interval)
        if (first.kind == "label") != (second.kind == "label") and "relation" not in (first.kind, second.kind):
            return self.same(*(side.parts[0] if side.kind == "label" else side for side in (first, second)))
        kinds = {first.kind, second.kind}
        if kinds <= {"label", "relation"}:
            return self.same_relation(first, second)
        if kinds == {"set"}:
            return self.covers(first, second) and self.covers(second, first)
        if kinds <= {"list", "set"}:
            return len(first.parts) == len(second.parts) and self.pairs_off(first, second)
        if len(kinds) > 1 or len(first.parts) != len(second.parts):
            return False
        if kinds == {"leaf"}:
            return self.same_leaf(first, second)
        return self.pairs_off(first, second) if kinds == {"union"} else self.in_order(first.parts, second.parts)

    def in_order(self, first: tuple[Answer, ...], second: tuple[Answer, ...]) -> bool:
        """Return whether the parts agree in order."""
        return all(self.same(a, b) for a, b in zip(first, second, strict=True))

    def covers(self, first: Answer, second: Answer) -> bool:
        """Return whether every part of `first` equals some part of `second`."""
        return all(any(self.same(a, b) for b in second.parts) for a in first.parts)

    def pairs_off(self, first: Answer, second: Answer) -> bool:
        """Return whether the parts agree one to one in some order."""
        rest = list(second.parts)
        for part in first.parts:
            partner = next((i for i, other in enumerate(rest) if self.same(part, other)), None)
            if partner is None:
                return False
            del rest[partner]
        return not rest

    def same_relation(self, first: Answer, second: Answer) -> bool:
        """Return whether two equations or inequalities are equivalent."""
        if first.kind == second.kind == "label":
            return first.text == second.text and self.same(first.parts[0], second.parts[0])
        sides = [_sides(answer) for answer in (first, second)]
        if sides[0] and sides[1]:
            return _symbolic.same_equation(sides[0], sides[1], self.budget)
        same_signs = first.text == second.text and len(first.parts) == len(second.parts)
        return same_signs and self.in_order(first.parts, second.parts)

    def same_leaf(self, first: Answer, second: Answer) -> bool:
        """Return whether two expressions, numbers or words are equal. Units must not differ; one may be missing."""
        self.leaves -= 1
        if self.leaves < 0 or (first.unit and second.unit and first.unit != second.unit):
            return False
        if first.text == second.text:
            return True
        numbers = digits(first.text), digits(second.text)
        if numbers[0] and numbers[1]:
            return numbers[0] == numbers[1]
        if is_prose(first.text) or is_prose(second.text):
            return first.text.casefold() == second.text.casefold()
        return _symbolic.same_value(first.text, second.text, self.budget)


def is_prose(text: str) -> bool:
    """Return whether a text has a word: four letters that name no function, or three if it is only letters."""
    if "\\" in text or text.casefold() == "no":
        return "\\" not in text
    shortest = 3 if re.fullmatch(r"[A-Za-z ,.']+", text) else 4
    return any(len(word) >= shortest and word not in WORDS for word in re.findall("[A-Za-z]+", text))


def _sides(answer: Answer) -> tuple[str, str] | None:
    """Return both sides of a plain equation."""
    if answer.kind == "label" and answer.text.endswith("=") and answer.parts[0].kind == "leaf":
        return answer.text[:-1], answer.parts[0].text
    if answer.kind == "relation" and answer.text == "=" and {part.kind for part in answer.parts} == {"leaf"}:
        return answer.parts[0].text, answer.parts[1].text
    return None


_PLAIN = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?")
SCIENTIFIC = re.compile(r"([-+]?[0-9]{1,50}(?:\.[0-9]{0,50})?)[eE]([-+]?[0-9]{1,2})")


def digits(text: str) -> tuple[bool, str, str] | None:
    """Return sign, integer digits and fractional digits of a plain number, without outer zeros."""
    if found := SCIENTIFIC.fullmatch(text):
        text = format(decimal.Decimal(text), "f")
    found = _PLAIN.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return None
    whole, part = found[2].lstrip("0"), (found[3] or "").rstrip("0")
    return found[1] == "-" and bool(whole or part), whole, part
