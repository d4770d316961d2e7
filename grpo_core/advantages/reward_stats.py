"""Rewards, their statistics and their advantages from the results of a reward function."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core._groups import list_group_sizes, split_groups
from grpo_core.advantages.estimators import check_group_std, normalize_group_rewards
from grpo_core.types import GroupSizes, RewardFn


@shape_checked
def compute_group_normalized_rewards(
    reward_fn: RewardFn,
    rollout_responses: list[str],
    repeated_ground_truths: list[Any],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Float[Tensor, " rollout"], Float[Tensor, " rollout"], dict[str, float]]:
    r"""Return $r_i = R(o_i, a_i)$ for every response, and its advantage by `normalize_group_rewards`.

    Nothing here is differentiable. The advantages of a group of equal rewards are exactly 0.

    Args:
        reward_fn: $R$; it returns a dictionary with "reward", None for a response that cannot be scored, and
            optionally "format_reward" and "answer_reward".
        rollout_responses: $o$, the responses to the first question, then those to the second, and so on.
        repeated_ground_truths: $a$, the reference answer of each response: that of each question, repeated
            `group_size` times.
        group_size: $G$, the number of responses to each question.
        advantage_eps: $\epsilon$, in units of reward.
        normalize_by_std: whether to divide by the standard deviation of the group.

    Returns:
        The advantages and the raw rewards, both float32, and the statistics of `describe_rewards`.

    Raises:
        ValueError: as in `normalize_group_rewards`; if there are no rollouts or the two lists differ in length; if
            `reward_fn` returns anything but a dictionary with a "reward" that is finite or None.

    Examples:
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
    check_group_std(
        list_group_sizes(len(rollout_responses), group_size, "group_size"), advantage_eps, normalize_by_std
    )
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    scores = [reward_fn(response, truth) for response, truth in pairs]
    rewards = read_rewards(scores)
    advantages = normalize_group_rewards(
        rewards, group_size, advantage_eps=advantage_eps, normalize_by_std=normalize_by_std
    )
    return advantages, rewards, describe_rewards(scores, group_size)


@shape_checked
def read_rewards(scores: Sequence[Any]) -> Float[Tensor, " rollout"]:
    r"""Return the reward $r_i$ of each result of a reward function, float32.

    A reward of None means that the response could not be scored, which is different from a reward of 0. It becomes
    NaN, which every advantage estimator excludes from its statistics.

    Args:
        scores: one dictionary per response, with a "reward" that is finite or None.

    Returns:
        The rewards.

    Raises:
        ValueError: if a score is not a dictionary, or its "reward" is missing or neither None nor a finite float32.

    Examples:
        >>> read_rewards([{"reward": 1.0}, {"reward": 0}, {"reward": None}])
        tensor([1., 0., nan])
    """
    return torch.tensor([_read_reward(score, index) for index, score in enumerate(scores)], dtype=torch.float32)


@shape_checked
def describe_rewards(scores: Sequence[Any], group_sizes: GroupSizes) -> dict[str, float]:
    r"""Return the mean, spread and components of the rewards over the scored rollouts, as plain floats.

    Args:
        scores: one dictionary per response, with a "reward" that is finite, or None if the response could not be
            scored, and optionally "format_reward" and "answer_reward".
        group_sizes: $G$, the number of responses to each question: one number for all groups, or one per group.

    Returns:
        `reward` (mean), `reward_std` (unbiased; 0 for a single rollout), `reward_min`, `reward_max`, `format_reward`
        and `answer_reward` (means, present only if every scored rollout has the value), `zero_std_groups` (share of
        groups without signal) and `unscored` (share of rollouts that could not be scored). The first four are NaN if
        no rollout could be scored.

    Raises:
        ValueError: if there are no scores, the scores do not fill the groups, or `read_rewards` rejects one of them.

    Examples:
        >>> statistics = describe_rewards([{"reward": 1.0}, {"reward": 0.0}], 2)
        >>> statistics["reward"], statistics["zero_std_groups"]
        (0.5, 0.0)
    """
    require(len(scores) > 0, "scores", "[]", "at least one score")
    rewards = read_rewards(scores)
    groups = split_groups(rewards, group_sizes)
    scored = [score for score in scores if score["reward"] is not None]
    known = rewards[~rewards.isnan()] if scored else rewards[:1]  # a single NaN if no rollout was scored
    names = ("format_reward", "answer_reward")
    components = [name for name in names if all(score.get(name) is not None for score in scored)]
    return {
        "reward": known.mean().item(),
        "reward_std": known.std(correction=min(1, len(known) - 1)).item(),
        "reward_min": known.min().item(),
        "reward_max": known.max().item(),
        **{name: sum(float(score[name]) for score in scored) / len(scored) for name in components if scored},
        "zero_std_groups": (~groups.has_signal).float().mean().item(),
        "unscored": 1 - len(scored) / len(scores),
    }


def _read_reward(score: object, index: int) -> float:
    if not isinstance(score, dict) or "reward" not in score:
        raise ValueError(f"reward_fn returned {score!r} for rollout {index}: it must return a dict with a 'reward'")
    if score["reward"] is None:
        return math.nan
    reward = float(score["reward"])
    if not abs(reward) <= torch.finfo(torch.float32).max:
        raise ValueError(f"reward_fn returned reward={reward} for rollout {index}: it must be a finite float32")
    return reward
