"""Evaluate a policy on held-out questions."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from drivers.engines.protocol import RolloutEngine, describe_completions
from drivers.grading.summary import STANDARD, describe_grades
from drivers.grading.verdicts import Graded, Grader, grade_all
from drivers.runs.completions import describe_sample, describe_tokens
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Question


def evaluate_policy(
    engine: RolloutEngine,
    questions: Sequence[Question],
    sampling: Sampling,
    grade: Grader,
    *,
    seed: int,
    n_shown: int = 0,
    tokenizer: Any = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample and grade responses. Return the metrics and a row per response.

    Metrics are over all scored responses, and the standard error of the accuracy is over questions. The first
    `n_shown` rows include their tokens.
    """
    completions = engine.generate([question.prompt_token_ids for question in questions], sampling, seed=seed)
    question_of = [question for question in questions for _ in range(sampling.n)]
    graded = grade_all(
        grade,
        [completion.text for completion in completions],
        [question.answer for question in question_of],
        [question.example.question for question in question_of],
    )
    rows = [
        describe_sample(question, completion, verdict)
        for question, completion, verdict in zip(question_of, completions, graded, strict=True)
    ]
    for row, completion in zip(rows[:n_shown], completions, strict=False):
        row |= describe_tokens(completion, tokenizer)
    values = {
        **_accuracy(_mean_by_question(graded, sampling.n)),
        **_mean_scores(graded),
        **describe_grades(graded),
        **describe_completions(completions),
        "n_examples": float(len(questions)),
    }
    return values, rows


def _mean_by_question(graded: Sequence[Graded], n_samples: int) -> list[float]:
    """Average the answer reward of each question with a scored response; without one, average the reward."""
    groups = [graded[start : start + n_samples] for start in range(0, len(graded), n_samples)]
    scores = [_scores(group, "answer_reward", "reward") for group in groups]
    return [fmean(values) for values in scores if values]


def _mean_scores(graded: Sequence[Graded]) -> dict[str, float]:
    """Average each standard part of the reward over the responses that have it."""
    scores = {name: _scores(graded, name) for name in STANDARD}
    return {name: fmean(values) for name, values in scores.items() if values}


def _scores(graded: Sequence[Graded], *names: str) -> list[float]:
    """Return, for each scored response, its score under the first of the names that it has."""
    scored = [verdict.scores for verdict in graded if verdict.is_scored]
    values = [next((scores[name] for name in names if name in scores), None) for scores in scored]
    return [value for value in values if value is not None]


def _accuracy(question_means: Sequence[float]) -> dict[str, float]:
    """Return the accuracy and its standard error, or nothing if no response was scored."""
    if not question_means:
        return {}
    accuracy = fmean(question_means)
    variance = sum((value - accuracy) ** 2 for value in question_means) / max(1, len(question_means) - 1)
    return {"accuracy": accuracy, "accuracy_stderr": math.sqrt(variance / len(question_means))}
