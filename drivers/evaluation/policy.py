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
    """Rates over all responses that could be scored, and a row per response. The standard error is over questions.

    The first `n_shown` rows have the tokens too.
    """
    completions = engine.generate([question.prompt_token_ids for question in questions], sampling, seed=seed)
    asked = [question for question in questions for _ in range(sampling.n)]
    graded = grade_all(
        grade,
        [completion.text for completion in completions],
        [question.answer for question in asked],
        [question.example.question for question in asked],
    )
    rows = [describe_sample(*one) for one in zip(asked, completions, graded, strict=True)]
    for row, completion in zip(rows[:n_shown], completions, strict=False):
        row |= describe_tokens(completion, tokenizer)
    # By question. A reward function that tells no answer reward is taken at its reward.
    parts = [graded[start : start + sampling.n] for start in range(0, len(graded), sampling.n)]
    answered = [found for part in parts if (found := _values(part, "answer_reward", "reward"))]
    values = {
        **_accuracy([fmean(of_question) for of_question in answered]),
        **{name: fmean(found) for name in STANDARD if (found := _values(graded, name))},
        **describe_grades(graded),
        **describe_completions(completions),
        "n_examples": float(len(questions)),
    }
    return values, rows


def _values(graded: Sequence[Graded], *names: str) -> list[float]:
    """Of the responses that could be scored: what stands under the first of these names that there is."""
    scored = [verdict.scores for verdict in graded if verdict.is_scored]
    values = [next((scores[name] for name in names if name in scores), None) for scores in scored]
    return [value for value in values if value is not None]


def _accuracy(of_questions: Sequence[float]) -> dict[str, float]:
    """And its standard error; nothing where no response could be scored."""
    if not of_questions:
        return {}
    accuracy = fmean(of_questions)
    variance = sum((value - accuracy) ** 2 for value in of_questions) / max(1, len(of_questions) - 1)
    return {"accuracy": accuracy, "accuracy_stderr": math.sqrt(variance / len(of_questions))}
