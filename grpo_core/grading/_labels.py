r"""Recognize labels: what stands before the value of an answer, as in `x = 5`, `f(2) = 5` and `|AB| = 5`."""

import re

_SUBSCRIPT = r"(?:_(?:\w|\{[^{}]*\}))?"
_NAME = rf"[A-Za-z]'{{0,2}}{_SUBSCRIPT}"
_INSIDE = r"\((?:[^()]|\([^()]*\))*\)"
_LABEL = re.compile(
    "|".join(
        [
            _NAME,
            r"\\[A-Za-z]+" + _SUBSCRIPT,  # a Greek letter
            r"[A-Z]{2,4}|\[[A-Z]{3,4}\]",  # a segment, an area
            r"(?!.*\b(?:not|wrong|incorrect|false|except|minus|negative|opposite)\b)"
            r"(?=.*[A-Za-z]{4})[A-Za-z]{3,}(?: [A-Za-z]+){0,7}",  # words
            rf"(?:{_NAME}(?:\^\{{-1\}})?)?\([a-z](?:,[a-z])*\)",  # f(x), (x,y)
            rf"(?:[A-HL-TVWfgh]'{{0,2}}{_SUBSCRIPT}|[A-Z][a-z]+)(?:\^\{{-1\}})?{_INSIDE}",  # f(2), P(A); not x(x+1)
            r"(?:m ?)?\\(?:angle|triangle|overline|vec|bar|hat|overleftrightarrow)(?: ?\w{1,4}|\{\w{1,4}\})",
            r"\\?(?:gcd|lcm|det|deg|dim|max|min)\(?[^()=\d]*\)?|\\mathbb\{[EP]\}[(\[][^()\[\]]*[)\]]",
            rf"(?:\\lfloor ?{_NAME} ?\\rfloor|\\lceil ?{_NAME} ?\\rceil)",
            rf"\|(?:{_NAME}|[A-Z]{{2}}|\\(?:vec|overline)\{{\w+\}})\|",  # a length, an absolute value
            r"\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?2\}?)? ?\(?(?:[A-Za-z]|\\(?:angle ?)?[A-Za-z]+)\)?",
            r"\\frac\{d\w?\}\{d\w\}|\\frac\{[A-Z]{2}\}\{[A-Z]{2}\}|[A-Z]{2}[:/][A-Z]{2}",
        ]
    )
)
_NAMES = re.compile(rf"\\(?:alpha|beta|gamma|theta|phi|angle ?[A-Z]+)|[fgP]\(\w+\)|{_NAME}")
_EXPRESSION = re.compile(
    r"(?:[\w+\-*/^|:'(){}\[\], ]|\\(?:frac|cdot|times|overline|vec|triangle|angle|alpha|beta|gamma)|\\theta|\\phi)*"
)


def is_label(text: str) -> bool:
    """Return whether a text names one quantity: a letter, a segment, words, a value of a function."""
    return _LABEL.fullmatch(text) is not None


def is_expression_of_names(text: str) -> bool:
    r"""Return whether a text is an expression of two or more named quantities, such as `a + b` or `\frac{AB}{CD}`.

    Before a number it is what the question asks for. `x + 1` is not: `x + 1 = 5` leaves work undone.
    """
    if not _EXPRESSION.fullmatch(text):
        return False
    plain = re.sub(r"\\(?:frac|cdot|times|overline|vec|triangle)", " ", text)
    names = set(_NAMES.findall(plain)) - {"e", "i"}
    bare = re.sub(r"_(?:\w|\{[^{}]*\})|\(\d+\)", "", plain)
    if names <= set("xyz") and "^" in bare:
        return False  # a curve
    return len(names) > 1 and not re.search(r"\d", re.sub(r"\^(?:\d|\{\d+\})", "", bare))


def base_of(label: str) -> str:
    """Return the letter of a numbered root such as `x_1`; of any other name, the whole name."""
    found = re.fullmatch(r"([xyztr])_\{?\d\}?", label)
    return found[1] if found else label
