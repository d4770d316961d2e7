r"""Read the reference answer out of what data sets store: solutions, lists in texts, marks, prose."""

import json
import math
import re
from typing import Any

MARKS = ("proof", "notfound", "not found", "n/a", "nan", "null")
"""Texts that data sets use in place of a missing answer."""

MAX_WORDS = 9
"""Most words of an answer. Longer texts are prose, which no response repeats word for word."""

_AFTER_HASHES = re.compile(r"####([^\n#]+)\Z")
"""GSM8K states the answer like this; elsewhere #### is a heading."""
_AFTER_WORDS = re.compile(r"\b[Tt]he answer is:[ \t]*(\S[^\n]*?)\.?\Z")
"""MetaMathQA states it like this."""
_BARE_BOX = re.compile(r"\\boxed([^a-zA-Z{}$\n][^{}$\n]*)\$(?!.*\\boxed)", re.DOTALL)
r"""MATH has a few boxes without braces, like `\boxed\frac12`."""
_BOX = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_TWO_BOXES = re.compile(rf"{_BOX}\$?,?\s+and\s[^.\n]{{0,40}}?{_BOX}")


class BadRowError(ValueError):
    """A row that cannot be understood. Rows with the same fault have the same `reason`; `detail` is about one row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason


def read_answer(key: str, value: Any, *, is_solution: bool = False, accepts_text: bool = False) -> Any:
    r"""Return the answer in a value: a text, a number, or a list of alternatives.

    A solution must state its answer. `accepts_text` is for keys that the user has named: prose and JSON may be what
    their own reward reads.
    """
    if isinstance(value, list):
        if not value or any(isinstance(one, list | dict) for one in value):
            raise BadRowError(f"`{key}` is not a list of answers")
        return [read_answer(key, one, is_solution=is_solution, accepts_text=accepts_text) for one in value]
    if isinstance(value, bool | dict) or value is None:
        raise BadRowError(f"`{key}` is neither a text nor a number", f", but {type(value).__name__}")
    if not isinstance(value, str):
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRowError(f"`{key}` is not a finite number")
        return value
    if _states_several(value):
        raise BadRowError(f"`{key}` states several answers, each in its own \\boxed{{}}")
    text = find_stated_answer(value)
    if text is None:
        text = value.strip()
        if is_solution or not text or "####" in text or r"\boxed" in text or r"\fbox" in text:
            hint = f"; if it is the answer itself, pass --answer-key {key}" if is_solution else ""
            raise BadRowError(f"`{key}` states no answer: none after ####, none in \\boxed{{}}{hint}")
        listed = _parse_list(text)
        if listed is not None:
            return listed
        if not accepts_text:
            _check_is_short(key, text)
    if text.lower().strip(".") in MARKS:
        raise BadRowError(f"`{key}` is {text.lower().strip('.')!r}, a mark of the data set and not an answer")
    return halve_backslashes(text)


def find_stated_answer(text: str) -> str | None:
    r"""Return the answer that a text states: after #### on the last line, in \boxed{}, or after `The answer is:`."""
    text = text.strip()
    last = _AFTER_HASHES.search(text)
    if last:
        answer = last.group(1).strip()
        return answer.replace(",", "") if re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer
    named = text if r"\boxed" in text else text.replace(r"\fbox", r"\boxed")  # a few solutions of MATH use it
    boxed = find_boxed_answer(named)
    if boxed:
        return boxed
    stated = _BARE_BOX.search(named) or _AFTER_WORDS.search(text)
    return stated.group(1).strip() or None if stated else None


def find_boxed_answer(text: str) -> str | None:
    r"""Return the text in the last \boxed{}, or None."""
    from grpo_core import extract_boxed_answer  # here, because --help does without it

    return extract_boxed_answer(text)


def strip_statement(text: str) -> str:
    """Return a solution without a final line that states the answer after ####."""
    return _AFTER_HASHES.sub("", text)


def halve_backslashes(text: str) -> str:
    r"""Repair backslashes that an export has doubled: a text with `\\frac` has none that are single."""
    runs = re.findall(r"\\+", text)
    doubled = any(re.finditer(r"(?<!\\)\\\\[a-zA-Z]{2}", text)) and all(len(run) % 2 == 0 for run in runs)
    return text.replace(r"\\", "\\") if doubled else text


def _states_several(text: str) -> bool:
    """Return whether two boxes with different contents are joined by `and`, as in `x = [3] and y = [4]`."""
    joined = _TWO_BOXES.search(text)
    return joined is not None and joined.group(1) != joined.group(2)


def _parse_list(text: str) -> list[Any] | None:
    """Return the texts of a JSON list that was stored as a text, or None. `[0, 1]` is an interval, not such a list."""
    if not text.startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = bool(values) and all(isinstance(value, str) and value.strip() for value in values)
    return [halve_backslashes(value.strip()) for value in values] if is_list else None


def _check_is_short(key: str, text: str) -> None:
    """Raise a BadRowError for a text that no response could repeat."""
    if text.startswith(('{"', "['")):
        raise BadRowError(f"`{key}` is a structure in a text and not an answer", f": {text[:40]}...")
    plain = re.sub(r"\$[^$]*\$|\\[a-zA-Z]+", " ", text)
    n_words = len(re.findall(r"[^\W\d_]{2,}", plain))
    is_sentence = n_words > 3 and plain.rstrip().endswith((".", "!"))
    if n_words > MAX_WORDS or is_sentence:
        raise BadRowError(f"`{key}` is prose and states no answer", f": {text[:40]!r}...")
