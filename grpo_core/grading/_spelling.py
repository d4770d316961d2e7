r"""Unify the spellings of an answer: remove typesetting and thousands separators, unify signs.

Every rule is a regular expression or a scan that takes linear time; callers limit the length of the text.
"""

import re
import unicodedata
from collections.abc import Iterator

from grpo_core.grading._signs import COMMANDS, SUBSCRIPTS, SUPERSCRIPTS, UNICODE, WRAPPERS

TEXT = rf"\\(?:{WRAPPERS})\s*\{{([^{{}}]*)\}}"
"""A command that sets its argument as text, and the argument."""

_OPEN_WRAPPER = re.compile(rf"\\(?:boxed|fbox|{WRAPPERS})\s*\{{")
_FULL_STOP = re.compile(r"(?<!\.)\.$")
# Bold type, italics, code or quotation marks around the whole answer.
_MARKDOWN = re.compile(r"\A\s*(\*{1,3}|__|[_`\x22])([^*_`\x22]+)\1(\.?)\s*\Z")
_BOLD_PART = re.compile(r"(?<!\S)\*\*([^*\s][^*]*)\*\*(?!\S)")
_BUILDER = re.compile(
    r"\A\s*\{(\s*[a-z]\s*(?:\\in[^|:{}]*)?[|:].*)(?<!\\)\}\s*\Z", re.DOTALL
)  # braces without backslashes
_ENDING = r"\s*(?:st|nd|rd|th)\s*"
_SET_ENDING = rf"\\(?:text|textrm|textsuperscript|mathrm|mbox)\s*\{{{_ENDING}\}}"
_ORDINAL = re.compile(
    rf"(\d+)(?:{_ENDING.strip()}|\s*\^?\s*(?:{_SET_ENDING}|\{{(?:{_ENDING}|\s*{_SET_ENDING}\s*)\}}))"
)


def clean(text: str) -> str:
    """Unify the spellings of signs and remove typesetting: dollars, boxes, spaces, size commands."""
    text = (
        _BOLD_PART.sub(r"\1", _MARKDOWN.sub(r"\2", text))
        if "*" in text or text.lstrip()[:1] in ("_", "`", '"')
        else text
    )
    if not text.isascii():
        text = _to_latex(text)
    text = text.replace("~", " ")
    if "\\" in text:
        text = _unify_commands(_undouble(text))
    text = text.replace(r"\%", "%").replace("**", "^")
    if "_" in text:
        text = _unify_scripts(text)
    if any(map(str.isalpha, text)):
        text = re.sub(r"\bUS\s*(?=\\?\$)", "", text)
        text = re.sub(r",\s*(and|or)\b", r" \1", text)
        text = re.sub(r"\b(?:infinity|infty)\b(?<!\\infty)", r"\\infty ", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", "", text)
    text = unwrap(_BUILDER.sub(r"\\{\1\\}", _undollar(text)))
    return ordinal[1] if (ordinal := _ORDINAL.fullmatch(text)) else text


def _unify_scripts(text: str) -> str:
    r"""Unify subscripts: `C_{10}^{3}` is a binomial coefficient, `x_{1}` is `x_1`."""
    text = re.sub(r"\bC ?_ ?(\d|\{ ?\d+ ?\}) ?\^ ?(\d|\{ ?\d+ ?\})", r"\\binom \1 \2", text)
    return re.sub(r"_\{(\w)\}(?!\d)", r"_\1", text)


_CHINESE_SIGNS = (("或", " or "), ("和", " and "), ("且", " and "))


def _to_latex(text: str) -> str:
    """Replace Unicode signs by ASCII and LaTeX; of other scripts, only digits change."""
    text = re.sub("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)⁄([₀-₉]+)", _stacked, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: "^{" + run[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀-₉₊₋]+", lambda run: "_{" + run[0].translate(SUBSCRIPTS) + "}", text)
    text = re.sub("[\U0001d400-\U0001d7ff]", lambda sign: unicodedata.normalize("NFKC", sign[0]), text)
    text = text.translate(UNICODE)
    for word, joint in _CHINESE_SIGNS:  # between two formulas, not within a word
        text = re.sub(rf"(?<=[A-Za-z\d)\]}}$])\s*{word}\s*(?=[A-Za-z\d(\[{{$\\-])", joint, text)
    return text


def _stacked(found: re.Match[str]) -> str:
    return rf"\frac{{{found[1].translate(SUPERSCRIPTS)}}}{{{found[2].translate(SUBSCRIPTS)}}}"


def _undouble(text: str) -> str:
    r"""Repair backslashes that an export has doubled: `\\frac` is `\frac`. A row of a matrix ends in two."""
    if r"\\begin" in text:
        return text.replace(r"\\", "\\")
    return text if r"\begin" in text else re.sub(r"\\\\(?=[A-Za-z{}$%])", r"\\", text)


_UNIT_IN_FRACTION = r"\s*\\(?:text|mathrm)\s*\{[ ~]*[A-Za-z]{1,4}[ ~]*\}(?:\^(?:\d|\{-?\d\}))?\s*"

_RULES: tuple[tuple[str, str, str], ...] = (
    # A fraction of units: `\frac{\text{m}}{\text{s}^2}`.
    (r"\frac", rf"\\[dt]?frac\s*\{{({_UNIT_IN_FRACTION})\}}\s*\{{({_UNIT_IN_FRACTION})\}}", r"\1/\2"),
    ("color", r"\\(?:text)?color\s*\{[^{}]*\}", " "),
    ("color", r"\\color\s+[a-z]+(?![A-Za-z])", " "),
    (r"\left", r"\\left\s*\.", " "),
    (r"\right", r"\\right\s*\.", " "),
    # A negative space cancels the space around it in mathematics mode: `11,\! 111`.
    (r"\!", r"(?<=[\d,.])(?:\s*\\!)+\s*(?=[\d,.])", ""),
    (r"\!", r"\\!", " "),
    (r"\text", r"\\text\w*\s*\{\s*(\\?[$%])\s*\}", r"\1"),
    (r"\text", r"\\text\s*\{\s*\.\s*\}\s*$", ""),
    (r"\text", r"\\text\w*\s*\{\s*,?\s*(or|and)\s*\}", r" \1 "),
    # A space of TeX sets a unit apart, never a factor: `576\pi\;m^2`.
    ("\\", r"(?<=[\d})i])(?:\s*\\[,:; ])+\s*([mgslh])(?![A-Za-z])", r" \\text{\1}"),
    ("\\", r"(?<!\\)\\[,:;> ]|\\[()]|(?<!\\)\\[\[\]]", " "),
)
"""Rules before commands get one name: the text that a rule needs, a pattern, and what replaces it."""

_LATER_RULES: tuple[tuple[str, str, str], ...] = (
    (r"\math", r"\\math(?:rm|bf|it)\s*\{([ei])\}", r"\1 "),
    (r"\math", r"\\math(?:bf|rm)\s*\{R\}|\\mathbb\s*R(?![A-Za-z])", r"\\mathbb{R}"),
    (r"\mathbb", r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
    (r"\circ", r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"\circ", r"(\^\\circ) *([CF])\b", r"\1\\text{\2}"),
    (r"\vec", r"\\vec\s*([A-Za-z])(?![A-Za-z])", r"\\vec{\1}"),
    ("mod", r"\(?\\p?mod\s*\{?(\w+)\}?\)?", r" \\pmod{\1}"),
    ("mod", r"\(\\text\s*\{ ?mod ?\}\s*(\w+)\)", r" \\pmod{\1}"),
    (r"\choose", r"\{([^{}]{1,40})\\choose([^{}]{1,40})\}", r"\\binom{\1}{\2}"),
    (r"\}", r"\\\{\s*\\\}", r"\\emptyset "),
)
"""Rules after commands have one name."""


def _unify_commands(text: str) -> str:
    """Unify the LaTeX commands of a text: spaces, signs, and words between formulas."""
    text = _apply(_RULES, text)
    text = re.sub(r"\\([A-Za-z]+)", lambda name: COMMANDS.get(name[1], name[0]), text)
    if _BASIS.search(text):
        text = re.sub(r"\\(?:mathbf|hat|vec|boldsymbol)\s*\{\\?([ijk])(?:math)?\}", r"\\vec{\1}", text)
    return _apply(_LATER_RULES, text)


def _apply(rules: tuple[tuple[str, str, str], ...], text: str) -> str:
    for needed, pattern, replacement in rules:
        if needed in text:
            text = re.sub(pattern, replacement, text)
    return text


_BASIS = re.compile(r"\\(?:mathbf|hat|vec|boldsymbol)\s*\{\\?j(?:math)?\}")  # beside j, i is a vector


def _undollar(text: str) -> str:
    r"""Remove the dollar signs of mathematics mode; a single one means money and becomes `\$`."""
    if "$" not in text:
        return text
    found = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", lambda _: r"\$" if len(found) == 1 else " ", text)


def unwrap(text: str) -> str:
    """Remove a box or text command around the whole text, a final full stop or line break, and repeated spaces."""
    while True:
        inner = _FULL_STOP.sub("", text.strip())
        while inner.endswith(r"\\"):
            inner = inner[:-2].rstrip()
        found = _OPEN_WRAPPER.match(inner)
        if found and closing_brace(inner, found.end() - 1) == len(inner) - 1:
            inner = inner[found.end() : -1]
        elif inner[:1] == "{" and closing_brace(inner, 0) == len(inner) - 1:
            inner = inner[1:-1]
        if inner == text:
            return re.sub(r"\s+", " ", text)
        text = inner


def tighten(text: str) -> str:
    """Remove spaces that do not separate two letters or digits, and spaces between a command and a digit."""
    return re.sub(r"(\\[A-Za-z]+) (?=\d)", r"\1", re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text))


def without_text_commands(text: str) -> str:
    r"""Replace `\text{cm}` and similar commands by their content."""
    return unwrap(re.sub(TEXT, r" \1 ", text)) if "\\" in text else unwrap(text)


def closing_brace(text: str, opening: int) -> int:
    """Return where the brace at `opening` closes, or -1; escaped braces do not count."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return -1


# Thousands ------------------------------------------------------------------------------------------------------

_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)|(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)")
_LAKHS = re.compile(r"(?<![\d,.])\d{1,2}(?:,\d\d)+,\d{3}(?!\d|,\d)")  # the Indian grouping


def without_thousands(text: str) -> str:
    """Remove thousands separators from every number outside brackets that is grouped in threes.

    A number grouped as in India loses them if a group begins with 0, as no item of a list does: `3,00,000`.
    """
    inside = [depth > 0 for _, token, depth in scan(text) for _ in token]

    def joined(number: re.Match[str]) -> str:
        return number[0] if inside[number.start()] else re.sub("[, ]", "", number[0])

    text = _LAKHS.sub(lambda number: joined(number) if ",0" in number[0] else number[0], text)
    if len(text) < len(inside):
        inside = [depth > 0 for _, token, depth in scan(text) for _ in token]
    return _THOUSANDS.sub(joined, text)


# Brackets -------------------------------------------------------------------------------------------------------

_PIECE = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
OPENERS = {"(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"}
CLOSERS = {")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"}
_PAIRS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\{", r"\}"), (r"\langle", r"\rangle")}


def scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield each command, word and sign with its position and the number of open brackets."""
    depth = 0
    for found in _PIECE.finditer(text):
        depth -= found[0] in CLOSERS
        yield found.start(), found[0], depth
        depth += found[0] in OPENERS


def split(text: str, signs: set[str]) -> tuple[list[str], list[str]]:
    """Split a text at signs outside all brackets; return the parts and the signs."""
    parts, cuts, start = list[str](), list[str](), 0
    for position, token, depth in scan(text):
        if depth == 0 and token in signs:
            parts.append(text[start:position].strip())
            cuts.append(token)
            start = position + len(token)
    return [*parts, text[start:].strip()], cuts


def brackets(text: str) -> tuple[str, str] | None:
    """Return the opening and closing bracket if one pair surrounds the whole text."""
    if not text or text[-1] not in ")]}e":
        return None
    tokens = list(scan(text))
    pair = tokens[0][1], tokens[-1][1]
    if len(tokens) < 2 or pair not in _PAIRS or tokens[-1][2] != 0:
        return None
    return None if any(depth < 1 for _, _, depth in tokens[1:-1]) else pair
