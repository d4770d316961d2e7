r"""Compare final answers as mathematics.

The comparison has three steps, and the time of each is bounded by the length of its input. First, string rules unify
spellings (`_spelling`, `_signs`, `_wording`, `_numerals`). Second, a splitter finds the structure (`_structure`, with
`_units`, `_labels`, `_matrices`, `_clock`). Third, structures are compared part by part (`comparison`, `_sets`): plain
numbers as strings of digits, words without case, everything else by value (`_symbolic`). What a reference leaves open
is in `_references`.

When in doubt, answers do not match: a wrong acceptance teaches a policy to cheat, a wrong rejection costs one sample.
"""

import math
import re
from fractions import Fraction

from grpo_core.grading import _symbolic
from grpo_core.grading._answer import Answer, digits
from grpo_core.grading._evaluation import Budget
from grpo_core.grading._expression import MAX_CHARS, Unreadable, read
from grpo_core.grading._numbers import is_number
from grpo_core.grading._references import float_digits, is_mark, meanings, own_words
from grpo_core.grading._spelling import clean, closing_brace, tighten, without_thousands
from grpo_core.grading._structure import readings
from grpo_core.grading._type_checks import type_checked
from grpo_core.grading._units import split_letter, split_unit
from grpo_core.grading._wording import is_prose
from grpo_core.grading.comparison import Comparison

# Public functions ----------------------------------------------------------------------------------------------------


_BOX = re.compile(
    r"\\boxed(?![A-Za-z])[^\S\n]*(?:\{|([^\s{}$\\A-Za-z][^\s{}$\\]*?)(?=[.,;]?[^\S\n]*(?:\$|\\[)\]]|\n|\Z)))"
)


@type_checked
def extract_boxed_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` with balanced braces, or of `\boxed 5`, which TeX allows.

    Args:
        text: a solution, of any length.

    Returns:
        The text between the braces without outer space, or None if there is no box or the last one is never closed.
        Without braces, the text up to the end of the formula or line. A `\boxed` followed by nothing is not a box.

    Examples:
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


@type_checked
def normalize_answer(answer: str) -> str:
    r"""Apply all string rules: remove wrappers, units and thousands separators, unify signs, lower the case of words.

    `answers_match` does more: it also compares values.

    Args:
        answer: an answer from a model or a data file.

    Returns:
        The unified text, possibly empty. A text of more than 1,000 characters only loses its outer space.

    Examples:
        >>> normalize_answer(r"$\$1,234.50$")
        '1234.50'
        >>> normalize_answer(r"\text{ Yes }.")
        'yes'
    """
    if len(answer) > MAX_CHARS:
        return answer.strip()
    text = split_unit(tighten(without_thousands(clean(answer))))[0]
    return text.casefold() if is_prose(text) else text


@type_checked
def answers_match(first: str | int | float, second: str | int | float) -> bool:
    r"""Return whether two answers are mathematically equal.

    The relation is symmetric, and a non-empty answer matches itself. Values are exact: `0.5` is `1/2`, `0.333` is not
    `1/3`, `3.14` is not `\pi`. Brackets count: `(1, 2)` is neither `[1, 2]` nor `1, 2`. The order of sets, unions and
    unbracketed lists does not matter; the order of tuples does. A known unit (percent, degree and currency signs too)
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

    Examples:
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
    return any(comparison.same(a, b) for a in readings(first) for b in readings(second))


def is_right(answer: str, reference: str) -> bool:
    r"""Return whether an answer is correct for a reference, which decides what the answer may add or leave out.

    Beyond `answers_match`, a letter after the number is a unit if the reference is a number or has the same unit:
    `5 m` is correct for `5`, and not for `5x`. If the reference is unfinished arithmetic, its value is correct:
    `40320` for `8!`, never the reverse. Words behind the number of the reference are a unit. A reference may be a
    chain of equal terms, an approximation, or an option with its text. Semicolons in a reference fix the order. The
    mark of a data set for a missing answer, such as `proof`, is correct for nothing.

    Args:
        answer: an answer, stripped.
        reference: the correct answer, stripped.

    Returns:
        True if the answer is certainly correct.
    """
    if answer == reference:
        return bool(answer) and not is_mark(reference)
    numbers = digits(answer), digits(reference)
    if numbers[0] and numbers[1]:
        return numbers[0] == numbers[1] or (len(reference) > 16 and _is_same_float(answer, reference))
    if is_mark(reference):
        return False
    if max(len(answer), len(reference)) > MAX_CHARS:
        return False
    comparison = Comparison(directed=True)
    if any(comparison.same(a, b) for a in readings(answer) for b in readings(reference)):
        return True
    wanted, own = meanings(reference), own_words(reference)
    given = readings(answer, own) if own else readings(answer)
    if any(comparison.same(a, b) or _is_chain_of(a, b, comparison) for a in given for b in wanted):
        return True
    return _is_right_by_value(answer, reference) or (len(reference) > 16 and _is_same_float(answer, reference))


def _is_right_by_value(answer: str, reference: str) -> bool:
    """Return whether a number with a letter as its unit is right, or the value of a reference that is arithmetic."""
    (given, unit), (value, wanted) = (split_unit(tighten(without_thousands(clean(t)))) for t in (answer, reference))
    if not unit:
        given, unit = split_letter(given)
    if unit and wanted and unit != wanted:
        return False
    if _spells_number(value):
        return bool(unit) and texts_match(given, value)
    if any(structure.kind == "statements" for structure in meanings(reference)):
        return False
    return _symbolic.comes_to(given, value, Budget())


def _is_chain_of(answer: Answer, reference: Answer, comparison: Comparison) -> bool:
    r"""Return whether all terms of a chain equal the reference, as in `x = 2/4 = 1/2` and `\sqrt{2} \approx 1.41`.

    A term after an approximation sign must round the term before it. Work before the result is no such term.
    """
    if answer.kind == "label":
        answer = answer.parts[0]
    if answer.kind != "relation" or not set(answer.text.split()) <= {"=", r"\approx"}:
        return False
    first, *rest = answer.parts
    signs = answer.text.split()
    if len(rest) > 1 and first.kind == "leaf" and re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?", first.text):
        first, rest, signs = rest[0], rest[1:], signs[1:]
    texts = [term.text for term in (first, *rest)]
    if len(set(texts)) < len(texts) or not comparison.same(first, reference):
        return False
    exact = [term for term, sign in zip(rest, signs, strict=True) if sign == "="]
    rounded = [term for term, sign in zip(rest, signs, strict=True) if sign != "="]
    return all(comparison.same(term, reference) for term in exact) and all(
        _symbolic.rounds_to(first.text, term.text, comparison.budget) for term in rounded
    )


def _is_same_float(answer: str, reference: str) -> bool:
    """Return whether an answer spells a number within the precision of a reference that a program printed."""
    value = float_digits(reference)
    if value is None:
        return False
    try:
        tree = read(tighten(clean(answer)))
        exact = _symbolic.exact_value(tree) if is_number(tree) else None
    except Unreadable:
        return False
    return exact is not None and abs(exact - Fraction(value)) <= abs(Fraction(value)) * Fraction(1, 2**51)


def _spells_number(text: str) -> bool:
    try:
        return digits(text) is not None or is_number(read(text))
    except Unreadable:
        return False
