"""What a model's responses to a set of questions come to: categories, several tries, and two models side by side."""

import math
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
"""Format and answer are right; the format alone; not even that."""


_RIGHT = "right\n"
"""No answer that is spelled out."""


def category_of(row: Row) -> str | None:
    """None where the reward does not tell the two apart, or the response could not be scored."""
    formatted, right = row.get("format_reward"), row.get("answer_reward")
    if formatted is None or right is None:
        return None
    return "both" if formatted == 1 and right == 1 else "format_only" if formatted == 1 else "neither"


def vote_of(response: str, reward: str) -> str | None:
    """The answer that a response gives, in the form in which equal ones are counted; None is no vote.

    Of a reward of the user's own nobody knows where an answer stands.
    """
    answer: str | None = None
    if reward == "r1_zero":
        tagged = extract_answer(response)
        answer = tagged and (extract_boxed_answer(tagged) or tagged)
    elif reward == "question_only":
        answer = extract_boxed_answer(response)
    return normalize_answer(answer) or None if answer else None


def by_question(rows: Sequence[Row]) -> list[list[Row]]:
    """The responses to each question, which stand together in completions.jsonl."""
    return [list(of_question) for _, of_question in groupby(rows, key=lambda row: row["question_number"])]


def correctness_values(of_question: Sequence[Row]) -> list[float]:
    """1 or 0 of each response that could be scored: its answer reward, or where there is none, its reward."""
    values = [row.get("answer_reward", row["reward"]) for row in of_question]
    return [float(value) for value in values if value is not None]


def describe(rows: Sequence[Row], reward: str) -> dict[str, float]:
    """What several responses to a question, and the categories, add to the rates of `evaluate_policy`.

    Each with its 95 % interval over questions. `avg_at_n` is the mean, `pass_at_k` one right of k (unbiased),
    `maj_at_k` the most frequent answer of k: of the first k responses to a question, the next k, and so on. What is
    no rate, for the reward leaves [0, 1], is none here.
    """
    questions = by_question(rows)
    n = max(map(len, questions))
    values: dict[str, float] = {}
    categories = [category for row in rows if (category := category_of(row)) is not None]
    for name in CATEGORIES if categories else ():
        values[f"category_{name}"] = categories.count(name) / len(categories)
    scored = [found for of_question in questions if (found := correctness_values(of_question))]
    if not scored or not all(0 <= value <= 1 for found in scored for value in found):
        return values
    for name in ("accuracy", f"avg_at_{n}")[: 1 + (n > 1)]:
        values |= _with_interval(name, [fmean(found) for found in scored])
    for k in tries(n) if n > 1 else ():
        enough = [found for found in scored if len(found) >= k]
        if enough:
            right = torch.tensor([sum(value == 1 for value in found) for found in enough])
            of = torch.tensor([len(found) for found in enough])
            values |= _with_interval(f"pass_at_{k}", estimate_pass_at_k(right, of, k).tolist())
        votes = [_majorities(of_question, k, reward) for of_question in questions]
        if k > 1 and any(row_votes is not None for row_votes in votes):
            values |= _with_interval(f"maj_at_{k}", [vote for vote in votes if vote is not None])
    return values


def tries(n: int) -> list[int]:
    """1, 2, 4 and so on, and n itself."""
    return sorted({2**power for power in range(n.bit_length())} | {n})


def _majorities(of_question: Sequence[Row], k: int, reward: str) -> float | None:
    """maj@k of one question: the mean over its responses taken k at a time. None without votes to count."""
    if reward not in ("r1_zero", "question_only") or len(of_question) < k:
        return None
    taken = [of_question[start : start + k] for start in range(0, len(of_question) - k + 1, k)]
    # What is right is one answer, however it is spelled: its votes are not split.
    answers = [
        [_RIGHT if row.get("answer_reward") == 1 else vote_of(row["response"], reward) for row in some]
        for some in taken
    ]
    is_correct = [[row.get("answer_reward") == 1 for row in some] for some in taken]
    return compute_majority_accuracy(answers, is_correct).mean().item()


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = estimate_mean_interval(torch.tensor(values, dtype=torch.float64))
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def compare(rows: Sequence[Row], other: Sequence[Row]) -> dict[str, float]:
    """How much more often `rows` are right than `other`: question by question, for both were asked the same ones.

    Questions whose responses could not all be scored, on either side, are left out; `n_compared` are the others.
    `p_value` is that of the paired permutation test, for rewards of 0 and 1. The interval is Agresti and Min's (2005,
    doi:10.1002/sim.1781), which does not shrink to a point where all questions agree; beyond [0, 1] that of a normal
    mean. It holds 0 where the exact test, at 5 %, finds no difference.
    """
    pairs, are_binary, all_within = [], True, True
    for ours, theirs in zip(by_question(rows), by_question(other), strict=True):
        right, right_there = correctness_values(ours), correctness_values(theirs)
        are_binary &= {*right, *right_there} <= {0.0, 1.0}
        all_within &= all(0 <= value <= 1 for value in (*right, *right_there))
        if len(right) == len(ours) and len(right_there) == len(theirs) == len(ours):
            pairs.append((sum(right), sum(right_there), len(ours)))
    if not pairs:
        return {"n_compared": 0.0}
    differences = [(ours - theirs) / n for ours, theirs, n in pairs]
    mean, z = fmean(differences), NormalDist().inv_cdf(0.975)
    if all_within:  # two more questions, on which all that can come out does, each half a time
        n, total, squares = len(pairs) + 2, sum(differences), sum(difference**2 for difference in differences) + 1
        low, high = (total / n + side * z * math.sqrt((squares / n - (total / n) ** 2) / n) for side in (-1, 1))
        low, high = max(-1.0, low), min(1.0, high)
    else:
        half = z * stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
        low, high = mean - half, mean + half
    test = {}
    if are_binary:
        counts = torch.tensor([round(ours - theirs) for ours, theirs, _ in pairs])
        test["p_value"] = compute_sign_flip_p_value(counts)
        if test["p_value"] >= 0.05:
            low, high = min(low, 0.0), max(high, 0.0)
    return {
        "difference": mean,
        "difference_low": min(low, mean),
        "difference_high": max(high, mean),
        "better_on": float(sum(difference > 0 for difference in differences)),
        "worse_on": float(sum(difference < 0 for difference in differences)),
        "n_compared": float(len(pairs)),
        **test,
    }
