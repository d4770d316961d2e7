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
    """One line of a file of demonstrations. `answer` is empty where the line has none."""

    response: str
    has_prompt: bool
    """Whether `question` is the whole prompt."""


@dataclass(frozen=True)
class Demonstration(Question):
    """A worked example in tokens, as it is trained on."""

    response_token_ids: tuple[int, ...]

    def n_tokens(self, max_new_tokens: int) -> int:
        return len(self.prompt_token_ids) + max(max_new_tokens, len(self.response_token_ids))


def load_demonstrations(flag: str, path: str) -> list[WorkedExample]:
    """The lines of the jsonl file that `flag` names: `prompt` or `question`, `response`, and perhaps `answer`."""
    file = repository_path(path)
    if not file.exists():
        raise UsageError(f"{flag} {path}: no such file; jsonl with `question` or `prompt` and `response` is required")
    examples = [_worked_example(file, number, row) for number, row in read_jsonl(file)]
    if not examples:
        raise UsageError(f"{flag} {path}: holds no demonstration; at least one line is required")
    return examples


def _worked_example(path: Path, number: int, row: dict[str, Any]) -> WorkedExample:
    where, response, asked = f"{path}:{number}", row.get("response"), "prompt" if "prompt" in row else "question"
    if not isinstance(response, str) or not response.strip() or not is_text(response):
        raise UsageError(
            f"{where}: `response` must be a text that is not empty, got {response!r}; keys here: {sorted(row)}"
        )
    known = row.get("answer", row.get("ground_truth"))  # as files of the CS336 assignment call it
    example = read_example(path, number, {"question": row.get(asked), "answer": "none" if known is None else known})
    answer = "" if known is None else example.answer
    return WorkedExample(example.question, answer, where, response, has_prompt=asked == "prompt")


def make_demonstrations(
    examples: Sequence[WorkedExample],
    prompt: "Prompt",
    stop: Sequence[str],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    context: int | None,
) -> list[Demonstration]:
    """Prompt and response as token ids, each tokenized by itself: a prompt's are those that the engine is given.

    A response ends as one that is sampled does: with a stop string, or else with the model's end token, added here.
    """
    made = []
    for example in examples:
        asked = (Prompt("{question}") if example.has_prompt else prompt).token_ids(example.question, tokenizer)
        response = tokenizer.encode(example.response, add_special_tokens=False)
        if not example.response.endswith(tuple(stop)) and tokenizer.eos_token_id is not None:
            response.append(tokenizer.eos_token_id)
        made.append(Demonstration(example, asked, tuple(response)))
        n_tokens = made[-1].n_tokens(max_new_tokens)
        if context is not None and n_tokens > context:
            raise UsageError(
                f"{example.source}: its prompt is {len(asked)} tokens and its response {len(response)}; with room "
                f"for sampling_max_tokens={max_new_tokens} that is more than the model's context of {context}: leave "
                "the demonstration out, or lower --sampling-max-tokens"
            )
    return made
