"""Summarize the graded responses to a set of questions, and compare two models on the same questions."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch

from drivers.grading.countdown import extract_answer
from grpo_core import (
    compute_majority_accuracy,
    compute_sign_flip_p_value,
    estimate_mean_interval,
    estimate_pass_at_k,
    extract_boxed_answer,
    normalize_answer,
)

Row = Mapping[str, Any]
CATEGORIES = ("both", "format_only", "neither")
"""Correct format and answer, correct format only, and neither."""
REWARDS_WITH_VOTES = ("r1_zero", "think_answer", "question_only")
"""Rewards that know where a response has its answer."""
_Z = NormalDist().inv_cdf(0.975)
"""Half-width of a two-sided 95 % interval in standard errors."""
_CORRECT = "correct\n"
"""Vote of all correct answers. No answer contains a newline, so no wrong answer can be equal to it."""


# --- one response ----------------------------------------------------------------------------------------------------
def category_of(row: Row) -> str | None:
    """Return the category of a response, or None if it is unscored or the reward has no format and answer parts."""
    format_reward, answer_reward = row.get("format_reward"), row.get("answer_reward")
    if format_reward is None or answer_reward is None:
        return None
    if format_reward != 1:
        return "neither"
    return "both" if answer_reward == 1 else "format_only"


def vote_of(response: str, reward: str) -> str | None:
    """Return the normalized answer of a response, or None if it has no answer or the reward has no votes."""
    answer: str | None = None
    if reward in ("r1_zero", "think_answer"):
        spaced = response if reward == "r1_zero" else re.sub(r"</think>\s*<answer>", "</think> <answer>", response)
        tagged = extract_answer(spaced)
        answer = tagged and (extract_boxed_answer(tagged) or tagged)
    elif reward == "question_only":
        answer = extract_boxed_answer(response)
    return normalize_answer(answer) or None if answer else None


def correctness_values(rows: Sequence[Row]) -> list[float]:
    """Return the answer reward of each scored response, or its reward if there is no answer reward."""
    values = [row.get("answer_reward", row["reward"]) for row in rows]
    return [float(value) for value in values if value is not None]


def number_questions(rows: Sequence[Row], n_samples: int) -> list[Row]:
    """Return rows with the number of their question, of which each has `n_samples` in a row, and their category."""
    return [
        {"question_number": number // n_samples, "category": category_of(row), **row}
        for number, row in enumerate(rows)
    ]


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """Split rows by question; the responses to a question are adjacent in completions.jsonl."""
    return [list(responses) for _, responses in groupby(rows, key=lambda row: row["question_number"])]


# --- several responses per question ----------------------------------------------------------------------------------
def summarize(rows: Sequence[Row], reward: str) -> dict[str, float]:
    """Return the rates that need all responses, with their 95 % intervals over questions.

    `avg_at_n` is the mean answer reward, `pass_at_k` the probability that one of k responses is correct (unbiased),
    and `maj_at_k` the accuracy of the most frequent answer of k responses: the first k of a question, the next k, and
    so on. Rates are omitted if a reward leaves [0, 1].
    """
    questions = by_question(rows)
    n_samples = max(map(len, questions))
    categories = [category for category in map(category_of, rows) if category is not None]
    values = {f"category_{name}": categories.count(name) / len(categories) for name in CATEGORIES if categories}
    scored = [correct for correct in map(correctness_values, questions) if correct]
    if not scored or not all(0 <= value <= 1 for correct in scored for value in correct):
        return values
    means = [fmean(correct) for correct in scored]
    values |= _with_interval("accuracy", means)
    if n_samples == 1:
        return values
    values |= _with_interval(f"avg_at_{n_samples}", means)
    for k in sorted({2**power for power in range(n_samples.bit_length())} | {n_samples}):
        values |= _pass_at_k(scored, k)
        if k > 1 and reward in REWARDS_WITH_VOTES:
            values |= _majority_at_k(questions, k, reward)
    return values


def pass_at_k_of_questions(scored: Sequence[Sequence[float]], k: int) -> list[float]:
    """Return pass@k of each question with at least k scored responses."""
    enough = [correct for correct in scored if len(correct) >= k]
    n_correct = torch.tensor([sum(value == 1 for value in correct) for correct in enough], dtype=torch.int64)
    n_scored = torch.tensor([len(correct) for correct in enough], dtype=torch.int64)
    return estimate_pass_at_k(n_correct, n_scored, k).tolist()


def _pass_at_k(scored: Sequence[Sequence[float]], k: int) -> dict[str, float]:
    """Return pass@k over the questions with at least k scored responses."""
    values = pass_at_k_of_questions(scored, k)
    return _with_interval(f"pass_at_{k}", values) if values else {}


def _majority_at_k(questions: Sequence[Sequence[Row]], k: int, reward: str) -> dict[str, float]:
    """Return maj@k over the questions with at least k responses."""
    accuracies = [_majority_accuracy(responses, k, reward) for responses in questions if len(responses) >= k]
    return _with_interval(f"maj_at_{k}", accuracies) if accuracies else {}


def _majority_accuracy(responses: Sequence[Row], k: int, reward: str) -> float:
    """Average the majority's accuracy over the responses to a question, taken k at a time."""
    batches = [responses[start : start + k] for start in range(0, len(responses) - k + 1, k)]
    is_correct = [[row.get("answer_reward") == 1 for row in batch] for batch in batches]
    # All correct answers share one vote, so that different spellings do not split it.
    votes = [
        [_CORRECT if row.get("answer_reward") == 1 else vote_of(row["response"], reward) for row in batch]
        for batch in batches
    ]
    return compute_majority_accuracy(votes, is_correct).mean().item()


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = estimate_mean_interval(torch.tensor(values, dtype=torch.float64))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


# --- two models on the same questions --------------------------------------------------------------------------------
def compare(rows: Sequence[Row], other_rows: Sequence[Row]) -> dict[str, float]:
    """Return the difference in accuracy between two models, paired by question.

    Questions with an unscored response of either model are excluded; `n_compared` counts the others. The interval and
    the test are computed separately. The interval is approximate, so near the limit it may exclude 0 although the
    exact test finds no difference at 5 %.
    """
    questions = list(zip(by_question(rows), by_question(other_rows), strict=True))
    scored = [(correctness_values(ours), correctness_values(theirs)) for ours, theirs in questions]
    pairs = [
        (ours, theirs)
        for (ours, theirs), asked in zip(scored, questions, strict=True)
        if len(ours) == len(theirs) == len(asked[0]) == len(asked[1])
    ]
    if not pairs:
        return {"n_compared": 0.0}
    values = {value for pair in scored for side in pair for value in side}
    differences = [(sum(ours) - sum(theirs)) / len(ours) for ours, theirs in pairs]
    are_rates = all(0 <= value <= 1 for value in values)
    low, high = agresti_min_interval(differences) if are_rates else normal_interval(differences)
    result = {
        "difference": fmean(differences),
        "difference_low": low,
        "difference_high": high,
        "better_on": float(sum(difference > 0 for difference in differences)),
        "worse_on": float(sum(difference < 0 for difference in differences)),
        "n_compared": float(len(pairs)),
    }
    if values <= {0.0, 1.0}:
        counts = torch.tensor([round(sum(ours) - sum(theirs)) for ours, theirs in pairs])
        result["p_value"] = compute_sign_flip_p_value(counts)
    return result


def agresti_min_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences in [-1, 1].

    Agresti and Min (2005, doi:10.1002/sim.1781) add half a question to each of the four outcomes of two binary
    responses. These two questions add 0 to the sum of the differences and 1 to the sum of their squares, and keep the
    interval from shrinking to a point if all questions agree.
    """
    n = len(differences) + 2
    mean = sum(differences) / n
    mean_square = (sum(difference**2 for difference in differences) + 1) / n
    half_width = _Z * math.sqrt((mean_square - mean**2) / n)
    return max(-1.0, mean - half_width), min(1.0, mean + half_width)


def normal_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean with a normal distribution; a single difference has an infinite one."""
    mean = fmean(differences)
    if len(differences) == 1:
        return -math.inf, math.inf
    half_width = _Z * stdev(differences) / math.sqrt(len(differences))
    return mean - half_width, mean + half_width
