"""Responses as rows of completions.jsonl: what was said, what it was worth, and what is known of each token."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drivers.engines.protocol import Completion
from drivers.grading.summary import name_parts
from drivers.grading.verdicts import Graded
from drivers.tasks.demonstrations import Demonstration
from drivers.tasks.questions import Question

DIGITS = 4
"""Of the values of tokens, after the point: a tenth of a thousandth of a nat."""


def describe_sample(question: Question, completion: Completion, verdict: Graded) -> dict[str, Any]:
    """A response to a question, and the verdict on it."""
    return {
        "question": question.example.question,
        "answer": question.answer,
        "response": completion.text,
        **name_parts(verdict.scores),
        "why": verdict.status,
        **({"detail": verdict.detail} if verdict.detail else {}),
        "finish_reason": completion.finish_reason,
        "response_tokens": len(completion.token_ids),
    }


def describe_demonstration(demonstration: Demonstration, tokenizer: Any) -> dict[str, Any]:
    """What is to be imitated: nobody sampled it, and it was not graded."""
    texts = token_texts(tokenizer, demonstration.response_token_ids)
    return {
        "question": demonstration.example.question,
        "answer": demonstration.answer,
        "response": "".join(texts),
        "response_tokens": len(texts),
        "tokens": texts,
    }


def describe_tokens(completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """Texts, and what the sampler thought of each."""
    return {
        "tokens": token_texts(tokenizer, completion.token_ids),
        "sampler_log_probs": round_for_log(completion.log_probs),
    }


def round_for_log(values: Iterable[float]) -> list[float | None]:
    """As it is logged: a few digits, and null for what is no finite number."""
    return [round(value, DIGITS) if math.isfinite(value) else None for value in values]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens included.

    A token by itself would not do: its leading space may be lost, and of a character in several tokens each would be
    a replacement character. Such a character is added by its last token, and by the others nothing.
    """
    texts: list[str] = []
    begin = read = 0
    for end in range(1, len(token_ids) + 1):
        before, now = (tokenizer.decode(token_ids[begin:stop]) for stop in (read, end))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            begin, read = read, end
    return texts


def with_values(
    row: Mapping[str, Any], values: Mapping[str, Iterable[float]], advantages: Sequence[float] | None
) -> dict[str, Any]:
    """The row with what the policy thought of each token, and its advantage: of the whole response, or of each."""
    whole = {**row, **{name: round_for_log(some) for name, some in values.items()}}
    if advantages is not None:
        known = round_for_log(advantages[: len(row["tokens"])])
        whole["advantage"] = known[0] if len(advantages) == 1 else known
    return whole
