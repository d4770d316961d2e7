"""Questions: read, checked line by line, and turned into prompts before any model is loaded."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivers.config import repository_path
from drivers.errors import UsageError


@dataclass(frozen=True)
class Example:
    """One line of a data file."""

    question: str
    answer: str | list[str]
    source: str
    """`file:line`, for messages."""


@dataclass(frozen=True)
class Question:
    """An example, as the model is asked it."""

    example: Example
    prompt_token_ids: tuple[int, ...]

    @property
    def answer(self) -> str | list[str]:
        return self.example.answer


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text (byte {error.start}); a jsonl file is required") from error
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand in a question
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # an integer of thousands of digits is one too
            raise UsageError(f"{path}:{number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: a JSON object is required, got {type(row).__name__}")
        yield number, row


def load_examples(flag: str, path: str) -> list[Example]:
    """The examples of the jsonl file that `flag` names."""
    file = repository_path(path)
    if not file.exists():
        hint = "; drivers/convert_dataset.py makes one from MATH or GSM8K" if path.startswith("data/math/") else ""
        raise UsageError(f"{flag} {path}: no such file{hint}")
    examples = [_example(file, number, row) for number, row in read_jsonl(file)]
    if not examples:
        raise UsageError(f"{flag} {path}: holds no question; at least one line is required")
    return examples


def _example(path: Path, number: int, row: dict[str, Any]) -> Example:
    where = f"{path}:{number}"
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(
            f"{where}: `question` must be a text that is not empty, got {question!r}; keys here: {sorted(row)}"
        )
    alternatives = answer if isinstance(answer, list) else [answer]
    if not alternatives or not all(_is_answer(alternative) for alternative in alternatives):
        raise UsageError(
            f"{where}: `answer` must be a text, a number or a list of those, not empty; got {answer!r}; "
            f"keys here: {sorted(row)}"
        )
    texts = [str(alternative) for alternative in alternatives]
    return Example(question, texts if isinstance(answer, list) else texts[0], where)


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_prompt_template(path: str) -> str:
    """The template, without the newline that an editor puts at the end of a file."""
    file = repository_path(path)
    try:
        template = file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt-path {path}: cannot be read ({error})") from error
    if "{question}" not in template:
        raise UsageError(f"--prompt-path {path}: must contain {{question}}, the place of the question")
    return template


def make_questions(
    examples: Sequence[Example], template: str, tokenizer: Any, *, max_new_tokens: int, context: int | None
) -> list[Question]:
    """Prompts as token ids; one that leaves no room for a response in the model's context is an error."""
    questions = []
    for example in examples:
        token_ids = tuple(tokenizer.encode(template.replace("{question}", example.question)))
        if context is not None and len(token_ids) + max_new_tokens > context:
            raise UsageError(
                f"{example.source}: its prompt is {len(token_ids)} tokens; with sampling_max_tokens={max_new_tokens} "
                f"that is more than the model's context of {context}: leave the question out, or lower "
                "--sampling-max-tokens"
            )
        questions.append(Question(example, token_ids))
    return questions
