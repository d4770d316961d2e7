r"""Unify the spellings of an answer: remove typesetting, thousands separators and units.

Every rule is a regular expression or a scan that takes linear time; callers limit the length of the text.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from grpo_core.grading._names import FUNCTIONS, GREEK, WORDS

# Spelling -------------------------------------------------------------------------------------------------------

_UNICODE = {
    "−": "-", "﹣": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "∗": "*",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\surd ", "°": r"^\circ ", "º": r"^\circ ", "±": r"\pm ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "⁄": "/", "∕": "/",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "€": r"\euro ", "£": r"\pound ", "¥": r"\yen ",
    "¢": r"\cent ", "₹": r"\rupee ", "\u200b": "", "\ufeff": "",
}  # fmt: skip
_TRANSLATION = str.maketrans(_UNICODE | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)})
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_COMMANDS = {
    "dfrac": r"\frac ", "tfrac": r"\frac ", "cfrac": r"\frac ", "dbinom": r"\binom ", "tbinom": r"\binom ",
    "leq": r"\le ", "leqslant": r"\le ", "geq": r"\ge ", "geqslant": r"\ge ", "neq": r"\ne ", "lt": "<", "gt": ">",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|",
    "varnothing": r"\emptyset ", "ast": "*", "degree": r"^\circ ", "infin": r"\infty ", "R": r"\mathbb{R}",
    "bigcup": r"\cup ", "textdollar": r"\$", "quad": " ", "qquad": " ", "thinspace": " ", "enspace": " ", "colon": ":",
} | dict.fromkeys(
    ["left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle", "bf",
     "rm", "it"], " "
)  # fmt: skip
_TEXT = r"\\(?:text|textrm|textbf|textit|textnormal|mathrm|mathbf|mbox|hbox|operatorname)\s*\{([^{}]*)\}"
_FULL_STOP = re.compile(r"(?<!\.)\.$")
_BOLD = re.compile(r"\A\s*\*\*([^*]+)\*\*(\.?)\s*\Z")  # Markdown around the whole answer
_ENDING = r"\s*(?:st|nd|rd|th)\s*"
_SET_ENDING = rf"\\(?:text|textrm|textsuperscript|mathrm|mbox)\s*\{{{_ENDING}\}}"
_ORDINAL = re.compile(
    rf"(\d+)(?:{_ENDING.strip()}|\s*\^?\s*(?:{_SET_ENDING}|\{{(?:{_ENDING}|\s*{_SET_ENDING}\s*)\}}))"
)


def clean(text: str) -> str:
    """Unify the spellings of signs and remove typesetting: dollars, boxes, spaces, size commands."""
    text = _BOLD.sub(r"\1", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: "^{" + run[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"\\(?:left|right)\s*\.", " ", text.translate(_TRANSLATION)).replace("~", " ")
    # A negative space cancels the space around it in mathematics mode: `11,\! 111`.
    text = re.sub(r"(?<=[\d,.])(?:\s*\\!)+\s*(?=[\d,.])", "", text).replace(r"\!", " ")
    text = re.sub(r"\\text\w*\s*\{\s*(\\?[$%])\s*\}", r"\1", text)
    text = re.sub(r"\bUS\s*(?=\\?\$)", "", text)
    text = re.sub(r"(?<!\\)\\[,:;> ]|\\[()]|(?<!\\)\\[\[\]]", " ", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda name: _COMMANDS.get(name[1], name[0]), text)
    text = re.sub(r"\\math(?:rm|bf|it)\s*\{([ei])\}", r"\1 ", text)
    text = re.sub(r"\\text\w*\s*\{\s*,?\s*(or|and)\s*\}", r" \1 ", text).replace(r"\%", "%").replace("**", "^")
    text = re.sub(r",\s*(and|or)\b", r" \1", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}", r"^\\circ ", text)
    text = re.sub(r"(\^\\circ) *([CF])\b", r"\1\\text{\2}", text)
    text = re.sub(r"\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"\b(?:infinity|infty)\b(?<!\\infty)", r"\\infty ", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", "", text)
    text = unwrap(_undollar(text))
    return ordinal[1] if (ordinal := _ORDINAL.fullmatch(text)) else text


def _undollar(text: str) -> str:
    r"""Remove the dollar signs of mathematics mode; a single one means money and becomes `\$`."""
    found = re.findall(r"(?<!\\)\$", text)
    return re.sub(r"(?<!\\)\$", lambda _: r"\$" if len(found) == 1 else " ", text)


def unwrap(text: str) -> str:
    """Remove a box or text command around the whole text, a final full stop, and repeated spaces."""
    while True:
        inner = _FULL_STOP.sub("", text.strip())
        found = re.match(r"\\(?:boxed|fbox)\s*\{", inner)
        if found and closing_brace(inner, found.end() - 1) == len(inner) - 1:
            inner = inner[found.end() : -1]
        elif found := re.fullmatch(_TEXT, inner):
            inner = found[1]
        elif inner[:1] == "{" and closing_brace(inner, 0) == len(inner) - 1:
            inner = inner[1:-1]
        if inner == text:
            return re.sub(r"\s+", " ", text)
        text = inner


def tighten(text: str) -> str:
    """Remove spaces that do not separate two letters or digits, and spaces between a command and a digit."""
    return re.sub(r"(\\[A-Za-z]+) (?=\d)", r"\1", re.sub(r"(?<![^\W_]) | (?![^\W_])", "", text))


def closing_brace(text: str, opening: int) -> int:
    """Return where the brace at `opening` closes, or -1; escaped braces do not count."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return -1


_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)|(?<![\d.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)")


def without_thousands(text: str) -> str:
    """Remove thousands separators from every number outside brackets that is grouped in threes."""
    inside = [depth > 0 for _, token, depth in scan(text) for _ in token]
    return _THOUSANDS.sub(lambda number: number[0] if inside[number.start()] else re.sub("[, ]", "", number[0]), text)


_PIECE = re.compile(r"\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
OPENERS = {"(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"}
CLOSERS = {")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"}


def scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield each command, word and sign with its position and the number of open brackets."""
    depth = 0
    for found in _PIECE.finditer(text):
        depth -= found[0] in CLOSERS
        yield found.start(), found[0], depth
        depth += found[0] in OPENERS


# Units ----------------------------------------------------------------------------------------------------------

_UNIT_NAMES = {
    "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre kms", "mm": "millimeter millimetre",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "kg": "kilogram", "g": "gram",
    "mg": "milligram", "lb": "pound lbs", "oz": "ounce", "l": "liter litre", "ml": "milliliter millilitre",
    "s": "second sec", "min": "minute", "h": "hour hr hrs", "mph": "", "km/h": "kmh kph", "m/s": "", "hz": "hertz",
    "rad": "radian", "degree": "deg", "percent": "", "dollar": "usd", "euro": "eur", "cent": "", "unit": "",
    "am": "", "pm": "", "per": "", "cup": "", "day": "", "ton": "", "gal": "gallon", "rupee": "",
}  # fmt: skip
_UNITS = {spelling: unit for unit, others in _UNIT_NAMES.items() for spelling in (unit, *others.split())}
_LETTERS = {"m", "g", "l", "s", "h"}
_BARE_UNITS = set(_UNITS) - _LETTERS  # a bare letter is a variable
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_NO_UNITS = WORDS | GREEK | set(re.findall("[a-z]+", """
    or and to is not no nor base mod modulo factorial choose over under plus minus times by half halves third
    thirds quarter quarters negative positive opposite inverse reciprocal reciprocals complement conjugate false
    wrong incorrect untrue fake invalid unknown impossible cannot none never nothing neither both null void zero
    off cube root roots power powers first hundred hundreds thousand thousands lakh lakhs crore crores dozen dozens
    score scores gross couple couples myriad myriads googol googols tens ones kilo mega giga grand mil mn bn tn k
    double triple twice more less than infinity if when where otherwise except about around almost approx circa
    between each maybe perhaps one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    permille permil promille permyriad basis bps binary ternary quaternary octal decimal hex hexadecimal imaginary
    prime primes factorials permutations combinations combos radical radicals remainder remainders plusminus
    below above fewer lesser greater bigger smaller deficit loss debt owing owed short missing through thru until till
    upto downto besides also including excluding incl excl unless unlike instead rather versus against then every
    other others another something nope error bogus nonexistent
    """))  # fmt: skip
_CHANGES_VALUE = re.compile(  # millions, sevenths but not months, halved, tenfold, quadruple, approximately
    r"(?:illi(?:on|ard)s?|(?<!^mon)ths?|ed|fold|uples?|ly)$"
)
_TEXT_UNIT = re.compile(rf"^(.*[^\s\\(\[{{^_=,]){_TEXT}(\^\{{?[23]\}}?)?$")
_BARE_UNIT = re.compile(r"^(.*[\d})\]])( ?)([A-Za-z][A-Za-z./ ]*)(\^\{?[23]\}?)?$")
_SIGN_UNITS = {
    "%": "percent",
    r"^\circ": "degree",
    r"\$": "dollar",
    r"\euro": "euro",
    r"\pound": "sterling",
    r"\yen": "yen",
    r"\cent": "cent",
    r"\rupee": "rupee",
}
_HAS_FUNCTION = re.compile("|".join(sorted(FUNCTIONS)))


def split_unit(text: str) -> tuple[str, str]:
    r"""Split a text into a value and a unit; the unit is in one spelling, or empty.

    Percent, degrees and currencies are units too. `\sin 30^\circ` keeps its degrees, because they change the value.
    """
    units: list[str] = []
    for _ in range(2):  # `20^\circ\text{C}` has two
        text, unit = _split_one_unit(text)
        units += [unit] if unit else []
    return text, " ".join(reversed(units))


def _split_one_unit(text: str) -> tuple[str, str]:
    for sign, unit in _SIGN_UNITS.items():
        if text.endswith(sign) and len(text) > len(sign) and not _HAS_FUNCTION.search(text):
            return text[: -len(sign)].rstrip(), unit
        bare = text.removeprefix("-")
        if bare.startswith(sign) and unit not in ("percent", "degree") and len(bare) > len(sign):
            return text[: len(text) - len(bare)] + bare[len(sign) :].lstrip(), unit
    if found := _TEXT_UNIT.match(text):
        body, name, power = found.groups()
        unit = _unit_name(name)
    elif found := _BARE_UNIT.match(text):
        body, space, name, power = found.groups()
        name = re.sub(r"\b(sq|cu)\. ?", r"\1 ", name)
        words = name.lower().replace("/", " ").split()
        known = name.lower() in _BARE_UNITS or all(word in _BARE_UNITS or word in _POWERS for word in words)
        named = space and all(len(word) > 3 or word in _BARE_UNITS for word in words)
        unit = _unit_name(name) if known or named else ""
    else:
        return text, ""
    return (body, unit + "".join(re.findall("[23]", power or ""))) if unit else (text, "")


@lru_cache(maxsize=1024)
def _unit_name(text: str) -> str:
    """Return a unit in lower case, singular and abbreviated; empty if the words are not a unit."""
    words = [word.rstrip(".") for word in text.lower().replace("/", " per ").split()]
    if not words or not all(re.fullmatch(r"[a-z]+(?:\^?[23])?", word) for word in words) or words[-1] in _POWERS:
        return ""
    if _NO_UNITS & set(words) or any(map(_CHANGES_VALUE.search, words)):
        return ""
    power = _POWERS.get(words[0], "")
    words = words[1:] if power else words
    singular = [word if word in _UNITS or word.endswith("ss") else word.removesuffix("s") for word in words]
    unit = " ".join(_UNITS.get(word, word) for word in singular).replace("^", "").replace(" per ", "/")
    return ("mph" if unit == "mi/h" else unit) + power


_LETTER_UNIT = re.compile(r"^(.*[\d})\]]) ?([mgshlL])(?:\^\{?([23])\}?)?$")


def split_letter(text: str) -> tuple[str, str]:
    """Split off a letter that may be a unit, spelled as in `split_unit`; empty if there is none.

    A letter is normally a variable. It can be a unit only if the reference is a number.
    """
    found = _LETTER_UNIT.match(text)
    return (found[1], found[2].lower() + (found[3] or "")) if found else (text, "")


def without_text_commands(text: str) -> str:
    r"""Replace `\text{cm}` and similar commands by their content."""
    return unwrap(re.sub(_TEXT, r" \1 ", text))
