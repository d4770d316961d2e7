"""Questions: read, checked line by line, and turned into prompts before any model is loaded."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError
from drivers.common.paths import repository_path
from drivers.tasks.chat import render


@dataclass(frozen=True)
class Example:
    """One line of a data file."""

    question: str
    answer: str | list[str]
    source: str
    """`file:line`, for messages."""
    pass_rate: float | None = field(default=None, kw_only=True)
    """How often a model was right, if that was measured and the line has it."""


@dataclass(frozen=True)
class Question:
    """An example, as the model is asked it."""

    example: Example
    prompt_token_ids: tuple[int, ...]

    @property
    def answer(self) -> str | list[str]:
        return self.example.answer

    def n_tokens(self, max_new_tokens: int) -> int:
        """At most, with a response."""
        return len(self.prompt_token_ids) + max_new_tokens


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
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists in lists in lists
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
    examples = [read_example(file, number, row) for number, row in read_jsonl(file)]
    if not examples:
        raise UsageError(f"{flag} {path}: holds no question; at least one line is required")
    return examples


def read_example(path: Path, number: int, row: dict[str, Any]) -> Example:
    where = f"{path}:{number}"
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(
            f"{where}: `question` must be a text that is not empty, got {question!r}; keys here: {sorted(row)}"
        )
    if not all(is_text(value) for value in (question, *(answer if isinstance(answer, list) else [answer]))):
        raise UsageError(f"{where}: holds half of a surrogate pair, which is no character: {question!r}, {answer!r}")
    alternatives = answer if isinstance(answer, list) else [answer]
    if not alternatives or not all(_is_answer(alternative) for alternative in alternatives):
        raise UsageError(
            f"{where}: `answer` must be a text, a number or a list of those, not empty; got {answer!r}; "
            f"keys here: {sorted(row)}"
        )
    texts = [str(alternative) for alternative in alternatives]
    rate = row.get("pass_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        rate = None
    return Example(question, texts if isinstance(answer, list) else texts[0], where, pass_rate=rate)


def is_text(value: object) -> bool:
    """Whether it can be written as UTF-8, if it is a text: JSON can escape what is none."""
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def easiest_first(flag: str, examples: Sequence[Example]) -> list[Example]:
    """By `pass_rate`; what is equally easy stays in the order of the file."""
    unrated = next((example.source for example in examples if example.pass_rate is None), None)
    if unrated is not None:
        raise UsageError(
            f"{flag}: {unrated} has no `pass_rate`, a number from 0 to 1; drivers/pass_rates.py writes a file that has"
        )
    return sorted(examples, key=lambda example: -(example.pass_rate or 0.0))


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a model."""

    template: str
    """A text with `{question}` in it."""
    is_message: bool = False
    """Whether that is a user's message, which the tokenizer's chat template goes around. Else it is the prompt."""
    system: str | None = None
    """The message of the system before it."""

    def token_ids(self, question: str, tokenizer: Any) -> tuple[int, ...]:
        text = self.template.replace("{question}", question)
        if not self.is_message:
            return tuple(tokenizer.encode(text))
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        whole = render(tokenizer, [*messages, {"role": "user", "content": text}], to_answer=True)
        return tuple(tokenizer.encode(whole, add_special_tokens=False))  # the template has written them all


def load_prompt(path: str, chat_template: bool = False, system_prompt_path: str | None = None) -> Prompt:
    """What --prompt-path, --chat-template and --system-prompt-path say."""
    system = None if system_prompt_path is None else _prompt_file("--system-prompt-path", system_prompt_path)
    return Prompt(load_prompt_template(path), chat_template, system)


def load_prompt_template(path: str) -> str:
    """The template, without the newline that an editor puts at the end of a file."""
    template = _prompt_file("--prompt-path", path)
    if "{question}" not in template:
        raise UsageError(f"--prompt-path {path}: must contain {{question}}, the place of the question")
    return template


def _prompt_file(flag: str, path: str) -> str:
    try:
        return repository_path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error})") from error


def make_questions(
    examples: Sequence[Example], prompt: Prompt, tokenizer: Any, *, max_new_tokens: int, context: int | None
) -> list[Question]:
    """Prompts as token ids; one that leaves no room for a response in the model's context is an error."""
    questions = []
    for example in examples:
        token_ids = prompt.token_ids(example.question, tokenizer)
        if context is not None and len(token_ids) + max_new_tokens > context:
            raise UsageError(
                f"{example.source}: its prompt is {len(token_ids)} tokens; with sampling_max_tokens={max_new_tokens} "
                f"that is more than the model's context of {context}: leave the question out, or lower "
                "--sampling-max-tokens"
            )
        questions.append(Question(example, token_ids))
    return questions
