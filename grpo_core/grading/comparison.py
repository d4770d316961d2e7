"""Compare two parsed answers part by part."""

import re
from fractions import Fraction

from grpo_core.grading import _symbolic
from grpo_core.grading._answer import Answer, digits
from grpo_core.grading._clock import read_time, same_time
from grpo_core.grading._evaluation import Budget
from grpo_core.grading._labels import base_of, is_expression_of_names
from grpo_core.grading._matrices import column
from grpo_core.grading._sets import Piece, Region, is_set, ordered, region
from grpo_core.grading._units import has_function, units_agree
from grpo_core.grading._wording import is_prose, same_words

MAX_LEAVES = 10_000
"""Most pairs of expressions in one comparison of answers."""


class Comparison:
    """One comparison of two answers, with limits on its leaves and evaluations.

    If it is directed, the second answer is the reference, and what it leaves open the first may add.
    """

    def __init__(self, *, directed: bool = False) -> None:
        self.leaves = MAX_LEAVES
        self.budget = Budget()
        self.directed = directed

    def same(self, first: Answer, second: Answer) -> bool:
        """Return whether two structures agree part by part."""
        if first == second:
            return True
        if (is_set(first) or is_set(second)) and (found := self.same_region(first, second)) is not None:
            return found
        kinds = {first.kind, second.kind}
        if (first.kind == "label") != (second.kind == "label") and "relation" not in kinds:
            return self.same_labelled(first, second)
        if kinds <= {"label", "relation"}:
            return self.same_relation(first, second)
        if self.directed and first.kind == "relation" and second.kind in ("leaf", "ratio"):
            return self.same_named(first, second)
        if kinds == {"set"}:
            return self.covers(first, second) and self.covers(second, first)
        if "list" in kinds:
            return self.same_list(first, second)
        if kinds & {"option", "statements", "ratio", "time"}:
            return self.same_special(first, second)
        if ("matrix" in kinds and len(kinds) > 1) or kinds in ({"matrix"}, {"determinant"}):
            return self.same_matrix(first, second)
        if len(kinds) > 1 or len(first.parts) != len(second.parts):
            return False
        if kinds == {"leaf"}:
            return self.same_leaf(first, second)
        unordered = kinds <= {"union", "intersection"}
        return self.pairs_off(first, second) if unordered else self.in_order(first.parts, second.parts)

    def in_order(self, first: tuple[Answer, ...], second: tuple[Answer, ...]) -> bool:
        """Return whether the parts agree in order."""
        return len(first) == len(second) and all(self.same(a, b) for a, b in zip(first, second, strict=True))

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

    # Lists and labels -------------------------------------------------------------------------------------------

    def same_list(self, first: Answer, second: Answer) -> bool:
        """Return whether a list agrees with a list, a set, or a tuple of named values."""
        kinds = {first.kind, second.kind}
        named = _is_named(first), _is_named(second)
        if kinds == {"list", "()"} and any(named):
            return self.in_order(_by_name(first), _by_name(second))
        if "leaf" in kinds:
            return _same_letters(*((first, second) if second.kind == "leaf" else (second, first)))
        if not kinds <= {"list", "set"} or len(first.parts) != len(second.parts) or ("set" in kinds and any(named)):
            return False
        if (first.text == "or") != (second.text == "or") and all(map(_is_letter, first.parts)):
            return False
        fixed = "fixed" in (first.text, second.text) or (second.text == ";" and (self.directed or first.text == ";"))
        if (fixed and not all(named)) or named[0] != named[1] or (all(named) and _repeats(first)):
            return self.in_order(
                *((_by_name(first), _by_name(second)) if named[0] != named[1] else (first.parts, second.parts))
            )
        return self.pairs_off(first, second)

    def same_labelled(self, first: Answer, second: Answer) -> bool:
        """Return whether a label with a value agrees with a value; `(x, y) = (1, 2)` agrees with named values."""
        label, other = (first, second) if first.kind == "label" else (second, first)
        names = label.text[:-1].strip("()").split(",")
        if len(names) > 1 and _is_named(other) and len(names) == len(label.parts[0].parts):
            named = zip(names, label.parts[0].parts, strict=True)
            return self.same(Answer("list", tuple(Answer("label", (v,), n + "=") for n, v in named)), other)
        value = label.parts[0]
        if label.text.endswith(r"\in") and other.kind == "leaf" and other.text != r"\mathbb{R}":
            return False
        return self.same(value, other) if first is label else self.same(other, value)

    def same_named(self, first: Answer, second: Answer) -> bool:
        """Return whether an expression of names stands before the number of the reference: `a + b = 10` for `10`."""
        left = first.parts[0]
        is_name = left.kind in ("leaf", "ratio", "list") and is_expression_of_names(left.text)
        if first.text != "=" or not is_name or re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi)", "", second.text)):
            return False
        return second.text.strip("-0.") != "" and self.same(first.parts[1], second)

    def same_relation(self, first: Answer, second: Answer) -> bool:
        """Return whether two equations or inequalities are equivalent."""
        if first.kind == second.kind == "label":
            names = {"y=" if label.text == "f(x)=" else label.text for label in (first, second)}
            return len(names) == 1 and self.same(first.parts[0], second.parts[0])
        sides = _sides(first), _sides(second)
        if sides[0] and sides[1] and sides[0][0] == sides[1][0]:
            sign, one, other = sides[0][0], sides[0][1:], sides[1][1:]
            if sign in ("=", "<", r"\le"):
                return _symbolic.same_equation(one, other, self.budget, directed=sign != "=")
        same_signs = first.text == second.text and len(first.parts) == len(second.parts)
        return same_signs and self.in_order(first.parts, second.parts)

    # Other structures -------------------------------------------------------------------------------------------

    def same_region(self, first: Answer, second: Answer) -> bool | None:
        """Return whether two sets of real numbers are equal; None if one of the answers is no such set."""
        one, other = region(first, self.value), region(second, self.value)
        if one is None or other is None:
            return None
        if one.variable and other.variable and one.variable != other.variable:
            return False
        if self.pairs_off(_as_union(one), _as_union(other)):
            return True
        lines = ordered(one.pieces, self.value), ordered(other.pieces, self.value)
        if lines[0] is None or lines[1] is None or not lines[0]:
            return False
        return self.in_order(_as_intervals(lines[0]), _as_intervals(lines[1]))

    def value(self, text: str) -> object:
        """Return the value of the endpoint of an interval, or None."""
        return _symbolic.real_value(text, self.budget)

    def same_special(self, first: Answer, second: Answer) -> bool:
        """Return whether options, numbers of statements, ratios or times agree."""
        kinds = {first.kind, second.kind}
        if "option" in kinds:
            return self.same_option(first, second)
        if kinds == {"statements"}:
            return self.in_order(first.parts, second.parts)
        if kinds == {"ratio"}:
            return self.in_order(first.parts, second.parts) or self.same_ratio(first, second)
        times = read_time(first.text), read_time(second.text)
        if "time" in kinds and kinds <= {"time", "ratio"} and times[0] and times[1]:
            return same_time(times[0], times[1])
        clock, other = (first, second) if first.kind == "time" else (second, first)
        hour = re.match(r"(\d+) ?[^\d:.]*$", clock.text)
        return kinds == {"time", "leaf"} and hour is not None and hour[1] == other.text

    def same_option(self, first: Answer, second: Answer) -> bool:
        """Return whether an option agrees with an option, its letter, or its text."""
        if first.kind == second.kind:
            return self.in_order(first.parts, second.parts)
        option, other = (first, second) if first.kind == "option" else (second, first)
        if other.kind == "leaf" and re.fullmatch("[A-J]", other.text):
            return other.text == option.parts[0].text
        return self.directed and self.same(
            *((option.parts[1], other) if first is option else (other, option.parts[1]))
        )

    def same_ratio(self, first: Answer, second: Answer) -> bool:
        """Return whether two ratios of plain numbers reduce to the same; two times of the day are no ratios."""
        terms = [[_fraction(part.text) for part in side.parts] for side in (first, second)]
        if len(terms[0]) != len(terms[1]) or None in terms[0] + terms[1] or " " in first.text + second.text:
            return False
        if re.fullmatch(r"\d?\d:\d\d", first.text) and re.fullmatch(r"\d?\d:\d\d", second.text):
            return False
        return all(a * terms[1][0] == b * terms[0][0] for a, b in zip(*terms, strict=True)) and 0 not in terms[0]

    def same_matrix(self, first: Answer, second: Answer) -> bool:
        """Return whether two matrices agree with their factors, or a column vector with a tuple."""
        if first.kind != second.kind:
            matrix, other = (first, second) if first.kind == "matrix" else (second, first)
            is_vector = other.kind in ("()", r"\langle\rangle") and column(matrix)
            return bool(is_vector) and self.in_order(column(matrix), other.parts)
        if first.text == second.text:
            return self.in_order(first.parts, second.parts)
        rows = list(zip(first.parts, second.parts, strict=False))
        if len(first.parts) != len(second.parts) or any(len(a.parts) != len(b.parts) for a, b in rows):
            return False
        entries = [pair for a, b in rows for pair in zip(a.parts, b.parts, strict=True)]
        return first.kind == "matrix" and all(
            a.kind == b.kind == "leaf"
            and _symbolic.same_scaled((first.text, a.text), (second.text, b.text), self.budget)
            for a, b in entries
        )

    def same_leaf(self, first: Answer, second: Answer) -> bool:
        """Return whether two expressions, numbers or words are equal. Units must agree; one may be missing."""
        self.leaves -= 1
        if self.leaves < 0 or not units_agree(first.unit, second.unit):
            return False
        if first.text == second.text:
            return True
        numbers = digits(first.text), digits(second.text)
        if numbers[0] and numbers[1]:
            return numbers[0] == numbers[1]
        if is_prose(first.text) or is_prose(second.text):
            return same_words(first.text, second.text)
        one, other = first.text, second.text
        if r"\binom" in one + other:
            one, other = (re.sub(r"C\((\w+),(\w+)\)", r"\\binom{\1}{\2}", text) for text in (one, other))
        if _symbolic.same_value(one, other, self.budget):
            return True
        degrees = r"^\circ" in one + other and not has_function(one + other)
        return degrees and _symbolic.same_value(one.replace(r"^\circ", ""), other.replace(r"^\circ", ""), self.budget)


def _as_union(answer: Region) -> Answer:
    return Answer("union", _as_intervals(answer.pieces))


def _as_intervals(pieces: tuple[Piece, ...]) -> tuple[Answer, ...]:
    return tuple(Answer(piece.marks, (piece.low, piece.high)) for piece in pieces)


def _left_sides(answer: Answer) -> list[str]:
    """Return what stands before the equality signs of the parts."""
    return [
        part.text if part.kind == "label" else part.parts[0].text + "="
        for part in answer.parts
        if part.kind == "label" or (part.kind == "relation" and part.text == "=")
    ]


def _is_named(answer: Answer) -> bool:
    """Return whether a list names its values differently, so that they must not be exchanged; `x_1, x_2` are roots."""
    sides = _left_sides(answer) if answer.kind == "list" else []
    return len({base_of(side.removesuffix("=")) for side in sides}) > 1


def _by_name(answer: Answer) -> tuple[Answer, ...]:
    """Return the parts in the order of their names if those are letters: `y = 2, x = 1` is `(1, 2)`."""
    sides = _left_sides(answer)
    if len(sides) < len(answer.parts) or not all(re.fullmatch("[a-z]=", side) for side in sides):
        return answer.parts
    return tuple(part for _, part in sorted(zip(sides, answer.parts, strict=True), key=lambda pair: pair[0]))


def _repeats(answer: Answer) -> bool:
    sides = _left_sides(answer)
    return len(set(sides)) < len(sides)


def _same_letters(list_: Answer, leaf: Answer) -> bool:
    """Return whether several letters of options are the same, written with commas and without: `A, C` and `AC`."""
    letters = "".join(part.text for part in list_.parts if re.fullmatch("[A-H]", part.text))
    complete = len(letters) == len(list_.parts) == len(set(letters)) and list_.text != "or"
    return complete and re.fullmatch("[A-H]+", leaf.text) is not None and sorted(letters) == sorted(leaf.text)


def _is_letter(answer: Answer) -> bool:
    return re.fullmatch("[A-J]", answer.text) is not None


def _fraction(text: str) -> Fraction | None:
    return Fraction(text) if re.fullmatch(r"\d{1,20}(?:\.\d{1,20})?", text) else None


def _sides(answer: Answer) -> tuple[str, str, str] | None:
    """Return the sign and both sides of a plain equation or inequality."""
    if answer.kind == "label" and answer.text.endswith("=") and answer.parts[0].kind == "leaf":
        return "=", answer.text[:-1], answer.parts[0].text
    if answer.kind == "relation" and len(answer.parts) == 2 and {part.kind for part in answer.parts} == {"leaf"}:
        return answer.text, answer.parts[0].text, answer.parts[1].text
    return None
