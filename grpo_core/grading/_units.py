r"""Split an answer into its value and its unit.

A list decides what a unit is: measures, currencies, and things that are counted. An unknown word behind a number is no
unit, because it may change the number; a reference may name its own things.
"""

import re
from functools import lru_cache

from grpo_core.grading._names import FUNCTIONS, GREEK, WORDS
from grpo_core.grading._signs import WRAPPERS
from grpo_core.grading._things import ADJECTIVES, ALONE, DETERMINERS, FILLERS, NOUNS, PREPOSITIONS

# The list of units ----------------------------------------------------------------------------------------------

_MEASURES = {
    "cm": "centimeter centimetre 厘米", "m": "meter metre 米", "km": "kilometer kilometre kms 千米 公里",
    "mm": "millimeter millimetre 毫米", "dm": "decimeter decimetre 分米", "nm": "nanometer", "μm": "micrometer micron",
    "in": "inch inches", "ft": "foot feet", "yd": "yard yds", "mi": "mile", "kg": "kilogram kilo-gram 千克 公斤",
    "g": "gram 克", "mg": "milligram 毫克", "lb": "pound lbs", "oz": "ounce", "l": "liter litre 升",
    "ml": "milliliter millilitre 毫升", "s": "second sec secs 秒", "min": "minute mins 分钟",
    "h": "hour hr hrs 小时", "day": "天 日", "week": "wk 周 星期", "month": "月 个月", "year": "yr yrs 年 岁",
    "decade": "", "century": "centuries", "hz": "hertz", "khz": "", "mhz": "", "rad": "radian",
    "degree": "deg degs 度", "percent": "pct percentage", "dollar": "usd buck", "euro": "eur", "cent": "",
    "sterling": "gbp", "rupee": "inr", "yuan": "rmb cny 元", "yen": "jpy", "peso": "", "franc": "", "unit": "",
    "cup": "", "ton": "tonne metric-ton 吨", "gal": "gallon", "qt": "quart", "pt": "pint",
    "tsp": "teaspoon", "tbsp": "tablespoon", "acre": "", "hectare": "ha 公顷", "mu-of-land": "亩", "newton": "",
    "joule": "", "kj": "kilojoule", "watt": "", "kw": "kilowatt", "kwh": "", "volt": "", "amp": "ampere", "ohm": "",
    "kelvin": "", "mol": "mole", "cal": "calorie", "kcal": "", "pa": "pascal", "kpa": "", "psi": "", "atm": "",
    "bit": "", "byte": "", "kb": "kilobyte", "mb": "megabyte", "gb": "gigabyte gig", "tb": "terabyte", "knot": "",
    "rpm": "", "c": "celsius", "f": "fahrenheit", "ev": "", "bar": "", "block": "", "lightyear": "",
    "parsec": "", "au": "", "steradian": "", "person": "人 名 位", "piece": "个 只 块 件 张 条 根",
    "kind": "种", "times": "次 倍", "page": "页", "copy": "本", "vehicle": "辆", "tree": "棵", "minute-of-arc": "",
    "group": "组", "bottle": "瓶", "box": "盒 箱", "bag": "袋", "question": "题 道", "point": "分", "pair": "对 双",
}  # fmt: skip
_COMPOUNDS = {"mph": "mi h-1", "kmh": "km h-1", "kph": "km h-1", "mps": "m s-1", "fps": "ft s-1", "mpg": "mi gal-1"}
_UNITS = {name: unit for unit, names in _MEASURES.items() for name in (unit, *names.split())}
_UNITS |= {name + "s": unit for name, unit in _UNITS.items() if name.isascii() and len(name) > 2}
_LETTERS = set("mglshnjwvacfdt")  # units in a text command; a bare letter is a variable
_PARTS = {("h", "min"), ("min", "s"), ("day", "h"), ("ft", "in"), ("yd", "ft"), ("lb", "oz"), ("m", "cm"), ("kg", "g"),
          ("year", "month"), ("week", "day"), ("dollar", "cent")}  # fmt: skip
_FACTORS = {"n", "newton", "kw", "w", "watt", "ft", "lb", "j", "pa", "a", "v", "kg", "g", "m", "mol", "cm"}
_PRODUCTS = {
    "pa",
    "au",
    "ev",
    "pt",
    "kb",
    "mb",
    "tb",
    "gb",
    "qt",
    "ha",
    "kw",
    "kj",
    "dm",
    "nm",
}  # of letters, in `3nm`
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_CLASSIFIED = re.compile(r"([个只名位件本张条棵辆])[\u4e00-\u9fff]{1,4}(?<![万亿千百十半分])")  # `名学生`
_CHINESE_POWERS = {"平方": 2, "立方": 3}
_SIGN_UNITS = {
    "%": "percent", r"^\circ": "degree", r"\$": "dollar", r"\euro": "euro", r"\pound": "sterling", r"\yen": "yen",
    r"\cent": "cent", r"\rupee": "rupee", r"\Omega": "ohm",
}  # fmt: skip
_CODES = {
    "usd": "dollar",
    "eur": "euro",
    "gbp": "sterling",
    "inr": "rupee",
    "rs": "rupee",
    "cny": "yuan",
    "rmb": "yuan",
}
_CODE = re.compile(rf"(-?)({'|'.join(_CODES)})\.? ?(?=[\d.])", re.IGNORECASE)
_NO_UNITS = WORDS | GREEK | set(re.findall("[a-z]+", """
    or and to is not no nor base mod modulo factorial choose over under plus minus by half halves third
    thirds quarter quarters negative positive opposite inverse reciprocal reciprocals complement conjugate false
    wrong incorrect untrue fake invalid unknown impossible cannot none never nothing neither both null void zero
    off root power powers first hundred hundreds thousand thousands lakh lakhs crore crores dozen dozens
    gross couples myriad myriads googol googols tens ones kilo mega giga grand mil mn bn tn k mille
    double triple twice less than infinity if when where otherwise except about around almost approx circa
    between maybe perhaps one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    permille permil promille permyriad basis bps ppm binary ternary quaternary octal decimal hex hexadecimal imaginary
    factorials radical radicals remainder remainders plusminus below above deficit loss debt owing owed short missing
    through thru until till upto downto besides excluding excl unless instead versus against then nope error bogus
    """))  # fmt: skip
_CHANGES_VALUE = re.compile(
    r"(?:illi(?:on|ard)s?|(?<!^mon)ths?|fold|uples?)$|[万亿千百十半零一二三四五六七八九几]|分之"
)


# Splitting ------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-\d./,]*")
_HAS_FUNCTION = re.compile("|".join(sorted(FUNCTIONS)))
_WORD = re.compile(r"[^\W\d_]")
_SET = rf"\\(?:{WRAPPERS})\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}"  # with exponents: `\mathrm{{m s^{{-2}}}}`
_TOKEN = re.compile(
    rf"(?P<text>{_SET})|(?P<power>\^\{{?-?[1-4]\}}?)|(?P<sign>\\cdot|[/(). '-])"
    r"|(?P<word>[A-Za-zμ]+|[\u4e00-\u9fff]+)|(?P<other>\\[A-Za-z]+|.)", re.DOTALL
)  # fmt: skip
_VALUE_END = re.compile(r"(?:[\d)}\]|%]|\\pi|\\surd\d)$")


def split_unit(text: str, own: frozenset[str] = frozenset()) -> tuple[str, str]:
    r"""Split a text into a value and a unit; the unit is in one spelling, or empty.

    Percent, degrees and currencies are units too. `\sin 30^\circ` keeps its degrees, because they change the value.

    Args:
        text: a cleaned and tightened expression.
        own: further words that count as things, because the reference has them; `*` stands for any word.

    Returns:
        The text without the unit, and the unit.
    """
    if _NUMBER.fullmatch(text):
        return text, ""
    units: list[str] = []
    for _ in range(2):  # `20^\circ\text{C}` has two
        text, unit = _split_one_unit(text, own)
        units += unit.split()
    return text, " ".join(sorted(units))


def _split_one_unit(text: str, own: frozenset[str]) -> tuple[str, str]:
    for sign, unit in _SIGN_UNITS.items():
        if text.endswith(sign) and len(text) > len(sign) and not _HAS_FUNCTION.search(text):
            return text[: -len(sign)].rstrip(), unit
        bare = text.removeprefix("-")
        if bare.startswith(sign) and unit not in ("percent", "degree", "ohm") and len(bare) > len(sign):
            return text[: len(text) - len(bare)] + bare[len(sign) :].lstrip(), unit
    if code := _CODE.match(text):
        return code[1] + text[code.end() :], _CODES[code[2].lower()]
    for start, is_text in _starts(text):
        body = text[:start].rstrip()
        if text[start:] in _PRODUCTS and len(body) == start:
            continue
        if body and (_VALUE_END.search(body) or (is_text and body[-1] not in "\\([{^_=,")):
            unit = _unit_name(text[start:], own)
            if unit:
                return body, unit
    return text, ""


def has_function(text: str) -> bool:
    """Return whether a text has a function such as `sin`, so that degrees change its value."""
    return _HAS_FUNCTION.search(text) is not None


def _starts(text: str) -> list[tuple[int, bool]]:
    """Return where a unit at the end of a text may start, the earliest first, and whether a text command is there."""
    if not _WORD.search(text):
        return []
    starts, tail = list[tuple[int, bool]](), 0
    for found in _TOKEN.finditer(text):
        if found["other"]:
            starts, tail = [], 0
        elif found["text"] or found["word"] or found[0] in "(/":
            starts.append((found.start(), bool(found["text"])))
        tail += 1
    return starts[-24:]


@lru_cache(maxsize=2048)
def _unit_name(phrase: str, own: frozenset[str]) -> str:
    """Return a unit as sorted words with exponents, such as `m s-2`; empty if the words are not a unit."""
    has_text = phrase.startswith(("\\", "("))
    phrase = re.sub(r"(?<=\})-(?=\\)", " ", phrase)
    phrase = re.sub(_SET, lambda found: f" {found[0][found[0].index('{') + 1 : -1]} ", phrase).strip()
    if phrase.startswith("(") and phrase.endswith(")"):
        phrase = phrase[1:-1]
    phrase = re.sub(r"\s*\^\{?(-?[1-4])\}?", r"^\1", phrase.replace(r"\cdot", " ").lower())
    phrase = re.sub(r"\bper ?cent(?:age)?\b", "percent", re.sub(r"(?<=[a-z])\.", " ", phrase))
    parts = re.split(r"\s*/\s*|\bper\b|\b(?:a|an|each|every)\b(?= )", phrase)
    if len(parts) > 3 or ("(" in phrase and not has_text):
        return ""
    letters = has_text or (len(parts) == 2 and (any(len(part.strip()) > 1 for part in parts) or phrase[0] == "m"))
    units = list[str]()
    for place, part in enumerate(parts):
        if place == 0 and not part.strip() and len(parts) > 1:
            continue  # `per day`
        words = _part_name(part, own, letters=letters)
        if words is None:
            return ""
        units += [_raise(word, -1) for word in words] if place else words
    return " ".join(sorted(units))


def _raise(word: str, power: int) -> str:
    """Return a unit to a power: `m` to the power of -2 is `m-2`, and `m2` to the power of -1 as well."""
    name, exponent = re.fullmatch(r"(.*?)(-?\d*)", word).groups()  # type: ignore[union-attr]
    total = int(exponent or 1) * power
    return name if total == 1 else f"{name}{total}"


def _part_name(part: str, own: frozenset[str], *, letters: bool) -> list[str] | None:
    """Return the units of a phrase without division: measures with powers, or a thing with adjectives."""
    words = re.sub(r"[().,]", " ", part).split()
    words = words[: words.index("of")] if "of" in words[1:] else words
    words = _without_place(words)
    while len(words) > 1 and words[-1] in FILLERS:
        words.pop()
    if words and words[-1] in ALONE:
        return ["unit"]
    measures = _measures(re.split(r" |(?<=[a-z])-(?=[a-z])", " ".join(words)), letters=letters)
    if measures is not None:
        return measures
    if not words or not all(re.fullmatch(r"[a-zμ\u4e00-\u9fff'-]+", word) for word in words):
        return None
    known = all(word in own or word in ADJECTIVES or word in NOUNS for word in words[:-1])
    if known and words[-1] in NOUNS:
        return [*words[:-1], NOUNS[words[-1]]]
    if own == {"*"}:  # three bare letters are a product
        known = all(len(word) > (1 if letters else 3) or not word.isascii() for word in words)
    if known and (own == {"*"} or words[-1] in own):
        return None if _NO_UNITS & set(words) or any(map(_CHANGES_VALUE.search, words)) else words
    return None


def _without_place(words: list[str]) -> list[str]:
    """Remove the place: `in total`, or a preposition before known things, as in `miles from home`."""
    if words[-2:] in (["in", "total"], ["in", "all"]):
        return words[:-2] or ["total"]
    place = next((i for i, word in enumerate(words) if i and word in PREPOSITIONS), len(words))
    rest = words[place + 1 :]
    known = rest and rest[-1] in NOUNS and all(word in NOUNS or word in ADJECTIVES | DETERMINERS for word in rest)
    return words[:place] if known else words


def _measures(words: list[str], *, letters: bool) -> list[str] | None:
    """Return measures with their powers: `square feet` is `ft2`; None if a word is no measure."""
    units, power = list[str](), 1
    for word in words:
        name, exponent = re.fullmatch(r"(.*?)(?:\^?(-?[1-4]))?", word).groups()  # type: ignore[union-attr]
        if found := _CLASSIFIED.fullmatch(name):
            name = found[1]
        for sign, value in _CHINESE_POWERS.items():
            if name.startswith(sign):
                name, exponent = name.removeprefix(sign), str(value)
        if name in _POWERS and power == 1 and not units:
            power = _POWERS[name]
        elif name in _COMPOUNDS and not exponent:
            units += _COMPOUNDS[name].split()
        elif name in _UNITS and (len(name) > 1 or letters or not name.isascii()):
            units.append(_raise(_UNITS[name], int(exponent or 1) * power))
            power = 1
        elif name in _LETTERS and letters:
            units.append(_raise(name, int(exponent or 1) * power))
            power = 1
        else:
            return None
    return units if units and power == 1 and _is_product(units) else None


def _is_product(units: list[str]) -> bool:
    """Return whether measures side by side are one unit: newton meters, and no degrees and minutes."""
    first, *rest = (re.sub(r"-?\d", "", unit) for unit in units)
    if not rest or any("-" in unit for unit in units):
        return True
    return rest[0] in ("c", "f") if first == "degree" else first in _FACTORS


def units_agree(first: str, second: str) -> bool:
    """Return whether two units may stand for each other: one is missing, they are equal, or one names a thing closer.

    `red marble` agrees with `marble`, and not with `blue marble`; `mi` does not agree with `mi h-1`.
    """
    if not first or not second or first == second:
        return True
    one, other = set(first.split()), set(second.split())
    if not (one < other or other < one):
        return False
    return not any(word in _MEASURES or not word.isalpha() for word in one ^ other)


_COMPOUND = re.compile(r"(\d+) ?([A-Za-z]+)(?:,? and |, ?| )(\d+(?:\.\d+)?) ?([A-Za-z]+)")


def read_compound(text: str) -> list[tuple[str, str]]:
    """Return the parts of a quantity in two units, such as `2 hours 30 minutes`, with their units; else nothing."""
    found = _COMPOUND.fullmatch(text)
    units = [_measures([word.lower()], letters=True) for word in (found[2], found[4])] if found else []
    if not found or not units[0] or not units[1] or (units[0][0], units[1][0]) not in _PARTS:
        return []
    return [(found[1], units[0][0]), (found[3], units[1][0])]


_LETTER_UNIT = re.compile(r"^(.*[\d})\]])(?: ?([mgshlL])| ([NJVW]))(?:\^\{?([23])\}?)?$")


def split_letter(text: str) -> tuple[str, str]:
    """Split off a letter that may be a unit, spelled as in `split_unit`; empty if there is none.

    A letter is normally a variable. It can be a unit only if the reference is a number.
    """
    found = _LETTER_UNIT.match(text)
    return (found[1], (found[2] or found[3]).lower() + (found[4] or "")) if found else (text, "")
