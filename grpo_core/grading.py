r"""Comparing final answers as mathematics.

Three steps, each bounded in the length of its input. String rules unify spellings: wrappers, thousands separators,
units, Unicode. A splitter then finds the structure: lists, sets, tuples and intervals with their brackets, unions,
matrices, equations and inequalities. What remains are single expressions: plain numbers are compared as strings of
digits, words without regard to case, and the rest by `_symbolic`, which compares values.

A wrong acceptance teaches a policy to cheat, a wrong refusal costs one sample, so doubt is a refusal.
"""

import decimal
import math
import re
from functools import lru_cache
from typing import NamedTuple

from grpo_core import _symbolic
from grpo_core._check import shape_checked
from grpo_core._expression import MAX_CHARS, MAX_DEPTH, WORDS, Unreadable, is_number, read
from grpo_core._spelling import (
    CLOSERS,
    clean,
    closing_brace,
    scan,
    split_letter,
    split_unit,
    tighten,
    unwrap,
    without_text_commands,
    without_thousands,
)

# Structure ------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """The structure of an answer: a leaf with its text and unit, or parts in or out of order."""

    kind: str  # leaf, list, set, union, matrix, relation, or the two brackets of a tuple
    parts: tuple["_Answer", ...] = ()
    text: str = ""  # of a leaf: the expression; of a relation: its signs; of a list of alternatives: or
    unit: str = ""


_LIST_SIGNS = {",", ";", "or", "and"}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"}
_MIRRORED = {">": "<", r"\ge": r"\le", "=": "="}
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:(?<=array\})\{[lcr|]*\})?(.*)\\end\{\1\}")
_LABEL = re.compile(  # a variable, a segment, a word of four letters, a Greek letter, an angle, f(x) or (x,y)
    r"[A-Za-z]'?(?:_\{?\w+\}?)?|[A-Z]{2}|[A-Za-z]{4,}|\\[A-Za-z]+|(?:m ?)?\\angle ?[A-Z]{1,3}"
    r"|(?:[A-Za-z]'?(?:\^\{-1\})?)?\([a-z](?:,[a-z])*\)"
)


def _split(text: str, signs: set[str]) -> tuple[list[str], list[str]]:
    """The text cut at signs outside all brackets, and the signs."""
    parts, cuts, start = list[str](), list[str](), 0
    for position, token, depth in scan(text):
        if depth == 0 and token in signs:
            parts.append(text[start:position].strip())
            cuts.append(token)
            start = position + len(token)
    return [*parts, text[start:].strip()], cuts


def _brackets(text: str) -> tuple[str, str] | None:
    """The opening and closing bracket if one pair surrounds the whole text."""
    tokens = list(scan(text))
    if len(tokens) < 2 or tokens[0][1] not in ("(", "[", r"\{", r"\langle") or tokens[-1][1] not in CLOSERS:
        return None
    if any(depth < 1 for _, _, depth in tokens[1:-1]) or tokens[-1][2] != 0:
        return None
    pair = tokens[0][1], tokens[-1][1]
    half_open = pair in (("(", "]"), ("[", ")"))
    return pair if half_open or pair in (("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\langle", r"\rangle")) else None


def _parse(text: str) -> _Answer:
    """The structure of a cleaned text; what has none is a leaf."""
    if (matrix := _MATRIX.fullmatch(text)) and r"\begin" not in matrix[2]:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix(r"\\"))]
        parts = tuple(_Answer("row", tuple(_parse(unwrap(entry)) for entry in row)) for row in rows)
        return _Answer("determinant" if matrix[1][0] in "vV" else "matrix", parts)
    for kind, signs in (("list", _LIST_SIGNS), ("relation", _RELATIONS), ("union", {r"\cup"})):
        items, cuts = _split(text, signs)
        if cuts and all(items):
            joint = "or" if set(cuts) == {"or"} else ""
            return _relation(items, cuts) if kind == "relation" else _Answer(kind, tuple(map(_parse, items)), joint)
    if (pair := _brackets(text)) is not None:
        items, cuts = _split(text[len(pair[0]) : -len(pair[1])].strip(), {",", ";"})
        if all(items) and pair[0] == r"\{":
            return _Answer("set", tuple(map(_parse, items)))
        if all(items) and (cuts or pair[0] != "("):
            return _Answer("".join(pair), tuple(map(_parse, items)))
        if pair == ("(", ")") and not cuts and items[0]:
            return _parse(items[0])
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        return _Answer("list", tuple(_parse(text.replace(r"\pm", sign).lstrip("+ ")) for sign in "+-"))
    return _leaf(text)


def _relation(items: list[str], signs: list[str]) -> _Answer:
    """An equation or inequality, its signs turned to less-than."""
    if len(items) == 2 and signs[0] in ("=", r"\in") and _LABEL.fullmatch(without_text_commands(items[0])):
        return _Answer("label", (_parse(items[1]),), items[0] + signs[0])
    if all(sign in _MIRRORED for sign in signs) and set(signs) != {"="}:
        items, signs = items[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    return _Answer("relation", tuple(map(_parse, items)), " ".join(signs))


_BOUNDS = {"<", r"\le", "< <", r"< \le", r"\le <", r"\le \le"}
_VARIABLE = re.compile(r"[A-Za-df-hj-z](?:_\{?\w+\}?)?|\\(?!pi\b|infty|emptyset)[A-Za-z]+")


def _interval(answer: _Answer) -> tuple[str, _Answer] | None:
    """The variable of an inequality and the interval it may lie in; of inequalities joined by `or`, the union."""
    if answer.kind == "list" and answer.text == "or":
        found = [_interval(part) for part in answer.parts]
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < len(found) or len({variable for variable, _ in pieces}) > 1:
            return None
        return pieces[0][0], _Answer("union", tuple(piece for _, piece in pieces))
    if answer.kind != "relation" or answer.text not in _BOUNDS:
        return None
    variables = [bool(_VARIABLE.fullmatch(part.text)) for part in answer.parts]
    if variables not in ([True, False], [False, True], [False, True, False]):
        return None
    where, signs = variables.index(True), answer.text.split()
    low, high, opening, closing = _Answer("leaf", (), r"-\infty"), _Answer("leaf", (), r"\infty"), "(", ")"
    if where > 0:
        low, opening = answer.parts[0], "(" if signs[0] == "<" else "["
    if where + 1 < len(variables):
        high, closing = answer.parts[-1], ")" if signs[-1] == "<" else "]"
    return answer.parts[where].text, _Answer(opening + closing, (low, high))


def _membership(answer: _Answer, variable: str) -> _Answer | None:
    r"""The interval or union that an answer is, or in which it says that the variable lies."""
    if answer.kind == "label" and answer.text == variable + r"\in":
        answer = answer.parts[0]
    return answer if answer.kind in ("()", "(]", "[)", "[]", "union") else None


def _leaf(text: str) -> _Answer:
    value, unit = split_unit(text)
    if _SCIENTIFIC.fullmatch(value):
        value = format(decimal.Decimal(value), "f")
    choice = re.fullmatch(r"\(?([A-Z])\)", value)
    return _Answer("leaf", (), choice[1] if choice else without_text_commands(value), unit)


@lru_cache(maxsize=4096)
def _readings(text: str) -> tuple[_Answer, ...]:
    """What an answer can mean: `1,234` is a number, or else a list of two."""
    cleaned = clean(text)
    if not cleaned or max((depth for _, _, depth in scan(cleaned)), default=0) > MAX_DEPTH:
        return ()
    spellings = tighten(without_thousands(cleaned)), tighten(cleaned)
    return tuple(_parse(spelling) for spelling in dict.fromkeys(spellings))


# Comparison -----------------------------------------------------------------------------------------------------


MAX_LEAVES = 10_000
"""Pairs of expressions in one comparison of answers."""


class _Comparison:
    """One comparison of two answers, with a limit on the leaves it may compare and on their evaluations."""

    def __init__(self) -> None:
        self.leaves = MAX_LEAVES
        self.budget = _symbolic.Budget()

    def same(self, first: _Answer, second: _Answer) -> bool:
        """Whether two structures agree part by part."""
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

    def in_order(self, first: tuple[_Answer, ...], second: tuple[_Answer, ...]) -> bool:
        """Whether the parts agree one by one."""
        return all(self.same(a, b) for a, b in zip(first, second, strict=True))

    def covers(self, first: _Answer, second: _Answer) -> bool:
        """Whether every part of `first` is one of `second`."""
        return all(any(self.same(a, b) for b in second.parts) for a in first.parts)

    def pairs_off(self, first: _Answer, second: _Answer) -> bool:
        """Whether the parts agree one to one in some order."""
        rest = list(second.parts)
        for part in first.parts:
            partner = next((i for i, other in enumerate(rest) if self.same(part, other)), None)
            if partner is None:
                return False
            del rest[partner]
        return not rest

    def same_relation(self, first: _Answer, second: _Answer) -> bool:
        """Whether two equations or inequalities state the same."""
        if first.kind == second.kind == "label":
            return first.text == second.text and self.same(first.parts[0], second.parts[0])
        sides = [_sides(answer) for answer in (first, second)]
        if sides[0] and sides[1]:
            return _symbolic.same_equation(sides[0], sides[1], self.budget)
        same_signs = first.text == second.text and len(first.parts) == len(second.parts)
        return same_signs and self.in_order(first.parts, second.parts)

    def same_leaf(self, first: _Answer, second: _Answer) -> bool:
        """Whether two expressions, numbers or words are equal; a unit may be missing on one side, not differ."""
        self.leaves -= 1
        if self.leaves < 0 or (first.unit and second.unit and first.unit != second.unit):
            return False
        if first.text == second.text:
            return True
        numbers = _digits(first.text), _digits(second.text)
        if numbers[0] and numbers[1]:
            return numbers[0] == numbers[1]
        if _is_prose(first.text) or _is_prose(second.text):
            return first.text.casefold() == second.text.casefold()
        return _symbolic.same_value(first.text, second.text, self.budget)


def _is_prose(text: str) -> bool:
    """Whether a text has a word: four letters that name no function, or three in letters alone."""
    if "\\" in text or text.casefold() == "no":
        return "\\" not in text
    shortest = 3 if re.fullmatch(r"[A-Za-z ,.']+", text) else 4
    return any(len(word) >= shortest and word not in WORDS for word in re.findall("[A-Za-z]+", text))


def _sides(answer: _Answer) -> tuple[str, str] | None:
    """Both sides of a plain equation."""
    if answer.kind == "label" and answer.text.endswith("=") and answer.parts[0].kind == "leaf":
        return answer.text[:-1], answer.parts[0].text
    if answer.kind == "relation" and answer.text == "=" and {part.kind for part in answer.parts} == {"leaf"}:
        return answer.parts[0].text, answer.parts[1].text
    return None


_PLAIN = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?")
_SCIENTIFIC = re.compile(r"([-+]?[0-9]{1,50}(?:\.[0-9]{0,50})?)[eE]([-+]?[0-9]{1,2})")


def _digits(text: str) -> tuple[bool, str, str] | None:
    """Sign, whole and fractional digits of a plain number of any length, without zeros at the ends."""
    if found := _SCIENTIFIC.fullmatch(text):
        text = format(decimal.Decimal(text), "f")
    found = _PLAIN.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return None
    whole, part = found[2].lstrip("0"), (found[3] or "").rstrip("0")
    return found[1] == "-" and bool(whole or part), whole, part


# The surface ----------------------------------------------------------------------------------------------------


_BOX = re.compile(
    r"\\boxed(?![A-Za-z])[^\S\n]*(?:\{|([^\s{}$\\A-Za-z][^\s{}$\\]*?)(?=[.,;]?[^\S\n]*(?:\$|\\[)\]]|\n|\Z)))"
)


@shape_checked
def extract_boxed_answer(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, its braces balanced, or of `\boxed 5`, which TeX allows.

    Args:
        text: a solution, of any length.

    Returns:
        What stands between the braces, outer space removed; None without a box, or if the last one is never closed.
        Without braces, what stands in front of the end of the formula or line. A `\boxed` with nothing behind it is no
        box.

    Example:
        >>> extract_boxed_answer(r"First \boxed{3}, so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = max((found.start() for found in _BOX.finditer(text)), default=len(text))
    boxes = boxed_answers(text[start:])
    return boxes[0] if boxes else None


def boxed_answers(text: str) -> list[str]:
    r"""Content of every closed `\boxed{...}` and every `\boxed 5`, in order; of nested ones, the outer.

    Args:
        text: a solution, of any length.

    Returns:
        The contents, outer space removed.
    """
    boxes, start = list[str](), 0
    while found := _BOX.search(text, start):
        if found[1]:
            boxes.append(found[1])
            start = found.end()
            continue
        end = closing_brace(text, found.end() - 1)
        if end < 0:
            break
        boxes.append(text[found.end() : end].strip())
        start = end
    return boxes


@shape_checked
def normalize_answer(answer: str) -> str:
    r"""Answer after every string rule: no wrapper, unit or thousands separator, one spelling per sign, words lower.

    What two answers have in common after these rules is not all that `answers_match` sees: it also compares values.

    Args:
        answer: an answer as a model or a data file writes it.

    Returns:
        The unified text; empty if nothing is left. A text of more than 1,000 characters only loses its outer space.

    Example:
        >>> normalize_answer(r"$\$1,234.50$")
        '1234.50'
        >>> normalize_answer(r"\text{ Yes }.")
        'yes'
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = split_unit(tighten(without_thousands(clean(answer))))[0]
    return text.casefold() if _is_prose(text) else text


@shape_checked
def answers_match(first: str | int | float, second: str | int | float) -> bool:
    r"""Whether two answers are the same mathematics.

    Symmetric, and true of an answer and itself unless it is empty. Values are exact: `0.5` is `1/2`, `0.333` is not
    `1/3`, `3.14` is not `\pi`. Brackets count: `(1, 2)` is neither `[1, 2]` nor `1, 2`. Sets, unions and unbracketed
    lists have no order, tuples have one. A unit (percent, degree and currency signs among them) may be missing on one
    side but not differ: `50\%` is `50`, and not `0.5`. So may a label: `x = 5` is `5`, and not `y = 5`. An inequality
    is the interval of its one variable: `x \ge 5` is `[5, \infty)`. Words ignore case. A numeral of another base,
    `101_2`, equals itself only. Irrational values, and expressions with variables at eight points, must agree to a
    hundred digits.

    A rational number is matched by its spellings only: integer, decimal, mixed number, fraction of integers (`74/2`,
    unreduced), `1.5 \times 10^3`, and one power of integers such as `2^{10}`, alone or in a fraction. Work left undone
    is no spelling: `35 + 2` is not `37`, and neither `2\sqrt{4}` nor `\sqrt{16}` is `4`, nor `5!` `120`, nor
    `\sin^2 x + \cos^2 x` `1`. Likewise `2x = 10` is not `x = 5`. Between two expressions of which neither is a plain
    number the values decide: `1 + \sqrt{2}` is `\sqrt{2} + 1`.

    Nothing raises on any text, and no text takes long: what exceeds a limit (1,000 characters, 24 brackets deep, 90
    digits beside other signs, huge powers) equals itself only.

    Args:
        first: an answer, as text or as a finite number.
        second: the other.

    Returns:
        True if they are certainly equal; False if they differ or nothing decides.

    Raises:
        ValueError: a number is infinite or not a number.

    Example:
        >>> answers_match(r"\dfrac{1}{2}", 0.5), answers_match(r"2\sqrt{2}", r"\sqrt 8"), answers_match("12", "21")
        (True, True, False)
        >>> answers_match("35 + 2", 37), answers_match(r"1+\sqrt{2}", r"\sqrt{2}+1"), answers_match("10^3", 1000)
        (False, True, True)
    """
    return texts_match(answer_text(first, "first"), answer_text(second, "second"))


def answer_text(answer: str | float, name: str) -> str:
    """The answer as stripped text.

    Args:
        answer: a text or a finite number.
        name: the argument it came in, for the error.

    Returns:
        The text.

    Raises:
        ValueError: a number is infinite or not a number.
    """
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{name}={answer} must be finite")
    return answer.strip() if isinstance(answer, str) else str(answer)


def texts_match(first: str, second: str) -> bool:
    """`answers_match` of two stripped texts, without the check of its arguments.

    Args:
        first: an answer.
        second: the other.

    Returns:
        True if they are certainly equal.
    """
    if first == second:
        return bool(first)
    numbers = _digits(first), _digits(second)
    if numbers[0] and numbers[1]:
        return numbers[0] == numbers[1]
    if max(len(first), len(second)) > MAX_CHARS:
        return False
    comparison = _Comparison()
    first, second = sorted((first, second))  # symmetric by construction
    return any(comparison.same(a, b) for a in _readings(first) for b in _readings(second))


def is_right(answer: str, reference: str) -> bool:
    r"""Whether an answer is right where the reference is what it is compared with: `texts_match`, and a little more.

    Of two answers none is more than the other; of a reference more is known. If it is a number, or has the unit too,
    a letter behind a number is a unit: `5 m` is right where `5` is, and wrong where `5x` is. If it is arithmetic that
    was left undone, what it comes to is right: `40320` where `8!` is. The other way round it stays wrong.

    Args:
        answer: an answer, stripped.
        reference: what is right, stripped.

    Returns:
        True if the answer is certainly right.
    """
    if texts_match(answer, reference):
        return True
    if max(len(answer), len(reference)) > MAX_CHARS:
        return False
    (given, unit), (value, wanted) = (split_unit(tighten(without_thousands(clean(t)))) for t in (answer, reference))
    if not unit:
        given, unit = split_letter(given)
    if unit and wanted and unit != wanted:
        return False
    if _spells_number(value):
        return texts_match(given, value)
    return _symbolic.comes_to(given, value, _symbolic.Budget())


def _spells_number(text: str) -> bool:
    try:
        return _digits(text) is not None or is_number(read(text))
    except Unreadable:
        return False
