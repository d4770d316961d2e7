r"""Find the structure of an answer: lists, sets, tuples and intervals, matrices, equations and inequalities."""

import decimal
import re
from functools import lru_cache, partial

from grpo_core.grading._answer import SCIENTIFIC, Answer, digits
from grpo_core.grading._clock import read_time
from grpo_core.grading._expression import MAX_DEPTH
from grpo_core.grading._labels import is_label
from grpo_core.grading._matrices import read_matrix, read_system, read_transposed
from grpo_core.grading._numerals import read_number_words, read_repeating
from grpo_core.grading._spelling import (
    brackets,
    clean,
    scan,
    split,
    tighten,
    unwrap,
    without_text_commands,
    without_thousands,
)
from grpo_core.grading._units import read_compound, split_unit
from grpo_core.grading._wording import read_option, read_phrase, read_statements, without_sentence

_SIGNS = {
    "list": {",", ";", "or", "and", "&", r"\&"},
    "relation": {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"},
    "union": {r"\cup"},
    "intersection": {r"\cap"},
    "difference": {r"\setminus"},
}
"""The signs at which an answer splits, from the weakest to the strongest."""

_MIRRORED = {">": "<", r"\ge": r"\le", "=": "="}
_FORMULA = re.compile(r"[\d\s.,;:+\-*/^()\[\]{}\\$%=<>|!]*")  # without any letter
_POINT = re.compile(r"([ABD-Z]'?)(\([^()]*,[^()]*\))")
_OPTION_STARTS = tuple("(ABCDEFGHIJ")
_NOTHING: frozenset[str] = frozenset()


@lru_cache(maxsize=4096)
def readings(text: str, own: frozenset[str] = _NOTHING) -> tuple[Answer, ...]:
    """Return the possible meanings of an answer: `1,234` is a number, or a list of two in this order.

    Args:
        text: an answer.
        own: words that count as things in this answer, as `split_unit` takes them.

    Returns:
        The structures, the likeliest first; none for an empty text or one nested too deeply.
    """
    cleaned = clean(without_sentence(text))
    if not cleaned or max((depth for _, _, depth in scan(cleaned)), default=0) > MAX_DEPTH:
        return ()
    plain = without_text_commands(cleaned)
    if not _FORMULA.fullmatch(plain):
        cleaned = read_number_words(plain) or read_phrase(plain) or cleaned
        if compound := read_compound(plain):
            return (Answer("compound", tuple(Answer("leaf", (), *part) for part in compound)),)
    number, list_ = tighten(without_thousands(cleaned)), tighten(cleaned)
    found = [parse(number, own)]
    if list_ != number:
        found += [_in_this_order(parse(list_, own))]
    if plain[:1] in _OPTION_STARTS and (option := read_option(plain)):
        found += [Answer("option", (Answer("leaf", (), option[0]), parse(tighten(option[1]), own)))]
    return tuple(found)


def _in_this_order(answer: Answer) -> Answer:
    return answer._replace(text="fixed") if answer.kind == "list" else answer


def parse(text: str, own: frozenset[str] = _NOTHING) -> Answer:
    """Return the structure of a cleaned text; a single expression is a leaf."""
    within = partial(parse, own=own)
    text = read_system(text) if r"\begin" in text else text
    matrix = read_matrix(text, within) if r"\begin" in text else read_transposed(text, within) if "^" in text else None
    if matrix is not None:
        return matrix
    if numbers := read_statements(text):
        return Answer("statements", tuple(Answer("leaf", (), number) for number in numbers))
    outside = {token for _, token, depth in scan(text) if depth == 0}
    for kind, signs in _SIGNS.items():
        items, cuts = split(text, signs) if outside & signs else ([], [])
        if cuts and all(items):
            if kind == "list":
                return _list(text, items, cuts, own)
            return _relation(items, cuts, own) if kind == "relation" else Answer(kind, tuple(map(within, items)))
    if (pair := brackets(text)) is not None and (found := _bracketed(text, pair, own)) is not None:
        return found
    if point := _POINT.fullmatch(text):
        return Answer("label", (within(point[2]),), point[1] + "=")
    if text.count(r"\pm") == 1 or (text.count(r"\mp") == 1 and r"\pm" not in text):
        return Answer("list", tuple(within(spelled) for spelled in _both_signs(text)), "pm")
    if ":" in text and (found := _ratio(text)) is not None:
        return found
    return _leaf(text, own)


def _both_signs(text: str) -> tuple[str, str]:
    r"""Return what a text with one `\pm` stands for; `\mp` is the opposite sign."""
    upper, lower = text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")
    return upper.lstrip("+ "), lower.lstrip("+ ")


def _list(text: str, items: list[str], cuts: list[str], own: frozenset[str]) -> Answer:
    """Return a list; an item with plus-minus is two items, and groups joined by `or` stay together."""
    groups, joints = split(text, {"or"})
    if joints and len(joints) < len(cuts) and all("=" in group and "," in group for group in groups):
        return Answer("list", tuple(parse(group, own) for group in groups), "or")
    parts = list[Answer]()
    for part in (parse(item, own) for item in items):
        if part.kind == "list" and part.text == "pm":
            parts += part.parts
        elif part.kind == "label" and part.parts[0].text == "pm":
            parts += [part._replace(parts=(value,)) for value in part.parts[0].parts]
        else:
            parts.append(part)
    first, *rest = parts
    if first.kind == "relation" and first.text == r"\ne" and all(part.kind == "leaf" for part in rest):
        parts = [first, *(first._replace(parts=(first.parts[0], part)) for part in rest)]
    joint = cuts[0] if set(cuts) in ({"or"}, {";"}) else ""
    return Answer("list", tuple(parts), joint)


def _bracketed(text: str, pair: tuple[str, str], own: frozenset[str]) -> Answer | None:
    """Return a set, set builder, tuple, interval or parenthesized answer; None if the brackets hold nothing."""
    inner = text[len(pair[0]) : -len(pair[1])].strip()
    if pair[0] == r"\{" and (builder := _builder(inner, own)) is not None:
        return builder
    if pair == ("(", ")") and inner.count(r"\pm") == 1 and "," in inner and "(" not in inner:
        return Answer("list", tuple(parse(f"({spelled})", own) for spelled in _signed_tuples(inner)), "pm")
    items, cuts = split(inner, {",", ";"})
    if not all(items):
        return None
    if pair[0] == r"\{":
        found = _list(inner, items, cuts, own) if cuts or r"\pm" in inner else None
        parts = found.parts if found else (parse(items[0], own),)
        if len(parts) == 1 and parts[0].text == "pm":
            parts = parts[0].parts
        return Answer("set", parts)
    if items[0].startswith(r"\$"):
        return None  # in accounts, `(\$12)` is negative
    if cuts or pair[0] != "(":
        return Answer("".join(pair), tuple(parse(item, own) for item in items))
    return parse(items[0], own)


def _signed_tuples(inner: str) -> list[str]:
    return [re.sub(r"(^|,)\+", r"\1", inner.replace(r"\pm", sign)) for sign in "+-"]


def _builder(inner: str, own: frozenset[str]) -> Answer | None:
    r"""Return `\{x | x > 2\}` as its condition and variable; None if the braces list elements."""
    items, cuts = split(inner, {"|", ":"})
    if not cuts:
        return None
    variable, condition = items[0], inner[len(items[0]) :].lstrip()[1:].strip()
    variable = variable.removesuffix(r"\in\mathbb{R}").removesuffix(r"\inR")
    if not re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?|\\[A-Za-z]+", variable) or not condition:
        return None
    inside = parse(condition, own)
    values = [part.parts[0] if part.kind == "label" else part for part in _items(inside)]
    if _items(inside)[0].text == variable + "=" and all(value.kind == "leaf" for value in values):
        return Answer("set", tuple(values))
    return Answer("builder", (inside,), variable)


def _items(answer: Answer) -> tuple[Answer, ...]:
    return answer.parts if answer.kind == "list" else (answer,)


def _relation(items: list[str], signs: list[str], own: frozenset[str]) -> Answer:
    """Return an equation or inequality with its signs turned to less-than; `x = 5` is a label before a value."""
    if len(items) == 2 and signs[0] in ("=", r"\in"):
        if is_label(without_text_commands(items[0])):
            return Answer("label", (parse(items[1], own),), items[0] + signs[0])
        if (
            signs[0] == "="
            and re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?", items[1])
            and not re.search("[A-Za-z]", items[0])
        ):
            return Answer("label", (parse(items[0], own),), items[1] + "=")
    if all(sign in _MIRRORED for sign in signs) and set(signs) != {"="}:
        items, signs = items[::-1], [_MIRRORED[sign] for sign in signs[::-1]]
    return Answer("relation", tuple(parse(item, own) for item in items), " ".join(signs))


def _ratio(text: str) -> Answer | None:
    """Return `3:4` as its terms, which must be numbers; a time of the day with `am` or `pm` is no ratio."""
    if read_time(text) and not text[-1].isdigit():
        return None
    terms = [unwrap(term) for term in split(text, {":"})[0]]
    if len(terms) < 2 or not all(terms) or any(re.search(r"[A-Za-z]", term.replace(r"\frac", "")) for term in terms):
        return None
    return Answer("ratio", tuple(Answer("leaf", (), term) for term in terms), text)


def _leaf(text: str, own: frozenset[str]) -> Answer:
    """Return an expression, a number or words, without its unit."""
    plain = without_text_commands(text)
    if not text[-1:].isdigit() and read_time(plain):
        return Answer("time", (), plain)
    value, unit = split_unit(read_repeating(text), own)
    if SCIENTIFIC.fullmatch(value):
        value = format(decimal.Decimal(value), "f")
    value = without_text_commands(value)
    if digits(value) is None:
        choice = re.fullmatch(r"\(?([A-Z])\)", value)
        value = choice[1] if choice else read_number_words(value) or value
    return Answer("leaf", (), value, unit)
