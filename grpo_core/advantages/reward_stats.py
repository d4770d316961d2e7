"""From what a reward function returns to rewards, their statistics and advantages."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core._groups import list_sizes, split_groups
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
    r"""$r_i = R(o_i, a_i)$, then `normalize_group_rewards`: from responses to advantages.

    Nothing here is differentiable. Constant groups get exactly 0.

    Args:
        reward_fn: $R$; its result must hold "reward", None where the response cannot be scored, and may hold
            "format_reward" and "answer_reward".
        rollout_responses: $o$, the responses to the first question, then those to the second, and so on.
        repeated_ground_truths: $a$, the reference answer of each response: each question's, `group_size` times over.
        group_size: $G$, the number of responses to each question.
        advantage_eps: $\epsilon$, in units of reward.
        normalize_by_std: whether to divide by the standard deviation of the group.

    Returns:
        The advantages, the raw rewards (float32 both), and the statistics of `describe_rewards`.

    Raises:
        ValueError: as `normalize_group_rewards`; if there are no rollouts, or the two lists differ in length; if
            `reward_fn` returns something without a "reward" that is finite or None.

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
    check_group_std(list_sizes(len(rollout_responses), group_size, "group_size"), advantage_eps, normalize_by_std)
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    scores = [reward_fn(response, truth) for response, truth in pairs]
    rewards = read_rewards(scores)
    advantages = normalize_group_rewards(
        rewards, group_size, advantage_eps=advantage_eps, normalize_by_std=normalize_by_std
    )
    return advantages, rewards, describe_rewards(scores, group_size)


@shape_checked
def read_rewards(scores: Sequence[Any]) -> Float[Tensor, " rollout"]:
    r"""$r_i$ of what a reward function returned for each response, float32.

    A reward of None says that the response could not be scored, which is not 0: it becomes NaN, and every estimator
    leaves it out of its statistics.

    Args:
        scores: dictionaries with a "reward" that is finite or None.

    Returns:
        The rewards.

    Raises:
        ValueError: if a score is no dictionary, has no "reward", or one that is neither None nor a finite float32.

    Example:
        >>> read_rewards([{"reward": 1.0}, {"reward": 0}, {"reward": None}])
        tensor([1., 0., nan])
    """
    return torch.tensor([_reward_of(score, index) for index, score in enumerate(scores)], dtype=torch.float32)


@shape_checked
def describe_rewards(scores: Sequence[Any], group_sizes: GroupSizes) -> dict[str, float]:
    r"""$\bar r$, its spread and its parts, over the scored rollouts, as plain floats.

    Args:
        scores: dictionaries with a "reward" that is finite, or None where a response could not be scored, and perhaps
            "format_reward" and "answer_reward".
        group_sizes: $G$, the number of responses to each question: one number, or one for each group.

    Returns:
        `reward` (mean), `reward_std` (unbiased; 0 for a single rollout), `reward_min`, `reward_max`, `format_reward`
        and `answer_reward` (means; each only if every scored rollout has it), `zero_std_groups` (share of groups
        without signal), `unscored` (share of rollouts that could not be scored). If that is all of them, the first
        four are NaN.

    Raises:
        ValueError: if there are no scores, they do not fill the groups, or one has no "reward" that `read_rewards`
            takes.

    Example:
        >>> described = describe_rewards([{"reward": 1.0}, {"reward": 0.0}], 2)
        >>> described["reward"], described["zero_std_groups"]
        (0.5, 0.0)
    """
    require(len(scores) > 0, "scores", "[]", "at least one score")
    rewards = read_rewards(scores)
    groups = split_groups(rewards, group_sizes)
    scored = [score for score in scores if score["reward"] is not None]
    found = rewards[~rewards.isnan()] if scored else rewards[:1]  # of nothing, NaN
    parts = [key for key in ("format_reward", "answer_reward") if all(score.get(key) is not None for score in scored)]
    return {
        "reward": found.mean().item(),
        "reward_std": found.std(correction=min(1, len(found) - 1)).item(),
        "reward_min": found.min().item(),
        "reward_max": found.max().item(),
        **{key: sum(float(score[key]) for score in scored) / len(scored) for key in parts if scored},
        "zero_std_groups": (~groups.has_signal).float().mean().item(),
        "unscored": 1 - len(scored) / len(scores),
    }


def _reward_of(score: object, index: int) -> float:
    if not isinstance(score, dict) or "reward" not in score:
        raise ValueError(f"reward_fn returned {score!r} for rollout {index}: it must return a dict with a 'reward'")
    if score["reward"] is None:
        return math.nan
    reward = float(score["reward"])
    if not abs(reward) <= torch.finfo(torch.float32).max:
        raise ValueError(f"reward_fn returned reward={reward} for rollout {index}: it must be a finite float32")
    return reward
