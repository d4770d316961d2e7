"""Advantages that optimize the best of k responses instead of the mean reward."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core._groups import list_group_sizes, split_groups
from grpo_core.types import GroupSizes


@shape_checked
def compute_best_of_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = r_{(1)} - r_{(2)}$ for the best response of each group, and 0 for all other responses.

    This is the amount by which the best response raises the maximum of its group. In units of reward; detached.
    Exactly 0 for the whole group if two responses share the best reward, for a group without signal, for a group with
    one response, and for a response that could not be scored. If every response of a group was scored,
    `compute_pkpo_advantages` with $k = G$ is $G$ times this.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
        >>> compute_best_of_advantages(torch.tensor([1.0, 0.25, 0.0, 1.0, 1.0, 0.0]), 3)
        tensor([0.7500, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000])

    References:
        Tang et al. 2025, arXiv:2503.19595 (best of k with a leave-one-out baseline).
    """
    groups = split_groups(rewards, group_sizes)
    ranked = torch.where(groups.scored, groups.rewards, -torch.inf).sort(dim=1, descending=True).values
    best = ranked[:, :1]
    # A group with one scored response has no signal, so its second-best value is never used.
    second = ranked[:, 1:2] if ranked.shape[1] > 1 else best
    return groups.flatten_with_signal(torch.where(groups.rewards == best, best - second, 0.0))


@shape_checked
def compute_pass_at_k_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, k: int
) -> Float[Tensor, " rollout"]:
    r"""Return $A_+ = (1 - \bar R) / \sigma$ and $A_- = (1 - \bar R - f) / \sigma$, the pass@k advantage.

    $A_+$ is for correct responses (reward 1) and $A_-$ for wrong ones (reward 0). $N$ is the number of responses of a
    group and $N_-$ the number of wrong ones. $\bar R = 1 - \binom{N_-}{k} / \binom{N}{k}$ is the expected reward of a
    random $k$-subset, $\sigma = \sqrt{\bar R (1 - \bar R)}$ its standard deviation, and $f = \binom{N_- - 1}{k-1} /
    \binom{N - 1}{k-1}$ the share of failing subsets among those that contain a given wrong response. Each response
    gets the mean advantage of the subsets that contain it. For $k = 1$ this is the group-normalized reward with the
    population standard deviation.

    Unitless and detached. Exactly 0 where $\sigma = 0$ (every subset fails, or none does), where fewer than $k$
    responses were scored, and for a response that was not scored. The baseline includes the response itself, so the
    gradient is biased; that of `compute_pkpo_advantages` is not.

    Args:
        rewards: 0 or 1, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $N$: one number for all groups, or one per group.
        k: $1 \le k \le N$.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, a reward is neither 0 nor 1, or $k$ is not in $[1, N]$.

    Examples:
        >>> compute_pass_at_k_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, k=2)
        tensor([ 1.0000, -0.3333, -0.3333, -0.3333])

    References:
        Chen et al. 2025, arXiv:2508.10751 (pass@k training, the analytical advantage).
    """
    _check_k(k, list_group_sizes(len(rewards), group_sizes))
    groups = split_groups(rewards, group_sizes)
    neither = groups.rewards[(groups.rewards != 0) & (groups.rewards != 1)].tolist()
    if neither:
        raise ValueError(f"rewards hold {neither[0]}: each must be 0 or 1, because pass@k counts correct answers")
    advantages = torch.zeros_like(groups.rewards)
    counts = zip(groups.n_scored.flatten().int().tolist(), groups.rewards.sum(dim=1).int().tolist(), strict=True)
    for row, (n, right) in enumerate(counts):
        if n < k:
            continue
        wrong = n - right
        success = (math.comb(n, k) - math.comb(wrong, k)) / math.comb(n, k)
        deviation = math.sqrt(success * (1 - success))
        if deviation == 0:
            continue
        failing_with_it = math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)
        is_right = groups.rewards[row] == 1
        # A float64 tensor, because torch.where of two numbers returns float32.
        advantages[row] = (
            1 - success - torch.where(is_right, 0.0, groups.rewards.new_tensor(failing_with_it))
        ) / deviation
    return groups.flatten_with_signal(advantages)


@shape_checked
def compute_pkpo_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, k: int
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = k \operatorname{mean}_J \max(0, r_i - \max_J r)$ over $(k-1)$-subsets $J$ of the others (PKPO).

    This is the amount by which response $i$ raises the best of $k$ responses. It is unbiased for rewards of any kind:
    the expectation of the mean over a group of $A_i \nabla \log \pi(o_i)$ is the gradient of the expected best of $k$.
    For $k = 1$, where $J$ is empty, it equals `compute_leave_one_out_advantages`. In units of reward; detached.
    Exactly 0 for a group without signal, where fewer than $k$ responses were scored, and for a response that was not
    scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        k: $1 \le k \le G$.

    Returns:
        The advantage of each response; never negative for $k > 1$.

    Raises:
        ValueError: if the rollouts do not fill the groups, or $k$ is not in $[1, G]$.

    Examples:
        >>> compute_pkpo_advantages(torch.tensor([1.0, 0.0, 0.0]), 3, k=2)
        tensor([2., 0., 0.])

    References:
        Walder and Karkhanis 2025, arXiv:2505.15201 (PKPO, with the leave-one-out-minus-one baseline).
    """
    sizes = list_group_sizes(len(rewards), group_sizes)
    _check_k(k, sizes)
    groups = split_groups(rewards, group_sizes)
    advantages = torch.zeros_like(groups.rewards)
    for row, kept in enumerate(groups.scored):
        n = int(kept.sum())
        if n < k:
            continue
        values, order = groups.rewards[row][kept].sort()
        if k == 1:
            added = values - (values.sum() - values) / max(1, n - 1)
        else:
            # shares[j] is the share of the (k-1)-subsets of the n-1 others whose best is the j-th smallest, from j =
            # 0. Only the values below r_i contribute, and their ranks among the others are their ranks in the group.
            shares = values.new_tensor([math.comb(j, k - 2) / math.comb(n - 1, k - 1) for j in range(n)])
            added = values * (shares.cumsum(0) - shares) - ((shares * values).cumsum(0) - shares * values)
        advantages[row, kept.nonzero().flatten()[order]] = k * added
    return groups.flatten_with_signal(advantages)


def _check_k(k: int, sizes: list[int]) -> None:
    require(
        1 <= k <= min(sizes, default=k),
        "k",
        k,
        f"between 1 and the size of the smallest group, {min(sizes, default=k)}",
    )
