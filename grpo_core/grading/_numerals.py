"""Read numbers that are not written in digits alone: number words, Chinese numerals, repeating decimals."""

import re
from decimal import Decimal

_SMALL = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_GROUPS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7,
          "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100, "thousandth": 1000}  # fmt: skip
_PARTS |= {word + "s": value for word, value in _PARTS.items() if word not in ("half", "halves")}
_ONE_PART = re.compile(rf"(?:a |an )({'|'.join(_PARTS)})|(half)", re.IGNORECASE)
_NUMERAL = set(_SMALL) | set(_TENS) | set(_GROUPS) | {"hundred", "and"}
_FIRST = re.compile(rf"\s*(?:{'|'.join([*_SMALL, *_TENS])})\b", re.IGNORECASE)


def read_number_words(text: str) -> str | None:
    """Return a number in words as digits; words after the number stay: `twelve apples` is `12 apples`.

    Args:
        text: a cleaned answer.

    Returns:
        The digits, a fraction for `two-thirds`, or None if the text does not begin with a number in words.
    """
    if scaled := _SCALED.fullmatch(text):
        return _scale(scaled)
    if part := _ONE_PART.fullmatch(text):
        return f"1/{_PARTS[(part[1] or part[2]).casefold()]}"
    if not _FIRST.match(text):
        return read_chinese_numeral(text)
    words = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text.casefold()).split()
    length = next((i for i, word in enumerate(words) if word not in _NUMERAL), len(words))
    value, rest = _count(words[:length]), words[length:]
    if value is None:
        return None
    if rest and rest[0] in _PARTS:
        return f"{value}/{_PARTS[rest[0]]}" if len(rest) == 1 else None
    return " ".join([str(value), *rest])


_SCALED = re.compile(
    r"(-?[\d,]{1,20}(?:\.\d{1,20})?) ?(thousand|million|billion|trillion|万|亿)(| .*|[\u4e00-\u9fff]{1,3})"
)


def _scale(found: re.Match[str]) -> str:
    """Return `2.5 million dollars` as `2500000 dollars`."""
    scale = _GROUPS.get(found[2]) or {"万": 10**4, "亿": 10**8}[found[2]]
    return f"{(Decimal(found[1].replace(',', '')) * scale).normalize():f}{found[3]}"


def _count(words: list[str]) -> int | None:
    """Return the value of `two thousand three hundred and five`; None if the order of the words is wrong."""
    total, group, bound, limit = 0, 0, 1000, 10**15  # what may still follow: less than `bound` in the group
    for before, word in zip(["", *words], words, strict=False):
        if word == "and":
            if before != "hundred" and before not in _GROUPS:
                return None
        elif word in _GROUPS:
            if not group or _GROUPS[word] >= limit:
                return None
            total, group, bound, limit = total + group * _GROUPS[word], 0, 1000, _GROUPS[word]
        elif word == "hundred":
            if not 0 < group < 10 or bound != 1:
                return None
            group, bound = group * 100, 100
        else:
            value = _SMALL.get(word, _TENS.get(word, 0))
            if value >= bound or (value == 0 and len(words) > 1):
                return None
            group, bound = group + value, 10 if word in _TENS else 1
    return None if not words or words[-1] == "and" else total + group


_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}


def read_chinese_numeral(text: str) -> str | None:
    """Return a Chinese numeral below 10,000 as digits: `六十八` is `68`. None if the text is anything else."""
    if not text or any(sign not in _CHINESE and sign not in _CHINESE_UNITS for sign in text):
        return None
    total, digit, last = 0, None, 10**4
    for sign in text:
        if sign in _CHINESE_UNITS:
            unit = _CHINESE_UNITS[sign]
            if unit >= last or (digit is None and (unit > 10 or total)) or digit == 0:
                return None
            total, digit, last = total + (digit or 1) * unit, None, unit
        elif digit:
            return None
        else:
            digit = _CHINESE[sign]
    return str(total + (digit or 0))


_ELLIPSIS = re.compile(r"(-?\d{0,20}\.\d{0,20}?)(?:(\d)\2{2,}|(\d{2,12}?)\3+)\.\.\.")
_DOTTED = re.compile(r"(-?\d*\.\d*)\\dot\{?(\d)\}?(?:(\d*)\\dot\{?(\d)\}?)?")


def read_repeating(text: str) -> str:
    r"""Return a repeating decimal with a bar: `0.1666...` and `0.1\dot{6}` are `0.1\overline{6}`.

    One digit must stand three times, several digits twice: `0.3...` stays as it is.
    """
    if text.endswith("...") and len(text) < 100 and (found := _ELLIPSIS.fullmatch(text)):
        return rf"{found[1]}\overline{{{found[2] or found[3]}}}"
    if r"\dot" in text and (found := _DOTTED.fullmatch(text)):
        return rf"{found[1]}\overline{{{found[2]}{found[3] or ''}{found[4] or ''}}}"
    return text
