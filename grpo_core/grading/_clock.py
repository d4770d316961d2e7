"""Read times of the day and dates."""

import re

_TIME = re.compile(r"(\d{1,2})(?:[:.](\d\d))?(?::(\d\d))? ?(a\.? ?m|p\.? ?m|o'?clock)?\.?", re.IGNORECASE)
_NAMED = {"noon": (720, "pm"), "midday": (720, "pm"), "midnight": (0, "am")}
_MONTHS = {
    name: number
    for number, names in enumerate(
        [
            "january jan",
            "february feb",
            "march mar",
            "april apr",
            "may",
            "june jun",
            "july jul",
            "august aug",
            "september sep sept",
            "october oct",
            "november nov",
            "december dec",
        ],
        start=1,
    )
    for name in names.split()
}
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,? (?P<year>\d{4}))?"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (rf"{_MONTH} ?(?:the )?{_DAY}{_YEAR}", rf"(?:the )?{_DAY} ?(?:of )?{_MONTH}{_YEAR}")
]


def read_time(text: str) -> tuple[int, str] | None:
    """Return a time as seconds after midnight, and `am`, `pm` or nothing if the half of the day is open.

    Args:
        text: a cleaned answer.

    Returns:
        None if the text is no time of the day. `3` alone is a number, and `15:30` needs no half.
    """
    if named := _NAMED.get(text.casefold()):
        return named[0] * 60, named[1]
    found = _TIME.fullmatch(text)
    if not found or not (found[2] or found[4]) or ("." in text[:3] and not found[4]):
        return None
    hour, minute, second = int(found[1]), int(found[2] or 0), int(found[3] or 0)
    half = re.sub(r"[^apm]", "", (found[4] or "").casefold())[:2] if "m" in (found[4] or "").casefold() else ""
    if hour > (12 if half else 23) or minute > 59 or second > 59 or (half and hour == 0):
        return None
    if half:
        hour = hour % 12 + 12 * (half == "pm")
    elif hour > 12 or hour == 0:
        half = "pm" if hour else "am"
    return 3600 * hour + 60 * minute + second, half


def same_time(first: tuple[int, str], second: tuple[int, str]) -> bool:
    """Return whether two times agree; an open half of the day agrees with both, if the other is marked."""
    if first[1] and second[1]:
        return first[0] == second[0]
    return (first[0] - second[0]) % (12 * 3600) == 0 if first[1] or second[1] else first[0] == second[0]


def read_date(text: str) -> str | None:
    """Return a date with a month in words in one spelling: `4 July`, `July 4th` and `the 4th of July` are `7/4`."""
    for pattern in _DATES:
        if found := pattern.fullmatch(text):
            return f"{_MONTHS[found['month'].casefold()]}/{int(found['day'])}/{found['year'] or ''}"
    return None
