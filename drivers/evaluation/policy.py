"""Evaluate a policy on held-out questions."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from drivers.engines.conversations import Rollout, sample_responses
from drivers.engines.protocol import Completion, RolloutEngine, describe_completions
from drivers.grading.summary import STANDARD, describe_grades
from drivers.grading.verdicts import Graded, Grader, grade_all
from drivers.runs.completions import describe_sample, describe_tokens
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Question

EVALUATION_SEED = 1 << 30
"""Every evaluation of a run uses the same random seeds, and evaluate.py with its default seed uses them too."""


def evaluate_policy(
    engine: RolloutEngine,
    questions: Sequence[Question],
    sampling: Sampling,
    grade: Grader,
    *,
    seed: int,
    n_shown: int = 0,
    tokenizer: Any = None,
    rollout: Rollout | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample and grade responses. Return the metrics and a row per response.

    Metrics are over all scored responses, and the standard error of the accuracy is over questions. The rows of the
    first responses to the first `n_shown` questions include their tokens.
    """
    completions = sample_responses(engine, rollout, questions, sampling, seed=seed)
    question_of = [question for question in questions for _ in range(sampling.n)]
    graded = grade_completions(grade, completions, question_of)
    rows = [
        describe_sample(question, completion, verdict)
        for question, completion, verdict in zip(question_of, completions, graded, strict=True)
    ]
    for number in range(0, min(n_shown, len(questions)) * sampling.n, sampling.n):
        rows[number] |= describe_tokens(completions[number], tokenizer)
    values = {
        **_accuracy(graded, sampling.n),
        **{name: fmean(scores) for name in STANDARD if (scores := _scores(graded, name))},
        **describe_grades(graded),
        **describe_completions(completions),
        "n_examples": float(len(questions)),
    }
    return values, rows


def grade_completions(grade: Grader, completions: Sequence[Completion], questions: Sequence[Question]) -> list[Graded]:
    """Grade each completion against the question at the same place."""
    texts = [completion.text for completion in completions]
    answers = [question.answer for question in questions]
    return grade_all(grade, texts, answers, [question.example.question for question in questions])


def _accuracy(graded: Sequence[Graded], n_samples: int) -> dict[str, float]:
    """Return the accuracy and its standard error over questions, or nothing if no response was scored.

    The value of a question is its mean answer reward, or its mean reward if there is no answer reward.
    """
    groups = [graded[start : start + n_samples] for start in range(0, len(graded), n_samples)]
    scores = [_scores(group, "answer_reward", "reward") for group in groups]
    means = [fmean(values) for values in scores if values]
    if not means:
        return {}
    accuracy = fmean(means)
    variance = sum((value - accuracy) ** 2 for value in means) / max(1, len(means) - 1)
    return {"accuracy": accuracy, "accuracy_stderr": math.sqrt(variance / len(means))}


def _scores(graded: Sequence[Graded], *names: str) -> list[float]:
    """Return, for each scored response, its score under the first of the names that it has."""
    scored = [verdict.scores for verdict in graded if verdict.is_scored]
    values = [next((scores[name] for name in names if name in scores), None) for scores in scored]
    return [value for value in values if value is not None]
