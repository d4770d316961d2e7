"""Advantages: how much better each response was than the others of its group."""

from grpo_core.advantages.estimators import (
    compute_batch_std_advantages,
    compute_gdpo_advantages,
    compute_gpg_advantages,
    compute_leave_one_out_advantages,
    compute_maxrl_advantages,
    compute_opo_advantages,
    compute_remax_advantages,
    normalize_group_rewards,
    whiten_over_tokens,
)
from grpo_core.advantages.groups import (
    describe_silent_groups,
    find_signal_groups,
)
from grpo_core.advantages.pass_at_k import (
    compute_best_of_advantages,
    compute_pass_at_k_advantages,
    compute_pkpo_advantages,
)
from grpo_core.advantages.reward_stats import (
    compute_group_normalized_rewards,
    describe_rewards,
    read_rewards,
)
from grpo_core.advantages.shaping import (
    compute_cosine_length_reward,
    compute_soft_overlong_penalty,
)
from grpo_core.advantages.token_baseline import compute_otb_advantages

__all__ = [
    "compute_batch_std_advantages",
    "compute_best_of_advantages",
    "compute_cosine_length_reward",
    "compute_gdpo_advantages",
    "compute_gpg_advantages",
    "compute_group_normalized_rewards",
    "compute_leave_one_out_advantages",
    "compute_maxrl_advantages",
    "compute_opo_advantages",
    "compute_otb_advantages",
    "compute_pass_at_k_advantages",
    "compute_pkpo_advantages",
    "compute_remax_advantages",
    "compute_soft_overlong_penalty",
    "describe_rewards",
    "describe_silent_groups",
    "find_signal_groups",
    "normalize_group_rewards",
    "read_rewards",
    "whiten_over_tokens",
]
