"""Questions: read from files, checked line by line, and turned into prompts before a model is loaded."""

import json
import math
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar

from drivers.common.commands import spell_program
from drivers.common.errors import UsageError, first_line
from drivers.common.paths import repository_path
from drivers.tasks.chat import check_arguments, render


@dataclass(frozen=True)
class Example:
    """One line of a data file, or several lines that are equal."""

    question: str
    answer: str | list[str]
    source: str
    """`file:line` of the first of these lines, for error messages."""
    pass_rate: float | None = field(default=None, kw_only=True)
    """Share of correct responses of a model, if the line has it."""

    @property
    def content(self) -> Hashable:
        """Return everything but the source."""
        answer = self.answer if isinstance(self.answer, str) else tuple(self.answer)
        return self.question, answer, self.pass_rate


@dataclass(frozen=True)
class Question:
    """An example with its prompt in tokens."""

    example: Example
    packed_prompt: Sequence[int]
    """Token ids of the prompt. An array takes a ninth of the memory of a tuple."""

    @property
    def answer(self) -> str | list[str]:
        return self.example.answer

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return tuple(self.packed_prompt)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return all known tokens: those of the prompt."""
        return self.prompt_token_ids

    def n_tokens(self, max_new_tokens: int) -> int:
        """Return the length of the prompt and the longest response."""
        return len(self.packed_prompt) + max_new_tokens


E = TypeVar("E", bound=Example)
Q = TypeVar("Q", bound=Question)
T = TypeVar("T")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line that is not blank, one line at a time."""
    n_bytes = 0
    try:
        with path.open("rb") as file:  # text would also be split at carriage returns
            for number, line in enumerate(file, start=1):
                row = _read_line(path, number, line, n_bytes)
                n_bytes += len(line)
                if row is not None:
                    yield number, row
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_line(path: Path, number: int, line: bytes, start: int) -> dict[str, Any] | None:
    """Return the object of a line that begins at byte `start` of the file, or None if the line is blank."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = parse_json(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 text (byte {start + error.start}); expected a jsonl file, saved as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested lists
        raise UsageError(f"{path}:{number}: not valid JSON ({error}){_if_json(path)}") from error
    if row is not None and not isinstance(row, dict):
        raise UsageError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}{_if_json(path)}")
    return row


def _if_json(path: Path) -> str:
    return f"; {how_to_convert(path)}" if path.suffix == ".json" else ""


def _read_int(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return digits


_decoder = json.JSONDecoder(parse_int=_read_int)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. An integer with more digits than Python converts stays a text."""
    return _decoder.decode(text)


def how_to_convert(path: Path, *, demonstrations: bool = False) -> str:
    """Return the command that makes a data file of a file in another layout."""
    flags = " --demonstrations r1_zero" * demonstrations + f" --output {path.stem}-converted.jsonl"
    return (
        f"convert it: {spell_program('convert_dataset.py')} {path}{flags} (for unknown keys: --question-key and "
        "--answer-key)"
    )


def load_examples(flag: str, path: str) -> list[Example]:
    """Return the examples of a jsonl file; errors name `flag`."""
    file = repository_path(path)
    if not file.exists():
        is_of_course = path.startswith(("data/math/", "data/gsm8k/"))
        hint = "; make it from MATH or GSM8K with drivers/convert_dataset.py (data/README.md)" if is_of_course else ""
        raise UsageError(f"{flag} {path}: no such file{hint}")
    check_is_jsonl(flag, file)
    examples = share_equal(read_example(file, number, row) for number, row in read_jsonl(file))
    if not examples:
        raise UsageError(f"{flag} {path}: contains no questions")
    return examples


def check_is_jsonl(flag: str, file: Path, *, demonstrations: bool = False) -> None:
    """Raise a UsageError for a folder, and for a table in another format, which convert_dataset.py reads."""
    if file.is_dir():
        raise UsageError(f"{flag} {file}: is a folder; pass a jsonl file")
    if file.suffix in (".csv", ".tsv", ".parquet"):
        remedy = how_to_convert(file, demonstrations=demonstrations)
        raise UsageError(f"{flag} {file}: is {file.suffix.removeprefix('.')}, not jsonl; {remedy}")


def share_equal(examples: Iterable[E]) -> list[E]:
    """Return all examples; those that are equal but for their source become one object, the first of them."""
    known: dict[Hashable, E] = {}
    return [known.setdefault(example.content, example) for example in examples]


def distinct(items: Iterable[T]) -> list[T]:
    """Return each object once, in the order of first appearance."""
    return list({id(item): item for item in items}.values())


def read_example(path: Path, number: int, row: dict[str, Any]) -> Example:
    """Return the example of one line, or raise a UsageError that says what is wrong with the line."""
    where = f"{path}:{number}"
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(
            f"{where}: `question` must be a non-empty string, got {shorten(question)}; keys here: {sorted(row)}; "
            f"{how_to_convert(path)}"
        )
    alternatives = answer if isinstance(answer, list) else [answer]
    if not all(map(is_text, (question, *alternatives))):
        raise UsageError(
            f"{where}: contains an unpaired surrogate, not a character: {shorten(question)}, {shorten(answer)}"
        )
    if not alternatives or not all(_is_answer(alternative) for alternative in alternatives):
        raise UsageError(
            f"{where}: `answer` must be a string, a number or a list of these, and not empty; got "
            f"{shorten(answer)}; keys here: {sorted(row)}; {how_to_convert(path)}"
        )
    texts = list(map(str, alternatives))
    rate = row.get("pass_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        rate = None
    return Example(question, texts if isinstance(answer, list) else texts[0], where, pass_rate=rate)


def shorten(value: object, width: int = 80) -> str:
    """Return a value as Python writes it, cut to one short piece of a line."""
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}..."


def is_text(value: object) -> bool:
    """Return whether a string can be written as UTF-8; JSON can escape unpaired surrogates."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return True


def _is_answer(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


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

    day: date | None = None
    """Day that a chat template with a clock shows. None: its clock goes on."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""

    def token_ids(self, questions: Sequence[str], tokenizer: Any) -> "Iterator[array[int]]":
        """Yield the prompt of each question as token ids."""
        if self.is_message:
            check_arguments(tokenizer, self.arguments)
        for start in range(0, len(questions), N_AT_ONCE):
            texts = [self._text(question, tokenizer) for question in questions[start : start + N_AT_ONCE]]
            if self.is_message:  # the template contains the special tokens
                yield from encode(tokenizer, texts, add_special_tokens=False)
            else:
                yield from encode_prompts(tokenizer, texts)

    def _text(self, question: str, tokenizer: Any) -> str:
        text = self.template.replace("{question}", question)
        if not self.is_message:
            return text
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*messages, {"role": "user", "content": text}]
        return render(tokenizer, asked, to_answer=True, day=self.day, arguments=self.arguments)


N_AT_ONCE = 1024
"""Texts that are tokenized in one call, which uses all cores."""


def load_prompt(
    path: str,
    chat_template: bool = False,
    system_prompt_path: str | None = None,
    chat_date: str | None = None,
    chat_options: Mapping[str, Any] | None = None,
) -> Prompt:
    """Return the prompt that --prompt-path and the flags of the chat template describe."""
    system = None if system_prompt_path is None else _read_prompt_file("--system-prompt-path", system_prompt_path)
    day = None if chat_date is None else date.fromisoformat(chat_date)
    return Prompt(load_prompt_template(path), chat_template, system, day, chat_options or {})


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


def encode(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True) -> "list[array[int]]":
    """Return the tokens of each text."""
    if not texts:
        return []
    try:
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)
    except Exception as error:  # a text with characters for which the tokenizer has no token
        raise UsageError(
            f"--model-path: its tokenizer cannot encode a text of the data ({first_line(error)}); remove the text, or "
            "use another model"
        ) from error
    return [array("I", token_ids) for token_ids in encoded["input_ids"]]


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> "list[array[int]]":
    """Return the tokens of prompts, without the end token that some tokenizers append to every text."""
    encoded = encode(tokenizer, texts)
    ended = [index for index, ids in enumerate(encoded) if ids and ids[-1] == tokenizer.eos_token_id]
    of_texts = encode(tokenizer, [texts[index] for index in ended], add_special_tokens=False)
    for index, of_text in zip(ended, of_texts, strict=True):
        if encoded[index][-len(of_text) :] != of_text:  # the text itself does not end so
            encoded[index].pop()
    return encoded


def make_questions(examples: Sequence[Example], prompt: Prompt, tokenizer: Any) -> list[Question]:
    """Tokenize the prompts of examples, equal ones once: they share a question."""
    different = distinct(examples)
    prompts = prompt.token_ids([example.question for example in different], tokenizer)
    made = {id(example): Question(example, ids) for example, ids in zip(different, prompts, strict=True)}
    return [made[id(example)] for example in examples]


def fit_context(
    questions: Sequence[Q],
    *,
    max_new_tokens: int,
    context: int | None,
    long_prompts: Literal["refuse", "drop"],
    say: Callable[[str], None] = print,
    flag: str = "--sampling-max-tokens",
) -> list[Q]:
    """Return the questions that leave room for a response in the model's context.

    If others exist, raise a UsageError that counts them; with `long_prompts="drop"`, `say` their number instead.
    `flag` is the one that sets `max_new_tokens`.
    """
    kept = [q for q in questions if context is None or q.n_tokens(max_new_tokens) <= context]
    if len(kept) == len(questions):
        return kept
    longest = max(questions, key=lambda question: question.n_tokens(max_new_tokens))
    problem = (
        f"{len(questions) - len(kept)} of {len(questions)} questions do not fit into the model's context of {context} "
        f"tokens with {flag} {max_new_tokens}; the longest, {longest.example.source}, needs "
        f"{longest.n_tokens(max_new_tokens)}"
    )
    if long_prompts == "refuse" or not kept:
        remedy = f"lower {flag} or remove them" + ", or pass --long-prompts drop" * bool(kept)
        raise UsageError(f"--long-prompts {long_prompts}: {problem}; {remedy}")
    say(f"warning: --long-prompts drop: {problem}; they are left out")
    return kept
