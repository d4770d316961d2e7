"""Rows of completions.jsonl: a response, its verdict, and values of each token."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drivers.engines.protocol import Completion
from drivers.grading.summary import name_parts
from drivers.grading.verdicts import Graded
from drivers.tasks.demonstrations import Demonstration
from drivers.tasks.questions import Question

DIGITS = 4
"""Decimals of logged token values."""


def describe_sample(question: Question, completion: Completion, verdict: Graded) -> dict[str, Any]:
    """Return the row of a graded response."""
    return {
        "question": question.example.question,
        "answer": question.answer,
        "response": completion.text,
        **name_parts(verdict.scores),
        "why": verdict.status,
        **({"detail": verdict.detail} if verdict.detail else {}),
        "finish_reason": completion.finish_reason,
        "response_tokens": completion.n_sampled,
    }


def describe_demonstration(demonstration: Demonstration, tokenizer: Any) -> dict[str, Any]:
    """Return the row of a demonstration, which has no sampler and no verdict."""
    texts = token_texts(tokenizer, demonstration.response_token_ids)
    return {
        "question": demonstration.example.question,
        "answer": demonstration.answer,
        "response": "".join(texts),
        "response_tokens": len(texts),
        "tokens": texts,
    }


def describe_tokens(completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """Return the text and the sampler's log-prob of each token, and in a conversation whether it was sampled."""
    return {
        "tokens": token_texts(tokenizer, completion.token_ids),
        "sampler_log_probs": _keep_sampled(round_for_log(completion.log_probs), completion.sampled),
        **({"sampled": list(completion.sampled)} if completion.sampled else {}),
    }


def round_for_log(values: Iterable[float]) -> list[float | None]:
    """Round values for the log; return None for values that are not finite."""
    return [round(value, DIGITS) if math.isfinite(value) else None for value in values]


def _keep_sampled(values: list[float | None], sampled: Sequence[bool]) -> list[float | None]:
    """Return the values, with None for the inserted tokens of a conversation."""
    return [value if flag else None for value, flag in zip(values, sampled, strict=True)] if sampled else values


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds, special tokens included.

    Decoding tokens one by one would lose leading spaces and give replacement characters for a character of several
    tokens. Here such a character is added by its last token, and its other tokens add nothing.
    """
    texts: list[str] = []
    context_start = text_end = 0  # decode from the last complete character on, so that its spaces are kept
    for end in range(1, len(token_ids) + 1):
        before = tokenizer.decode(token_ids[context_start:text_end])
        after = tokenizer.decode(token_ids[context_start:end])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids):
            texts.append("")
        else:
            texts.append(after[len(before) :])
            context_start, text_end = text_end, end
    return texts


def with_values(
    row: Mapping[str, Any], values: Mapping[str, Iterable[float]], advantages: Sequence[float] | None
) -> dict[str, Any]:
    """Add the policy's token values and the advantage of the response, or of each of its tokens, to a row."""
    sampled = row.get("sampled", ())
    logged = {name: _keep_sampled(round_for_log(token_values), sampled) for name, token_values in values.items()}
    row = {**row, **logged}
    if advantages is not None and len(advantages) == 1:
        row["advantage"] = round_for_log(advantages)[0]
    elif advantages is not None:
        row["advantage"] = _keep_sampled(round_for_log(advantages[: len(row["tokens"])]), sampled)
    return row
