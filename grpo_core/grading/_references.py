r"""Read a reference: what data sets write around an answer, and what an answer may therefore leave out."""

import re
from functools import lru_cache

from grpo_core.grading._answer import Answer
from grpo_core.grading._sets import is_set
from grpo_core.grading._spelling import clean, split, tighten, without_text_commands
from grpo_core.grading._structure import readings
from grpo_core.grading._units import split_unit

ANY_WORD = frozenset({"*"})
_MARKS = {"proof", "notfound", "not found", "none given", "n/a", "na", "nan", "null", "no answer", "see solution"}
_APPROXIMATELY = re.compile(r"\s*(?:\\approx|about|approximately|approx\.?|around)\s*(?=[-\\\d.$])")
_CALLED = re.compile(r"(?:the )?(\d+(?:st|nd|rd|th)) [a-z ]+", re.IGNORECASE)
_OTHER_WORDS = re.compile(r",?\s*(?:i\.\s?e\.|that is|or equivalently|equivalently|in other words),?\s*")


def is_mark(reference: str) -> bool:
    """Return whether a reference is no answer but the mark of a data set for a question without one."""
    return reference.strip(" .$").casefold() in _MARKS


@lru_cache(maxsize=1024)
def meanings(reference: str) -> tuple[Answer, ...]:
    r"""Return the structures that are correct for a reference.

    Args:
        reference: the correct answer, as a data set writes it.

    Returns:
        The readings of the whole text and of its equivalent parts: without `\approx`, the terms of a chain of equal
        terms, both sides of `i.e.`, and an inequality and its interval around a colon.
    """
    spellings = [reference, *_OTHER_WORDS.split(reference)]
    if found := _APPROXIMATELY.match(clean(reference)):
        spellings.append(clean(reference)[found.end() :])
    if found := _CALLED.fullmatch(without_text_commands(clean(reference))):
        spellings.append(found[1])
    answers = list[Answer]()
    for spelling in dict.fromkeys(spellings):
        answers += readings(spelling)
        if ":" in spelling:
            answers += _two_notations(clean(spelling))
        if own_words(spelling):
            answers += readings(spelling, ANY_WORD)
    return tuple(dict.fromkeys(answers + [term for answer in answers for term in _terms(answer)]))


def _two_notations(cleaned: str) -> list[Answer]:
    """Return both sides of a colon if each is a set of numbers."""
    parts, cuts = split(cleaned, {":"})
    sides = [side for part in parts for side in readings(part)[:1]]
    return (
        sides
        if len(cuts) == 1 and len(sides) == 2 and all(is_set(side) or side.kind == "()" for side in sides)
        else []
    )


def _terms(answer: Answer) -> list[Answer]:
    """Return the terms of a chain such as `x = 10/4 = 5/2`, each with the label of the chain if it has one."""
    if answer.kind == "label" and answer.parts[0].kind == "relation":
        return [answer._replace(parts=(term,)) for term in _terms(answer.parts[0])]
    if answer.kind != "relation" or not set(answer.text.split()) <= {"=", r"\approx"}:
        return []
    first, *rest = answer.parts
    if len(rest) == 1 and answer.text == "=":
        return rest if _is_arithmetic(first.text) else []
    label = re.fullmatch(r"[A-Za-z]+|[A-Za-z]+(?:_\{?\w+\}?)?(?:\(\w+\))?|\\[A-Za-z]+", first.text)
    if label and first.kind == "leaf":
        return [Answer("label", (term,), first.text + "=") for term in rest]
    return [first, *rest]


def _is_arithmetic(text: str) -> bool:
    return not re.search(r"[A-Za-z]", re.sub(r"\\(?:frac|sqrt|sin|cos|tan|log|ln|pi|cdot|times|circ|binom)", "", text))


@lru_cache(maxsize=1024)
def own_words(reference: str) -> frozenset[str]:
    """Return the words behind the number of a reference that no list knows; an answer may use them as a unit."""
    if not any(map(str.isalpha, reference)):
        return frozenset()
    text = tighten(clean(reference))
    unit = split_unit(text, ANY_WORD)[1]
    return frozenset(unit.split()) if unit != split_unit(text)[1] else frozenset()


# Floating point -------------------------------------------------------------------------------------------------

_FLOAT = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def float_digits(reference: str) -> float | None:
    """Return the value of a reference that a program printed with all digits of a float: `33.333333333333336`.

    Such a reference is a rounded number, so that its neighbors are correct as well. 16 digits tell it apart.
    """
    significant = re.sub(r"e.*|[^\d]", "", reference).lstrip("0")
    if not _FLOAT.fullmatch(reference) or len(significant) not in (16, 17):
        return None
    value = float(reference)
    return value if repr(value) == reference else None
