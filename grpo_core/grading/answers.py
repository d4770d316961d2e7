r"""Compare final answers as mathematics.

The comparison has three steps, and the time of each is bounded by the length of its input. First, string rules unify
spellings: wrappers, thousands separators, units, Unicode. Second, a splitter finds the structure: lists, sets, tuples
and intervals with their brackets, unions, matrices, equations and inequalities. Third, single expressions are
compared: plain numbers as strings of digits, words without case, everything else by value (`_symbolic`).

When in doubt, answers do not match: a wrong acceptance teaches a policy to cheat, a wrong rejection costs one sample.
"""

import decimal
import math
import re
from functools import lru_cache

from grpo_core._checks import shape_checked
from grpo_core.grading import _symbolic
from grpo_core.grading._expression import MAX_CHARS, MAX_DEPTH, Unreadable, is_number, read
from grpo_core.grading._spelling import (
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
from grpo_core.grading.comparison import SCIENTIFIC, Answer, Comparison, digits, is_prose

_LIST_SIGNS = {",", ";", "or", "and"}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"}
_MIRRORED = {">": "<", r"\ge": r"\le", "=": "="}
_MATRIX = re.compile(r"\\begin\{([pbBvV]?matrix|array)\}(?:(?<=array\})\{[lcr|]*\})?(.*)\\end\{\1\}")
_LABEL = re.compile(  # a variable, a segment, a word of four letters, a Greek letter, an angle, f(x) or (x,y)
    r"[A-Za-z]'?(?:_\{?\w+\}?)?|[A-Z]{2}|[A-Za-z]{4,}|\\[A-Za-z]+|(?:m ?)?\\angle ?[A-Z]{1,3}"
    r"|(?:[A-Za-z]'?(?:\^\{-1\})?)?\([a-z](?:,[a-z])*\)"
)


def _split(text: str, signs: set[str]) -> tuple[list[str], list[str]]:
    """Split a text at signs outside all brackets; return the parts and the signs."""
    parts, cuts, start = list[str](), list[str](), 0
    for position, token, depth in scan(text):
        if depth == 0 and token in signs:
            parts.append(text[start:position].strip())
            cuts.append(token)
            start = position + len(token)
    return [*parts, text[start:].strip()], cuts


def _brackets(text: str) -> tuple[str, str] | None:
    """Return the opening and closing bracket if one pair surrounds the whole text."""
    tokens = list(scan(text))
    if len(tokens) < 2 or tokens[0][1] not in ("(", "[", r"\{", r"\langle") or tokens[-1][1] not in CLOSERS:
        return None
    if any(depth < 1 for _, _, depth in tokens[1:-1]) or tokens[-1][2] != 0:
        return None
    pair = tokens[0][1], tokens[-1][1]
    half_open = pair in (("(", "]"), ("[", ")"))
    return pair if half_open or pair in (("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\langle", r"\rangle")) else None


def _parse(text: str) -> Answer:
    """Return the structure of a cleaned text; a single expression is a leaf."""
    if (matrix := _MATRIX.fullmatch(text)) and r"\begin" not in matrix[2]:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2].strip().removesuffix(r"\\"))]
        parts = tuple(Answer("row", tuple(_parse(unwrap(entry)) for entry in row)) for row in rows)
        return Answer("determinant" if matrix[1][0] in "vV" else "matrix", parts)
    for kind, signs in (("list", _LIST_SIGNS), ("relation", _RELATIONS), ("union", {r"\cup"})):
        items, cuts = _split(text, signs)
        if cuts and all(items):
            joint = "or" if set(cuts) == {"or"} else ""
            return _relation(items, cuts) if kind == "relation" else Answer(kind, tuple(map(_parse, items)), joint)
    if (pair := _brackets(text)) is not None:
        items, cuts = _split(text[len(pair[0]) : -len(pair[1])].strip(), {",", ";"})
        if all(items) and pair[0] == r"\{":
            return Answer("set", tuple(map(_parse, items)))
        if all(items) and (cuts or pair[0] != "("):
            return Answer("".join(pair), tuple(map(_parse, items)))
        if pair == ("(", ")") and not cuts and items[0]:
            return _parse(items[0])
    if text.count(r"\pm") == 1 and r"\mp" not in text:
        return Answer("list", tuple(_parse(text.replace(r"\pm", sign).lstrip("+ ")) for sign in "+-"))
    return _leaf(text)


def _relation(items: list[str], signs: list[str]) -> Answer:
    """Return an equation or inequality with its signs turned to less-than."""
    if len(items) == 2 and signs[0] in ("=", r"\in") and _LABEL.fullmatch(without_text_commands(items[0])):
        return Answer("label", (_parse(items[1]),), items[0] + signs[0])
    if all(sign in _MIRRORED for sign in signs) and set(signs) != {"="}:
        items, signs = items[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    return Answer("relation", tuple(map(_parse, items)), " ".join(signs))


def _leaf(text: str) -> Answer:
    value, unit = split_unit(text)
    if SCIENTIFIC.fullmatch(value):
        value = format(decimal.Decimal(value), "f")
    choice = re.fullmatch(r"\(?([A-Z])\)", value)
    return Answer("leaf", (), choice[1] if choice else without_text_commands(value), unit)


@lru_cache(maxsize=4096)
def _readings(text: str) -> tuple[Answer, ...]:
    """Return the possible meanings of an answer: `1,234` is a number or a list of two."""
    cleaned = clean(text)
    if not cleaned or max((depth for _, _, depth in scan(cleaned)), default=0) > MAX_DEPTH:
        return ()
    spellings = tighten(without_thousands(cleaned)), tighten(cleaned)
    return tuple(_parse(spelling) for spelling in dict.fromkeys(spellings))


# Public functions ----------------------------------------------------------------------------------------------------


_BOX = re.compile(
    r"\\boxed(?![A-Za-z])[^\S\n]*(?:\{|([^\s{}$\\A-Za-z][^\s{}$\\]*?)(?=[.,;]?[^\S\n]*(?:\$|\\[)\]]|\n|\Z)))"
)


@shape_checked
def extract_boxed_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` with balanced braces, or of `\boxed 5`, which TeX allows.

    Args:
        text: a solution, of any length.

    Returns:
        The text between the braces without outer space, or None if there is no box or the last one is never closed.
        Without braces, the text up to the end of the formula or line. A `\boxed` followed by nothing is not a box.

    Example:
        >>> extract_boxed_answer(r"First \boxed{3}, so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = max((found.start() for found in _BOX.finditer(text)), default=len(text))
    boxes = boxed_answers(text[start:])
    return boxes[0] if boxes else None


def boxed_answers(text: str) -> list[str]:
    r"""Return the contents of all closed `\boxed{...}` and `\boxed 5`, in order; of nested boxes, the outer one.

    Args:
        text: a solution, of any length.

    Returns:
        The contents without outer space.
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
    r"""Apply all string rules: remove wrappers, units and thousands separators, unify signs, lower the case of words.

    `answers_match` does more: it also compares values.

    Args:
        answer: an answer from a model or a data file.

    Returns:
        The unified text, possibly empty. A text of more than 1,000 characters only loses its outer space.

    Example:
        >>> normalize_answer(r"$\$1,234.50$")
        '1234.50'
        >>> normalize_answer(r"\text{ Yes }.")
        'yes'
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = split_unit(tighten(without_thousands(clean(answer))))[0]
    return text.casefold() if is_prose(text) else text


@shape_checked
def answers_match(first: str | int | float, second: str | int | float) -> bool:
    r"""Return whether two answers are mathematically equal.

    The relation is symmetric, and a non-empty answer matches itself. Values are exact: `0.5` is `1/2`, `0.333` is not
    `1/3`, `3.14` is not `\pi`. Brackets count: `(1, 2)` is neither `[1, 2]` nor `1, 2`. The order of sets, unions and
    unbracketed lists does not matter; the order of tuples does. A unit (including percent, degree and currency signs)
    may be missing on one side but must not differ: `50\%` is `50`, and not `0.5`. The same holds for a label: `x = 5`
    is `5`, and not `y = 5`. An inequality is the interval of its one variable: `x \ge 5` is `[5, \infty)`. Case is
    ignored. A numeral of another base, `101_2`, equals only itself. Irrational values, and expressions with variables
    at eight points, must agree to a hundred digits.

    A rational number matches only spellings of a number: integer, decimal, mixed number, fraction of integers (`74/2`,
    unreduced), `1.5 \times 10^3`, and one power of integers such as `2^{10}`, alone or in a fraction.
    Unfinished arithmetic does not match: `35 + 2` is not `37`, `2\sqrt{4}` and `\sqrt{16}` are not `4`, `5!` is not
    `120`, and `\sin^2 x + \cos^2 x` is not `1`. Likewise `2x = 10` is not `x = 5`. If neither expression is a plain
    number, their values decide: `1 + \sqrt{2}` is `\sqrt{2} + 1`.

    No text raises an error or takes long. A text that exceeds a limit (1,000 characters, 24 nested brackets, 90 digits
    beside other signs, huge powers) equals only itself.

    Args:
        first: an answer, as text or as a finite number.
        second: the other answer.

    Returns:
        True if the answers are certainly equal; False if they differ or the comparison is undecided.

    Raises:
        ValueError: a number is infinite or NaN.

    Example:
        >>> answers_match(r"\dfrac{1}{2}", 0.5), answers_match(r"2\sqrt{2}", r"\sqrt 8"), answers_match("12", "21")
        (True, True, False)
        >>> answers_match("35 + 2", 37), answers_match(r"1+\sqrt{2}", r"\sqrt{2}+1"), answers_match("10^3", 1000)
        (False, True, True)
    """
    return texts_match(answer_text(first, "first"), answer_text(second, "second"))


def answer_text(answer: str | float, name: str) -> str:
    """Return the answer as stripped text.

    Args:
        answer: a text or a finite number.
        name: the name of the argument, for the error message.

    Returns:
        The text.

    Raises:
        ValueError: a number is infinite or NaN.
    """
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{name}={answer} must be finite")
    return answer.strip() if isinstance(answer, str) else str(answer)


def texts_match(first: str, second: str) -> bool:
    """Return `answers_match` of two stripped texts without checking arguments.

    Args:
        first: an answer.
        second: the other answer.

    Returns:
        True if the answers are certainly equal.
    """
    if first == second:
        return bool(first)
    numbers = digits(first), digits(second)
    if numbers[0] and numbers[1]:
        return numbers[0] == numbers[1]
    if max(len(first), len(second)) > MAX_CHARS:
        return False
    comparison = Comparison()
    first, second = sorted((first, second))  # symmetric by construction
    return any(comparison.same(a, b) for a in _readings(first) for b in _readings(second))


def is_right(answer: str, reference: str) -> bool:
    r"""Return whether an answer is correct for a reference: `texts_match`, and two more cases.

    First, if the reference is a number or has the same unit, a letter after the number is a unit: `5 m` is correct for
    `5`, but not for `5x`. Second, if the reference is unfinished arithmetic, its value is correct: `40320` for `8!`.
    The reverse stays wrong.

    Args:
        answer: an answer, stripped.
        reference: the correct answer, stripped.

    Returns:
        True if the answer is certainly correct.
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
        return digits(text) is not None or is_number(read(text))
    except Unreadable:
        return False
