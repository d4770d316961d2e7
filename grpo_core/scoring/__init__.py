"""Scoring: log-probabilities and entropies of tokens under a model."""

from grpo_core.scoring.distributions import (
    compute_collision_probs,
    compute_entropy,
    select_log_probs,
)
from grpo_core.scoring.fused_head import (
    fused_linear_log_probs,
    fused_linear_token_loss,
)
from grpo_core.scoring.group_rows import (
    get_group_log_probs,
    mask_group_rows,
    pack_group_rows,
)
from grpo_core.scoring.response_log_probs import get_response_log_probs
from grpo_core.scoring.tokenization import tokenize_prompt_and_output

__all__ = [
    "compute_collision_probs",
    "compute_entropy",
    "fused_linear_log_probs",
    "fused_linear_token_loss",
    "get_group_log_probs",
    "get_response_log_probs",
    "mask_group_rows",
    "pack_group_rows",
    "select_log_probs",
    "tokenize_prompt_and_output",
]
