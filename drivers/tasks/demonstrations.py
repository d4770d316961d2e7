"""Demonstrations for supervised fine-tuning."""

from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError
from drivers.common.paths import repository_path
from drivers.tasks.questions import (
    N_AT_ONCE,
    Example,
    Prompt,
    Question,
    check_is_jsonl,
    distinct,
    encode,
    how_to_convert,
    is_text,
    read_example,
    read_jsonl,
    share_equal,
    shorten,
)


@dataclass(frozen=True)
class WorkedExample(Example):
    """One line of a file of demonstrations. `answer` is empty if the line has no answer."""

    response: str
    has_prompt: bool
    """True if `question` is the whole prompt."""

    @property
    def content(self) -> Hashable:
        return super().content, self.response, self.has_prompt


@dataclass(frozen=True)
class Demonstration(Question):
    """A worked example in tokens."""

    packed_response: Sequence[int]
    """Token ids of the response."""

    @property
    def response_token_ids(self) -> tuple[int, ...]:
        return tuple(self.packed_response)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_token_ids + self.response_token_ids

    def n_tokens(self, max_new_tokens: int) -> int:
        return len(self.packed_prompt) + max(max_new_tokens, len(self.packed_response))


def load_demonstrations(flag: str, path: str) -> list[WorkedExample]:
    """Return the lines of a jsonl file with `response`, `prompt` or `question`, and optionally `answer`."""
    file = repository_path(path)
    if not file.exists():
        raise UsageError(f"{flag} {path}: no such file; expected jsonl with `response` and `question` or `prompt`")
    check_is_jsonl(flag, file, demonstrations=True)
    examples = share_equal(_read_worked_example(file, number, row) for number, row in read_jsonl(file))
    if not examples:
        raise UsageError(f"{flag} {path}: contains no demonstrations")
    return examples


def _read_worked_example(path: Path, number: int, row: dict[str, Any]) -> WorkedExample:
    where, response = f"{path}:{number}", row.get("response")
    question_key = "prompt" if "prompt" in row else "question"
    if not isinstance(response, str) or not response.strip() or not is_text(response):
        raise UsageError(
            f"{where}: `response` must be a non-empty string, got {shorten(response)}; keys here: {sorted(row)}; "
            f"{how_to_convert(path, demonstrations=True)}"
        )
    known = row.get("answer", row.get("ground_truth"))  # the name in files of the CS336 assignment
    asked = {"question": row.get(question_key), "answer": "none" if known is None else known}
    example = read_example(path, number, asked)
    answer = "" if known is None else example.answer
    return WorkedExample(example.question, answer, where, response, has_prompt=question_key == "prompt")


def make_demonstrations(
    examples: Sequence[WorkedExample],
    prompt: Prompt,
    stop: Sequence[str],
    tokenizer: Any,
) -> list[Demonstration]:
    """Tokenize prompts and responses separately, so that prompts have the ids that an engine gets.

    A response ends like a sampled one: with a stop string, or with the model's end token, which is added here. Equal
    examples share a demonstration.
    """
    made: dict[int, Demonstration] = {}
    for has_prompt, form in ((True, Prompt("{question}")), (False, prompt)):
        alike = [example for example in distinct(examples) if example.has_prompt == has_prompt]
        prompts = form.token_ids([example.question for example in alike], tokenizer)
        responses = _tokenize_responses([example.response for example in alike], stop, tokenizer)
        for example, *ids in zip(alike, prompts, responses, strict=True):
            made[id(example)] = Demonstration(example, *ids)
    return [made[id(example)] for example in examples]


def _tokenize_responses(responses: Sequence[str], stop: Sequence[str], tokenizer: Any) -> "Iterator[array[int]]":
    """Yield the token ids of each response, which end with the model's end token unless it ends with a stop string."""
    for start in range(0, len(responses), N_AT_ONCE):
        texts = responses[start : start + N_AT_ONCE]
        for text, token_ids in zip(texts, encode(tokenizer, texts, add_special_tokens=False), strict=True):
            if not text.endswith(tuple(stop)) and tokenizer.eos_token_id is not None:
                token_ids.append(tokenizer.eos_token_id)
            yield token_ids
