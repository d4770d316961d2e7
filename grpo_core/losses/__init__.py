"""Losses: from log-probabilities and advantages to one differentiable number."""

from grpo_core.losses.aggregation import (
    aggregate_token_losses,
    compute_sequence_weights,
    compute_token_weights,
    sum_weighted_losses,
)
from grpo_core.losses.diagnostics import compute_gradient_share
from grpo_core.losses.distillation import (
    compute_distillation_advantages,
    compute_jensen_shannon_divergence,
    compute_top_k_forward_kl,
)
from grpo_core.losses.fused_grpo import fused_linear_grpo_loss
from grpo_core.losses.importance import (
    compute_importance_divergences,
    compute_importance_ratios,
    describe_mismatch,
    effective_sample_size,
    keep_within_bounds,
    mask_importance_weights,
    self_normalize_weights,
    truncate_importance_weights,
)
from grpo_core.losses.policy_gradient import (
    compute_cross_entropy_loss,
    compute_grpo_clip_loss,
    compute_grpo_no_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
)
from grpo_core.losses.preference import compute_dpo_loss
from grpo_core.losses.regularizers import (
    adapt_entropy_coefficient,
    compute_reward_to_go,
    estimate_kl,
)
from grpo_core.losses.selection import (
    drop_truncated_responses,
    keep_on_policy_sequences,
    keep_within_second_moment,
    select_high_covariance,
    select_high_entropy,
)
from grpo_core.losses.sequence import (
    compute_gmpo_loss,
    compute_gspo_loss,
    compute_gspo_token_loss,
    compute_luspo_loss,
    compute_vespo_loss,
)
from grpo_core.losses.steps import (
    compose_policy_loss,
    describe_policy_update,
    grpo_microbatch_loss,
    grpo_microbatch_train_step,
    sft_microbatch_loss,
    sft_microbatch_train_step,
)
from grpo_core.losses.token import (
    compute_cispo_loss,
    compute_dppo_kl_loss,
    compute_dppo_tv_loss,
    compute_dro_loss,
    compute_kl_cov_loss,
    compute_sapo_loss,
)

__all__ = [
    "adapt_entropy_coefficient",
    "aggregate_token_losses",
    "compose_policy_loss",
    "compute_cispo_loss",
    "compute_cross_entropy_loss",
    "compute_distillation_advantages",
    "compute_dpo_loss",
    "compute_dppo_kl_loss",
    "compute_dppo_tv_loss",
    "compute_dro_loss",
    "compute_gmpo_loss",
    "compute_gradient_share",
    "compute_grpo_clip_loss",
    "compute_grpo_no_clip_loss",
    "compute_gspo_loss",
    "compute_gspo_token_loss",
    "compute_importance_divergences",
    "compute_importance_ratios",
    "compute_jensen_shannon_divergence",
    "compute_kl_cov_loss",
    "compute_luspo_loss",
    "compute_naive_policy_gradient_loss",
    "compute_policy_gradient_loss",
    "compute_reward_to_go",
    "compute_sapo_loss",
    "compute_sequence_weights",
    "compute_token_weights",
    "compute_top_k_forward_kl",
    "compute_vespo_loss",
    "describe_mismatch",
    "describe_policy_update",
    "drop_truncated_responses",
    "effective_sample_size",
    "estimate_kl",
    "fused_linear_grpo_loss",
    "grpo_microbatch_loss",
    "grpo_microbatch_train_step",
    "keep_on_policy_sequences",
    "keep_within_bounds",
    "keep_within_second_moment",
    "mask_importance_weights",
    "select_high_covariance",
    "select_high_entropy",
    "self_normalize_weights",
    "sft_microbatch_loss",
    "sft_microbatch_train_step",
    "sum_weighted_losses",
    "truncate_importance_weights",
]
