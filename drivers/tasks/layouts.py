"""Layouts of public data sets: which key of a row holds what.

A layout is not named in a row, so each part is looked for under the keys that data sets use for it. A row whose parts
do not fit together is refused with a reason.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from drivers.tasks.reference_answers import BadRowError, halve_backslashes, read_answer

KEYS: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "problem", "prompt", "query", "instruction", "input", "messages", "conversations"),
    "context": ("context", "body", "passage"),
    "answer": (
        "ground_truth",
        "reward_model.ground_truth",
        "final_answer",
        "expected_answer",
        "target",
        "answer",
        "solution",
        "output",
        "response",
    ),
    "options": ("options", "choices"),
    "right option": ("answerKey", "correct", "label", "answer_idx", "answer_index"),
    "worked solution": ("response", "solution", "answer", "output"),
}
"""Keys of each part of a row, the preferred first. Dots separate nested keys; capital and small letters are alike."""

LAYOUTS: Mapping[str, str] = {
    "Hendrycks MATH, NuminaMath, Big-Math, Polaris": "problem; answer or solution",
    "GSM8K, SVAMP, ASDiv": "question, body; answer",
    "MetaMathQA": "query; response",
    "verl, DAPO, Skywork": "prompt; reward_model.ground_truth",
    "OlympiadBench": "question, context; final_answer, unit",
    "AQuA, MMLU, ARC, GAOKAO": "question; options or choices; answer, answerKey, correct or label",
    "Open-Reasoner-Zero, ShareGPT, open-instruct": "conversations or messages; ground_truth",
    "Alpaca and others": "instruction, input; output",
}
"""Data sets whose layouts are known, and their keys."""

RESERVED = ("question", "answer", "prompt", "response")
"""Keys that data files give a meaning, so no other column is kept under them: sft.py would train on a `response`."""

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_MARKER = r"\(?([A-Z])\s?[).:]"


class Reading(NamedTuple):
    """A row that was understood."""

    question: str
    answer: Any
    keys: dict[str, str]
    """The key that each part was read from; under "nothing", columns that are dropped."""
    others: dict[str, Any]
    """Columns that hold no part."""


class QuestionPart(NamedTuple):
    """A question, with the reply and the answer if they stand under the same key."""

    question: str
    reply: str | None = None
    """The assistant's last message, if the value is a chat with one."""
    ground_truth: Any = None
    """The answer that stands in the chat itself, if one does."""


class Option(NamedTuple):
    """One option of a multiple choice."""

    letter: str
    text: str


def read_row(row: Mapping[str, Any], question_key: str | None, answer_key: str | None) -> Reading:
    """Return the parts of a row. Raise a BadRowError that says what is missing or does not fit."""
    keys: dict[str, str] = {}
    keys["question"], value = find_part(row, "question", question_key)
    question, reply, ground_truth = read_question(keys["question"], value, keys)
    if not question.strip():
        raise BadRowError(f"`{keys['question']}` is empty")
    if question_key is None and keys["question"].lower() == "instruction" and (data := look_for(row, ["input"])):
        keys["input"], value = data
        question = f"{question}\n{read_text(keys['input'], value)}"
    if question_key is None and (context := look_for(row, KEYS["context"])):
        keys["context"], value = context
        question = f"{read_text(keys['context'], value)}\n{question}"
    options = None if answer_key else look_for(row, KEYS["options"])
    if options is not None:
        keys["options"], value = options
        question, answer = _read_choice(row, question, read_options(keys["options"], value), keys)
    elif not answer_key and look_for(row, KEYS["answer"]) is None and (reply or ground_truth is not None):
        keys["answer"] = keys["question"]
        stated = reply if ground_truth is None else ground_truth
        answer = read_answer(keys["question"], stated, is_solution=ground_truth is None)
    else:
        answer = _read_plain_answer(row, answer_key, keys)
    used = {key if key in row else key.partition(".")[0] for key in keys.values()}
    others = {k: v for k, v in row.items() if k not in used and v is not None}
    dropped = [key for key in RESERVED if key in others]
    if dropped:
        keys["nothing"] = ", ".join(dropped)
    return Reading(question, answer, keys, {k: v for k, v in others.items() if k not in RESERVED})


def find_part(row: Mapping[str, Any], part: str, named: str | None) -> tuple[str, Any]:
    """Return the key of a part, which the user may have named, and its value."""
    known = (named,) if named else KEYS[part]
    found = look_for(row, known)
    if found is None:
        raise BadRowError(f"no {part} under {', '.join(known)}", f"; keys here: {sorted(map(str, row))}")
    return found


def look_for(row: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Any] | None:
    """Return the first key that has a value, and the value."""
    spelled = {key.lower(): key for key in row}
    for name in names:
        key = name if name in row else spelled.get(name.lower(), name)
        value = look_up(row, key)
        if value is not None and value != "" and value != []:
            return key, value
    return None


def look_up(row: Any, key: str) -> Any:
    """Return the value of a key, or of keys and list positions joined by dots; None if there is no value."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    first, dot, rest = key.partition(".")
    if isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        return look_up(row[int(first)], rest) if dot else row[int(first)]
    return look_up(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


# --- texts and chats -------------------------------------------------------------------------------------------------
def read_text(key: str, value: Any) -> str:
    """Return a text, or the texts of the parts of a message."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadRowError(f"`{key}` is not a text", f", but {str(value)[:60]!r}")
    return "\n".join(map(str, texts))


def read_question(key: str, value: Any, keys: dict[str, str]) -> QuestionPart:
    """Return the question in a text or a chat. A system message belongs to the question and comes first."""
    is_chat = isinstance(value, list) and any(
        isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in value
    )
    if not is_chat:
        return QuestionPart(read_text(key, value))
    turns = [(_role_of(key, turn), turn) for turn in value]
    texts = {role: [_text_of(key, turn) for name, turn in turns if name == role] for role in _ROLES.values()}
    if len(texts["user"]) != 1:
        count = "several messages" if texts["user"] else "no message"
        raise BadRowError(f"the chat has {count} of the role `user`")
    if texts["system"]:
        keys["system message"] = key
    known = [look_up(turn, "ground_truth.value") for role, turn in turns if role == "assistant"]
    question = "\n".join((*texts["system"], *texts["user"]))
    return QuestionPart(question, texts["assistant"][-1], known[-1]) if known else QuestionPart(question)


def read_reply(key: str, value: Any) -> str:
    """Return a worked solution: a text, or the last message of the assistant in a chat."""
    if not isinstance(value, list):
        return read_text(key, value)
    replies = [_text_of(key, turn) for turn in value if isinstance(turn, dict) and _role_of(key, turn) == "assistant"]
    if not replies:
        raise BadRowError("the chat has no message of the role `assistant`")
    return replies[-1]


def _role_of(key: str, turn: Any) -> str:
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(name, str) or name not in _ROLES:
        raise BadRowError(f"`{key}` is a chat with a message of an unknown role", f": {name}")
    return _ROLES[name]


def _text_of(key: str, turn: Mapping[str, Any]) -> str:
    return read_text(key, turn.get("content", turn.get("value", "")))


# --- answers ---------------------------------------------------------------------------------------------------------
def _read_plain_answer(row: Mapping[str, Any], named: str | None, keys: dict[str, str]) -> Any:
    key, value = find_part(row, "answer", named)
    keys["answer"] = key
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value, is_solution = read_reply(key, value), True
    else:
        is_solution = key.lower() == "solution" and named is None
    answer = read_answer(key, value, is_solution=is_solution, accepts_text=named is not None)
    if isinstance(value, str) and isinstance(answer, str) and halve_backslashes(value) != value:
        keys["repaired backslashes"] = key
    return _read_unit(row, answer, keys) if key.lower() == "final_answer" and named is None else answer


def _read_unit(row: Mapping[str, Any], answer: Any, keys: dict[str, str]) -> Any:
    """Return an answer of OlympiadBench with its unit."""
    if look_for(row, ("error", "tolerance")):
        raise BadRowError("the answer has a tolerance, and rewards here compare exactly", f": {row.get('error')}")
    if row.get("is_multiple_answer") and isinstance(answer, list) and len(answer) > 1:
        raise BadRowError("the answer is a list of parts, and not of alternatives")
    unit = look_for(row, ("unit",))
    if unit is None:
        return answer
    keys["unit"], text = unit
    return [f"{one} {text}" for one in answer] if isinstance(answer, list) else f"{answer} {text}"


def read_options(key: str, value: Any) -> list[Option]:
    """Return the options with their letters, or numbers if they are numbered."""
    options: list[Option] = []
    if isinstance(value, dict) and {"text", "label"} <= set(value):  # ARC
        letters, texts = value["label"], value["text"]
        if isinstance(letters, list) and isinstance(texts, list) and len(letters) == len(texts):
            options = [Option(str(letter), str(text)) for letter, text in zip(letters, texts, strict=True)]
    elif isinstance(value, dict):
        options = [Option(str(letter), str(text).strip()) for letter, text in value.items()]
    elif isinstance(value, list) and all(isinstance(one, str | int | float) for one in value):
        letters = [chr(ord("A") + index) for index in range(len(value))]
        marks = [re.match(_MARKER, str(one)) for one in value]
        are_marked = [mark and mark.group(1) for mark in marks] == letters
        texts = [str(one)[mark.end() if are_marked and mark else 0 :] for one, mark in zip(value, marks, strict=True)]
        options = [Option(letter, text.strip()) for letter, text in zip(letters, texts, strict=True)]
    elif isinstance(value, str):
        _, *pieces = re.split(rf"(?:^|(?<=[\s,])){_MARKER}\s", f"{value} ")
        options = [Option(letter, text.strip(" ,\n")) for letter, text in zip(pieces[::2], pieces[1::2], strict=True)]
        if [option.letter for option in options] != [chr(ord("A") + index) for index in range(len(options))]:
            options = []
    if len(options) < 2 or not all(option.text for option in options):
        raise BadRowError(f"`{key}` cannot be read as options", f": {str(value)[:60]!r}")
    return options


def _read_choice(
    row: Mapping[str, Any], question: str, options: Sequence[Option], keys: dict[str, str]
) -> tuple[str, str]:
    """Return the question with its options, and the right one."""
    named = look_for(row, KEYS["right option"])
    key, value = named or find_part(row, "answer", None)
    keys["right option"] = key
    if isinstance(value, str):
        value = read_answer(key, value, is_solution=key.lower() == "solution", accepts_text=True)
    right = choose(value, options, counts_from_zero=named is not None or keys["options"].lower() == "choices")
    if not all(re.search(rf"\b{re.escape(o.letter)}[).:]\s*{re.escape(o.text)}", question) for o in options):
        question = "\n".join((question, *(f"({option.letter}) {option.text}" for option in options)))
    is_letter = len(right.text) == 1 and right.text.isalpha()  # "(A) B" would be right for an answer B
    return question, right.letter if is_letter else f"({right.letter}) {right.text}"


def choose(answer: Any, options: Sequence[Option], *, counts_from_zero: bool) -> Option:
    """Return the option that an answer names by its letter, its text or its place."""
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    by_text = [option for option in options if option.text == str(answer).strip()]
    if isinstance(answer, int) and not isinstance(answer, bool):
        named = [options[answer]] if 0 <= answer < len(options) else []
        named = named if counts_from_zero else named + by_text
    elif isinstance(answer, str):
        letter = answer.strip().strip("().:").upper()
        whole = re.compile(r"\(?(\w+)[).:]\s*(.+)", re.DOTALL).fullmatch(answer.strip())
        named = [o for o in options if o.letter.upper() == letter or (whole and o == whole.groups())] + by_text
    else:
        raise BadRowError("the answer names no single option", f": {answer}")
    if len(set(named)) != 1:
        problem = "names none of the options" if not named else "may be the place, letter or text of different options"
        raise BadRowError(f"the answer {problem}", f": {str(answer)[:40]!r}")
    return named[0]
