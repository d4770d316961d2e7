"""Rewards of the responses to one question, compared with each other."""

import math
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._check import shape_checked
from grpo_core.types import RewardFn

# Rewards that differ by less than this share of their size differ by rounding alone.
_RELATIVE_NOISE = 1e-6


@shape_checked
def normalize_group_rewards(
    rewards: Float[Tensor, " rollout"],
    group_size: int,
    *,
    advantage_eps: float = 1e-6,
    normalize_by_std: bool = True,
) -> Float[Tensor, " rollout"]:
    r"""$A_i = (r_i - \bar r) / (s + \epsilon)$ within each group, $s$ the unbiased standard deviation; no unit.

    Rewards are data: the result is detached. A group whose rewards are all the same up to rounding carries no signal
    and gets exactly 0; the range of the rewards decides, since in floating point their $s$ need not be 0. A NaN reward
    makes its own group NaN and no other.

    Args:
        rewards: $r$, group after group; float64 stays float64, everything else is computed in float32.
        group_size: $G$, the number of responses to each question.
        advantage_eps: $\epsilon$, in units of reward; keeps a tiny $s$ from inflating $A$.
        normalize_by_std: False leaves the division out, $A_i = r_i - \bar r$, as Dr. GRPO does.

    Returns:
        The advantage of each response, with mean 0 in each group.

    Raises:
        ValueError: if the rollouts do not fill whole groups, a group of 1 is to be divided by its standard deviation,
            or `advantage_eps` is negative.

    Example:
        >>> normalize_group_rewards(torch.tensor([1.0, 0.0, 0.1, 0.1]), group_size=2, normalize_by_std=False)
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783, section 3.1 (undivided).
    """
    _check_groups(rewards.numel(), group_size, advantage_eps, normalize_by_std)
    wide = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    groups = rearrange(wide, "(group member) -> group member", member=group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps)
    advantages = torch.where(_carries_no_signal(groups), 0.0, advantages)
    return rearrange(advantages, "group member -> (group member)")


@shape_checked
def compute_group_normalized_rewards(
    reward_fn: RewardFn,
    rollout_responses: list[str],
    repeated_ground_truths: list[Any],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Float[Tensor, " rollout"], Float[Tensor, " rollout"], dict[str, float]]:
    r"""$r_i = R(o_i, a_i)$, then `normalize_group_rewards`: from responses to advantages.

    Nothing here is differentiable. Constant groups get exactly 0.

    Args:
        reward_fn: $R$; its result must hold "reward", and may hold "format_reward" and "answer_reward".
        rollout_responses: $o$, the responses to the first question, then those to the second, and so on.
        repeated_ground_truths: $a$, the reference answer of each response: each question's, `group_size` times over.
        group_size: $G$, the number of responses to each question.
        advantage_eps: $\epsilon$, in units of reward.
        normalize_by_std: whether to divide by the standard deviation of the group.

    Returns:
        The advantages, the raw rewards (float32 both), and the statistics of all rollouts as plain floats: `reward`
        (mean), `reward_std` (unbiased; 0 for a single rollout), `reward_min`, `reward_max`, `format_reward` and
        `answer_reward` (means; each only if every score has it), `zero_std_groups` (share of groups without signal).

    Raises:
        ValueError: as `normalize_group_rewards`; if there are no rollouts, or the two lists differ in length; if
            `reward_fn` returns something without a finite "reward".

    Example:
        >>> def exact(response, truth):
        ...     return {"reward": float(response == truth)}
        >>> responses, truths = ["4", "5"], ["4", "4"]
        >>> advantages, rewards, metadata = compute_group_normalized_rewards(exact, responses, truths, 2, 0.0, True)
        >>> advantages, rewards, metadata["reward"]
        (tensor([ 0.7071, -0.7071]), tensor([1., 0.]), 0.5)

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    if len(rollout_responses) != len(repeated_ground_truths) or not rollout_responses:
        raise ValueError(
            f"rollout_responses has {len(rollout_responses)} entries and repeated_ground_truths has"
            f" {len(repeated_ground_truths)}: give one ground truth per response, and at least one response"
        )
    _check_groups(len(rollout_responses), group_size, advantage_eps, normalize_by_std)
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    scores = [reward_fn(response, truth) for response, truth in pairs]
    rewards = torch.tensor([_reward_of(score, index) for index, score in enumerate(scores)], dtype=torch.float32)
    advantages = normalize_group_rewards(
        rewards, group_size, advantage_eps=advantage_eps, normalize_by_std=normalize_by_std
    )
    return advantages, rewards, _summarize(scores, rewards, group_size)


def _check_groups(rollouts: int, group_size: int, advantage_eps: float, normalize_by_std: bool) -> None:
    if group_size < 1 or rollouts % group_size:
        raise ValueError(f"{rollouts} rollouts do not fill groups of group_size={group_size}: give whole groups")
    if group_size == 1 and normalize_by_std:
        raise ValueError(
            "group_size=1 has no standard deviation: sample at least 2 responses per question, or set"
            " normalize_by_std=False"
        )
    if not 0 <= advantage_eps < math.inf:
        raise ValueError(f"advantage_eps={advantage_eps} must be finite and at least 0")


def _carries_no_signal(groups: Float[Tensor, "group member"]) -> Bool[Tensor, "group 1"]:
    """True for a group whose rewards differ by rounding alone."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    return high - low <= _RELATIVE_NOISE * groups.abs().amax(dim=1, keepdim=True)


def _reward_of(score: object, index: int) -> float:
    if not isinstance(score, dict) or "reward" not in score:
        raise ValueError(f"reward_fn returned {score!r} for rollout {index}: it must return a dict with a 'reward'")
    reward = float(score["reward"])
    if not abs(reward) <= torch.finfo(torch.float32).max:
        raise ValueError(f"reward_fn returned reward={reward} for rollout {index}: it must be a finite float32")
    return reward


def _summarize(
    scores: list[dict[str, float]], rewards: Float[Tensor, " rollout"], group_size: int
) -> dict[str, float]:
    """Statistics of a batch of rollouts; the keys are documented where they are returned."""
    groups = rearrange(rewards, "(group member) -> group member", member=group_size)
    parts = [key for key in ("format_reward", "answer_reward") if all(key in score for score in scores)]
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=min(1, len(scores) - 1)).item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        **{key: sum(float(score[key]) for score in scores) / len(scores) for key in parts},
        "zero_std_groups": _carries_no_signal(groups).float().mean().item(),
    }
