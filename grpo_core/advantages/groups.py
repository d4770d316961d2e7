"""Which groups of responses have a learning signal."""

from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core._groups import split_groups
from grpo_core.types import GroupSizes


@shape_checked
def find_signal_groups(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Bool[Tensor, " group"]:
    r"""$\max_i r_i > \min_i r_i$ in each group, beyond rounding: the groups from which something can be learned.

    What DAPO's dynamic sampling keeps; a group that is constant at 0.5 is silent as well. A response that could not be
    scored (NaN or infinite) does not count.

    Args:
        rewards: $r$, group after group.
        group_sizes: $G$: one number, or one for each group.

    Returns:
        True for the groups with signal.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Example:
        >>> import torch
        >>> find_signal_groups(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2)
        tensor([ True, False])

    References:
        Yu et al. 2025, arXiv:2503.14476, eq. 11.
    """
    return split_groups(rewards, group_sizes).has_signal.squeeze(1)


@shape_checked
def describe_silent_groups(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, *, best_reward: float = 1.0
) -> dict[str, float]:
    r"""Shares of groups without signal: all at the best reward, all at 0 or below, and all at something else.

    A rising share of the first says that the questions have become too easy, of the second that they are too hard. A
    group in which nothing could be scored counts as the last.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.
        best_reward: what a fully right response gets.

    Returns:
        `groups_all_right`, `groups_all_wrong`, `groups_all_other`.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Example:
        >>> import torch
        >>> describe_silent_groups(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2)
        {'groups_all_right': 0.5, 'groups_all_wrong': 0.5, 'groups_all_other': 0.0}
    """
    groups = split_groups(rewards, group_sizes)
    silent, scored = ~groups.has_signal, groups.n_scored > 0
    right = silent & scored & (groups.mean >= best_reward - 1e-6 * abs(best_reward))
    wrong = silent & scored & (groups.mean <= 0) & ~right
    kinds = {"right": right, "wrong": wrong, "other": silent & ~right & ~wrong}
    n = max(1, len(groups.rewards))
    return {f"groups_all_{name}": kind.sum().item() / n for name, kind in kinds.items()}
