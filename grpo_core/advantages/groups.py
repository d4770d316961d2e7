"""Groups with and without a learning signal."""

from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core._groups import split_groups
from grpo_core.types import GroupSizes


@shape_checked
def find_signal_groups(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Bool[Tensor, " group"]:
    r"""Return whether $\max_i r_i > \min_i r_i$ beyond rounding in each group: the groups with a learning signal.

    These are the groups that DAPO's dynamic sampling keeps. A group whose rewards are all 0.5 has no signal either. A
    response that could not be scored (NaN or infinite) is ignored.

    Args:
        rewards: $r$, group after group.
        group_sizes: $G$: one number for all groups, or one per group.

    Returns:
        True for each group with signal.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
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
    r"""Return the shares of zero-signal groups whose rewards are all best, all at most 0, or all some other value.

    A growing first share means that the questions have become too easy, a growing second share that they are too hard.
    A group in which no response could be scored belongs to the third share.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        best_reward: reward of a fully correct response.

    Returns:
        `groups_all_right`, `groups_all_wrong` and `groups_all_other`, as shares of all groups.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
        >>> import torch
        >>> describe_silent_groups(torch.tensor([1.0, 1.0, 0.0, 0.0]), 2)
        {'groups_all_right': 0.5, 'groups_all_wrong': 0.5, 'groups_all_other': 0.0}
    """
    groups = split_groups(rewards, group_sizes)
    no_signal, scored = ~groups.has_signal, groups.n_scored > 0
    right = no_signal & scored & (groups.mean >= best_reward - 1e-6 * abs(best_reward))
    wrong = no_signal & scored & (groups.mean <= 0) & ~right
    kinds = {"right": right, "wrong": wrong, "other": no_signal & ~right & ~wrong}
    n = max(1, len(groups.rewards))
    return {f"groups_all_{name}": kind.sum().item() / n for name, kind in kinds.items()}
