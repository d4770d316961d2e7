"""Pure, shape-typed tensor functions for GRPO."""

from grpo_core.advantages import compute_group_normalized_rewards, normalize_group_rewards
from grpo_core.aggregation import aggregate_token_losses
from grpo_core.distributions import compute_entropy, select_log_probs
from grpo_core.grading import answers_match, extract_boxed_answer, normalize_answer
from grpo_core.group_rows import get_group_log_probs, pack_group_row
from grpo_core.losses import (
    compute_grpo_clip_loss,
    compute_grpo_no_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
)
from grpo_core.masking import masked_mean, masked_normalize, masked_sum
from grpo_core.rewards import question_only_reward_fn, r1_zero_reward_fn
from grpo_core.scoring import get_response_log_probs
from grpo_core.steps import (
    grpo_microbatch_loss,
    grpo_microbatch_train_step,
    sft_microbatch_loss,
    sft_microbatch_train_step,
)
from grpo_core.tokenization import tokenize_prompt_and_output
from grpo_core.types import Aggregation, GroundTruth, LossType, Metadata, RewardFn, Tokenizer

__all__ = [
    "Aggregation",
    "GroundTruth",
    "LossType",
    "Metadata",
    "RewardFn",
    "Tokenizer",
    "aggregate_token_losses",
    "answers_match",
    "compute_entropy",
    "compute_group_normalized_rewards",
    "compute_grpo_clip_loss",
    "compute_grpo_no_clip_loss",
    "compute_naive_policy_gradient_loss",
    "compute_policy_gradient_loss",
    "extract_boxed_answer",
    "get_group_log_probs",
    "get_response_log_probs",
    "grpo_microbatch_loss",
    "grpo_microbatch_train_step",
    "masked_mean",
    "masked_normalize",
    "masked_sum",
    "normalize_answer",
    "normalize_group_rewards",
    "pack_group_row",
    "question_only_reward_fn",
    "r1_zero_reward_fn",
    "select_log_probs",
    "sft_microbatch_loss",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]
