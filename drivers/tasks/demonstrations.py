"""Demonstrations for supervised fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError
from drivers.common.paths import repository_path
from drivers.tasks.questions import Example, Prompt, Question, is_text, read_example, read_jsonl


@dataclass(frozen=True)
class WorkedExample(Example):
    """One line of a file of demonstrations. `answer` is empty if the line has no answer."""

    response: str
    has_prompt: bool
    """True if `question` is the whole prompt."""


@dataclass(frozen=True)
class Demonstration(Question):
    """A worked example in tokens."""

    response_token_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_token_ids + self.response_token_ids

    def n_tokens(self, max_new_tokens: int) -> int:
        return len(self.prompt_token_ids) + max(max_new_tokens, len(self.response_token_ids))


def load_demonstrations(flag: str, path: str) -> list[WorkedExample]:
    """Return the lines of a jsonl file with `response`, `prompt` or `question`, and optionally `answer`."""
    file = repository_path(path)
    if not file.exists():
        raise UsageError(f"{flag} {path}: no such file; expected jsonl with `response` and `question` or `prompt`")
    examples = [_read_worked_example(file, number, row) for number, row in read_jsonl(file)]
    if not examples:
        raise UsageError(f"{flag} {path}: contains no demonstrations")
    return examples


def _read_worked_example(path: Path, number: int, row: dict[str, Any]) -> WorkedExample:
    where, response = f"{path}:{number}", row.get("response")
    question_key = "prompt" if "prompt" in row else "question"
    if not isinstance(response, str) or not response.strip() or not is_text(response):
        raise UsageError(f"{where}: `response` must be a non-empty string, got {response!r}; keys here: {sorted(row)}")
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

    A response ends like a sampled one: with a stop string, or with the model's end token, which is added here.
    """
    demonstrations = []
    for example in examples:
        own_prompt = Prompt("{question}") if example.has_prompt else prompt
        prompt_ids = own_prompt.token_ids(example.question, tokenizer)
        response = tokenizer.encode(example.response, add_special_tokens=False)
        if not example.response.endswith(tuple(stop)) and tokenizer.eos_token_id is not None:
            response.append(tokenizer.eos_token_id)
        demonstrations.append(Demonstration(example, prompt_ids, tuple(response)))
    return demonstrations
