"""The structure of an answer, and the numbers that need no parser."""

import decimal
import re
from typing import NamedTuple


class Answer(NamedTuple):
    """The structure of an answer: a leaf with its text and unit, or ordered or unordered parts."""

    kind: str
    """leaf, label, relation, list, set, builder, union, intersection, difference, matrix, row, determinant, ratio,
    time, compound, option, statements, or the two brackets of a tuple."""

    parts: tuple["Answer", ...] = ()
    text: str = ""
    """The expression of a leaf, the signs of a relation, the name and sign of a label, the factor of a matrix, the
    variable of a builder; of a list: `or`, `pm`, `;` or `fixed`."""

    unit: str = ""


_PLAIN = re.compile(r"([-+]?)([0-9]*)(?:\.([0-9]*))?")
SCIENTIFIC = re.compile(r"([-+]?[0-9]{1,50}(?:\.[0-9]{0,50})?)[eE]([-+]?[0-9]{1,2})")


def digits(text: str) -> tuple[bool, str, str] | None:
    """Return sign, integer digits and fractional digits of a plain number, without outer zeros."""
    found = _PLAIN.fullmatch(text)
    if found is None and SCIENTIFIC.fullmatch(text):
        found = _PLAIN.fullmatch(format(decimal.Decimal(text), "f"))
    if not found or not (found[2] or found[3]):
        return None
    whole, part = found[2].lstrip("0"), (found[3] or "").rstrip("0")
    return found[1] == "-" and bool(whole or part), whole, part
