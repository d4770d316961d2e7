"""Grade texts: extract final answers, compare them as mathematics, and return rewards."""

from grpo_core.grading.answers import (
    answers_match,
    extract_boxed_answer,
    normalize_answer,
)
from grpo_core.grading.rewards import (
    question_only_reward_fn,
    r1_zero_reward_fn,
    think_answer_reward_fn,
)

__all__ = [
    "answers_match",
    "extract_boxed_answer",
    "normalize_answer",
    "question_only_reward_fn",
    "r1_zero_reward_fn",
    "think_answer_reward_fn",
]
