"""Questions: read from files, checked line by line, and turned into prompts before a model is loaded."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from drivers.common.errors import UsageError
from drivers.common.paths import repository_path
from drivers.tasks.chat import render


@dataclass(frozen=True)
class Example:
    """One line of a data file."""

    question: str
    answer: str | list[str]
    source: str
    """`file:line`, for error messages."""
    pass_rate: float | None = field(default=None, kw_only=True)
    """Share of correct responses of a model, if the line has it."""


@dataclass(frozen=True)
class Question:
    """An example with its prompt in tokens."""

    example: Example
    prompt_token_ids: tuple[int, ...]

    @property
    def answer(self) -> str | list[str]:
        return self.example.answer

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return all known tokens: those of the prompt."""
        return self.prompt_token_ids

    def n_tokens(self, max_new_tokens: int) -> int:
        """Return the length of the prompt and the longest response."""
        return len(self.prompt_token_ids) + max_new_tokens


Q = TypeVar("Q", bound=Question)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); expected a jsonl file") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028 in a question
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: deeply nested lists
            raise UsageError(f"{path}:{number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def load_examples(flag: str, path: str) -> list[Example]:
    """Return the examples of a jsonl file; errors name `flag`."""
    file = repository_path(path)
    if not file.exists():
        hint = "; make it from MATH or GSM8K with drivers/convert_dataset.py" if path.startswith("data/math/") else ""
        raise UsageError(f"{flag} {path}: no such file{hint}")
    examples = [read_example(file, number, row) for number, row in read_jsonl(file)]
    if not examples:
        raise UsageError(f"{flag} {path}: contains no questions")
    return examples


def read_example(path: Path, number: int, row: dict[str, Any]) -> Example:
    """Return the example of one line, or raise a UsageError that says what is wrong with the line."""
    where = f"{path}:{number}"
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: `question` must be a non-empty string, got {question!r}; keys here: {sorted(row)}")
    alternatives = answer if isinstance(answer, list) else [answer]
    if not all(map(is_text, (question, *alternatives))):
        raise UsageError(f"{where}: contains an unpaired surrogate, not a character: {question!r}, {answer!r}")
    if not alternatives or not all(_is_answer(alternative) for alternative in alternatives):
        raise UsageError(
            f"{where}: `answer` must be a string, a number or a list of these, and not empty; got {answer!r}; "
            f"keys here: {sorted(row)}"
        )
    texts = list(map(str, alternatives))
    rate = row.get("pass_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        rate = None
    return Example(question, texts if isinstance(answer, list) else texts[0], where, pass_rate=rate)


def is_text(value: object) -> bool:
    """Return whether a string can be written as UTF-8; JSON can escape unpaired surrogates."""
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def easiest_first(flag: str, examples: Sequence[Example]) -> list[Example]:
    """Sort by `pass_rate`, highest first; ties keep the order of the file."""
    unrated = next((example.source for example in examples if example.pass_rate is None), None)
    if unrated is not None:
        raise UsageError(
            f"{flag}: {unrated} has no `pass_rate`, a number from 0 to 1; write one with drivers/pass_rates.py"
        )
    return sorted(examples, key=lambda example: -(example.pass_rate or 0.0))


@dataclass(frozen=True)
class Prompt:
    """The form in which a model gets a question."""

    template: str
    """Text that contains `{question}`."""
    is_message: bool = False
    """True if the text is a user message for the tokenizer's chat template; otherwise it is the whole prompt."""
    system: str | None = None
    """System message."""

    def token_ids(self, question: str, tokenizer: Any) -> tuple[int, ...]:
        """Return the prompt of a question as token ids."""
        text = self.template.replace("{question}", question)
        if not self.is_message:
            return tuple(encode_prompt(tokenizer, text))
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        whole = render(tokenizer, [*messages, {"role": "user", "content": text}], to_answer=True)
        return tuple(tokenizer.encode(whole, add_special_tokens=False))  # the template contains them


def load_prompt(path: str, chat_template: bool = False, system_prompt_path: str | None = None) -> Prompt:
    """Return the prompt that --prompt-path, --chat-template and --system-prompt-path describe."""
    system = None if system_prompt_path is None else _read_prompt_file("--system-prompt-path", system_prompt_path)
    return Prompt(load_prompt_template(path), chat_template, system)


def load_prompt_template(path: str) -> str:
    """Return the template without the newline at the end of its file."""
    template = _read_prompt_file("--prompt-path", path)
    if "{question}" not in template:
        raise UsageError(f"--prompt-path {path}: must contain {{question}}")
    return template


def _read_prompt_file(flag: str, path: str) -> str:
    try:
        return repository_path(path).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error})") from error


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, without the end token that some tokenizers append to every text."""
    token_ids: list[int] = tokenizer.encode(text)
    if token_ids[-1:] == [tokenizer.eos_token_id]:
        of_text = tokenizer.encode(text, add_special_tokens=False)
        return token_ids if token_ids[-len(of_text) :] == of_text else token_ids[:-1]
    return token_ids


def make_questions(examples: Sequence[Example], prompt: Prompt, tokenizer: Any) -> list[Question]:
    """Tokenize the prompts of examples."""
    return [Question(example, prompt.token_ids(example.question, tokenizer)) for example in examples]


def fit_context(
    questions: Sequence[Q],
    *,
    max_new_tokens: int,
    context: int | None,
    long_prompts: Literal["refuse", "drop"],
    say: Callable[[str], None] = print,
) -> list[Q]:
    """Return the questions that leave room for a response in the model's context.

    If others exist, raise a UsageError that counts them; with `long_prompts="drop"`, `say` their number instead.
    """
    lengths = [question.n_tokens(max_new_tokens) for question in questions]
    kept = [q for q, length in zip(questions, lengths, strict=True) if context is None or length <= context]
    if len(kept) == len(questions):
        return kept
    longest = max(range(len(questions)), key=lengths.__getitem__)
    problem = (
        f"{len(questions) - len(kept)} of {len(questions)} questions do not fit into the model's context of {context} "
        f"tokens with --sampling-max-tokens {max_new_tokens}; the longest, {questions[longest].example.source}, needs "
        f"{lengths[longest]}"
    )
    if long_prompts == "refuse" or not kept:
        remedy = "lower --sampling-max-tokens or remove them" + ", or pass --long-prompts drop" * bool(kept)
        raise UsageError(f"--long-prompts {long_prompts}: {problem}; {remedy}")
    say(f"warning: --long-prompts drop: {problem}; they are left out")
    return kept
