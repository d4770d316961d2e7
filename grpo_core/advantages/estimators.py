"""Advantage estimators: how much better each response was than the others of its group."""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core._groups import RELATIVE_NOISE, list_group_sizes, split_groups
from grpo_core.tensor_types import Advantages
from grpo_core.types import GroupSizes


@shape_checked
def normalize_group_rewards(
    rewards: Float[Tensor, " rollout"],
    group_sizes: GroupSizes,
    *,
    advantage_eps: float = 1e-6,
    normalize_by_std: bool = True,
    correction: int = 1,
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = (r_i - \bar r) / (s + \epsilon)$, the reward normalized within its group (GRPO).

    $\bar r$ and $s$ are the mean and the standard deviation of the group. Unitless and detached. If all rewards of a
    group are equal (their range is within a millionth of the largest), the group has no signal and its advantages are
    exactly 0, even where rounding makes $s > 0$. A response that could not be scored (NaN or infinite) gets 0 and is
    excluded from the statistics.

    Args:
        rewards: $r$, group after group.
        group_sizes: $G$, the number of responses to each question: one number for all groups, or one per group.
        advantage_eps: $\epsilon$, in units of reward; limits $A$ where $s$ is tiny.
        normalize_by_std: False omits the division, $A_i = r_i - \bar r$, as in Dr. GRPO.
        correction: 1 for the unbiased $s$ (division by $G - 1$), 0 for the population $s$ (division by $G$).

    Returns:
        The advantage of each response, with mean 0 in each group; float64 for float64 rewards, else float32.

    Raises:
        ValueError: if the rollouts do not fill the groups, `normalize_by_std` is set and a group has 1 response,
            `advantage_eps` is negative or not finite, or `correction` is neither 0 nor 1.

    Examples:
        >>> normalize_group_rewards(torch.tensor([1.0, 0.0, 0.1, 0.1]), 2, normalize_by_std=False)
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783, section 3.1 (undivided).
    """
    check_group_std(list_group_sizes(len(rewards), group_sizes), advantage_eps, normalize_by_std)
    require(correction in (0, 1), "correction", correction, "0 or 1")
    groups = split_groups(rewards, group_sizes)
    advantages = groups.rewards - groups.mean
    if normalize_by_std:
        advantages = advantages / (groups.std(correction) + advantage_eps)
    return groups.flatten_with_signal(advantages)


@shape_checked
def compute_leave_one_out_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = r_i - \frac{1}{G-1} \sum_{j \ne i} r_j$, the reward minus the mean of the others (RLOO).

    In units of reward; detached. It is $G/(G-1)$ times the centered reward, and gives an unbiased gradient of the
    expected reward. Exactly 0 for a group without signal, for a group with one response, and for a response that could
    not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
        >>> compute_leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
        tensor([ 1.0000, -0.5000, -0.5000])

    References:
        Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for
        Free!".
    """
    groups = split_groups(rewards, group_sizes)
    others = groups.rewards.sum(dim=1, keepdim=True) - groups.rewards
    return groups.flatten_with_signal(groups.rewards - others / (groups.n_scored - 1).clamp(min=1))


@shape_checked
def compute_batch_std_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, *, advantage_eps: float = 1e-4
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = (r_i - \bar r) / (s + \epsilon)$, group mean over batch deviation (Lite PPO).

    $\bar r$ is the mean of the group, and $s$ the unbiased standard deviation of all raw rewards of the batch, before
    centering. Unitless and detached. Exactly 0 for a group without signal and for a response that could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        advantage_eps: $\epsilon$, in units of reward.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or `advantage_eps` is negative.

    Examples:
        >>> compute_batch_std_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2, advantage_eps=0.0)
        tensor([ 1., -1.,  0.,  0.])

    References:
        Liu et al. 2025, arXiv:2508.08221 (Lite PPO: group mean, batch standard deviation).
    """
    _check_eps(advantage_eps)
    groups = split_groups(rewards, group_sizes)
    everything = groups.rewards[groups.scored]
    spread = everything.std() if len(everything) > 1 else everything.new_ones(())
    return groups.flatten_with_signal((groups.rewards - groups.mean) / (spread + advantage_eps))


@shape_checked
def compute_gdpo_advantages(
    rewards: Float[Tensor, "rollout reward"],
    group_sizes: GroupSizes,
    *,
    reward_weights: list[float] | None = None,
    advantage_eps: float = 1e-4,
) -> Float[Tensor, " rollout"]:
    r"""Return $A = (S - \bar S) / (s + \epsilon)$ over the batch, with $S_i = \sum_k w_k A_{ik}$ (GDPO).

    For several rewards: $A_{ik}$ is reward $k$ of response $i$, normalized within its group by
    `normalize_group_rewards`, so that the scale of one reward cannot dominate the others. Unitless and detached. A
    reward that could not be scored adds 0 to $S_i$, and a response without any scored reward gets 0. Exactly 0 for a
    group without signal in any reward ($\bar S$ is 0 up to rounding, because each $A_{ik}$ sums to 0 in its group).

    Args:
        rewards: $r_{ik}$, group after group, one column per reward; NaN or infinite where it could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        reward_weights: $w$, one per reward; None gives every reward weight 1.
        advantage_eps: $\epsilon$ of both divisions.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, a group has 1 response, `advantage_eps` is negative, or the
            number of weights differs from the number of rewards.

    Examples:
        >>> compute_gdpo_advantages(torch.tensor([[1.0, 0.0], [0.0, 100.0]]), 2, reward_weights=[3.0, 1.0])
        tensor([ 0.7071, -0.7071])

    References:
        Liu et al. 2026, arXiv:2601.05242 (GDPO).
    """
    weights = [1.0] * rewards.shape[1] if reward_weights is None else reward_weights
    require(
        len(weights) == rewards.shape[1],
        "reward_weights",
        weights,
        f"one number per reward, {rewards.shape[1]} in total",
    )
    columns = [normalize_group_rewards(column, group_sizes, advantage_eps=advantage_eps) for column in rewards.T]
    total = torch.stack([w * column.double() for w, column in zip(weights, columns, strict=True)]).sum(dim=0)
    scored = rewards.isfinite().any(dim=1)
    white = _whiten(total, scored, advantage_eps, correction=1)
    return torch.where(total == 0, 0.0, white).to(columns[0].dtype)


@shape_checked
def compute_opo_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, lengths: Int[Tensor, " rollout"]
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = r_i - \sum_j n_j r_j \big/ \sum_j n_j$, with the group's length-weighted mean as baseline (OPO).

    The baseline has the least variance if the squared gradient of a response grows with its length and the responses
    are on-policy. In units of reward; detached. The length-weighted sum of a group is 0. Exactly 0 for a group without
    signal, for a response that could not be scored, and for a group whose scored responses are all empty.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        lengths: $n$, the number of tokens of each response.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or a length is negative.

    Examples:
        >>> compute_opo_advantages(torch.tensor([1.0, 0.0]), 2, torch.tensor([3, 1]))
        tensor([ 0.2500, -0.7500])

    References:
        Hao et al. 2025, arXiv:2505.23585 (OPO, the practical length-weighted baseline).
    """
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"lengths hold {lengths.min().item()}: each must be at least 0")
    groups = split_groups(rewards, group_sizes)
    tokens = torch.zeros_like(groups.rewards)
    tokens[groups.present] = lengths.to(tokens)
    tokens = torch.where(groups.scored, tokens, 0.0)
    total = tokens.sum(dim=1, keepdim=True)
    baseline = (tokens * groups.rewards).sum(dim=1, keepdim=True) / total.clamp(min=1)
    return groups.flatten_with_signal(torch.where(total > 0, groups.rewards - baseline, 0.0))


@shape_checked
def compute_gpg_advantages(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = \frac{B}{B - M} (r_i - \bar r)$, centered and scaled up to make up for zero-signal groups (GPG).

    $B$ is the number of scored responses of the batch and $M$ the number of these in groups without signal, so that
    the gradient is as large as if every group had signal. In units of reward; detached. Exactly 0 for a group without
    signal and for a response that could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
        >>> compute_gpg_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2)
        tensor([ 1., -1.,  0.,  0.])

    References:
        Chu et al. 2025, arXiv:2504.02546 (GPG).
    """
    groups = split_groups(rewards, group_sizes)
    with_signal = (groups.n_scored * groups.has_signal).sum()
    scale = groups.n_scored.sum() / with_signal.clamp(min=1)
    return groups.flatten_with_signal(scale * (groups.rewards - groups.mean))


@shape_checked
def compute_maxrl_advantages(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = (r_i - \bar r) / \bar r$, which gives rare successes more weight (MaxRL).

    For rewards of 0 and 1, the expectation of the mean of $A_i \nabla \log \pi(o_i)$ is the gradient of
    $-\sum_{k=1}^{G-1} (1 - p)^k / k$, the first terms of the series of $\log p$, where $p$ is the probability of
    success. Unitless and detached. Exactly 0 for a group without signal, which includes a group without a success, and
    for a response that could not be scored.

    Args:
        rewards: $r \ge 0$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or a reward is negative.

    Examples:
        >>> compute_maxrl_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
        tensor([ 3., -1., -1., -1.])

    References:
        Tajwar et al. 2026, arXiv:2602.02710 (MaxRL).
    """
    groups = split_groups(rewards, group_sizes)
    if groups.rewards.numel() and groups.rewards.min() < 0:
        raise ValueError(
            f"rewards hold {groups.rewards.min().item()}: each must be at least 0, because their mean is a divisor"
        )
    mean = torch.where(groups.has_signal, groups.mean, 1.0)
    return groups.flatten_with_signal((groups.rewards - mean) / mean)


@shape_checked
def compute_remax_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, greedy_rewards: Float[Tensor, " group"]
) -> Float[Tensor, " rollout"]:
    r"""Return $A_i = r_i - r_{\text{greedy}}$, with the reward of the greedy response as baseline (ReMax).

    In units of reward; detached. The baseline does not depend on the samples, so a group of equal rewards has nonzero
    advantages if the greedy reward differs, and a group may have a single member. Exactly 0 where the two rewards
    differ only by rounding, and where either response could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        greedy_rewards: reward of the greedy response to each question.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or the number of `greedy_rewards` is not that of the
            groups.

    Examples:
        >>> compute_remax_advantages(torch.tensor([1.0, 0.0, 0.1]), [2, 1], torch.tensor([0.0, 0.1]))
        tensor([1., 0., 0.])

    References:
        Li et al. 2023, arXiv:2310.10505 (ReMax).
    """
    groups = split_groups(rewards, group_sizes)
    given, needed = len(greedy_rewards), len(groups.rewards)
    require(given == needed, "greedy_rewards", f"[{given} values]", f"one value for each of the {needed} groups")
    baseline = rearrange(greedy_rewards.detach().double(), "group -> group 1")
    difference = groups.rewards - baseline
    size = torch.maximum(groups.rewards.abs(), baseline.abs())
    advantages = torch.where(difference.abs() > RELATIVE_NOISE * size, difference, 0.0)
    return groups.flatten_scored(advantages.nan_to_num(0.0))


@shape_checked
def whiten_over_tokens(
    advantages: Advantages,
    response_mask: Bool[Tensor, "batch seq"],
    *,
    advantage_eps: float = 1e-8,
    correction: int = 1,
) -> Advantages:
    r"""Return $\hat A_{it} = (A_{it} - \mu) / (\sigma + \epsilon)$, normalized over all response tokens (REINFORCE++).

    $\mu$ and $\sigma$ are taken over the batch, in which each response counts once per token. Applied to rewards, this
    is the advantage of REINFORCE++; applied to rewards centered in their groups, that of REINFORCE++-baseline.
    Unitless and detached. Exactly 0 if all values are equal up to rounding, and outside the mask, where no value is
    read. Apply it to the whole batch before splitting it.

    Args:
        advantages: $A$, one per response (one column) or one per token.
        response_mask: True where a token belongs to the response.
        advantage_eps: $\epsilon$, in units of `advantages`.
        correction: 1 for the unbiased $\sigma$, 0 for the population $\sigma$.

    Returns:
        The normalized advantages, in the shape of `advantages`.

    Raises:
        ValueError: if `advantage_eps` is negative or not finite, or `correction` is neither 0 nor 1.

    Examples:
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> whiten_over_tokens(torch.tensor([[1.0], [0.0]]), mask)
        tensor([[ 0.5000],
                [-1.5000]])

    References:
        Hu et al. 2025, arXiv:2501.03262 (REINFORCE++: normalization over the global batch).
    """
    _check_eps(advantage_eps)
    require(correction in (0, 1), "correction", correction, "0 or 1")
    wide = advantages.detach().double().expand(response_mask.shape)
    white = _whiten(wide, response_mask, advantage_eps, correction)
    if advantages.shape != white.shape:  # all tokens of a response have the same value
        white = white.sum(dim=1, keepdim=True) / response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return white.to(torch.promote_types(advantages.dtype, torch.float32))


def _check_eps(advantage_eps: float) -> None:
    require(0 <= advantage_eps < math.inf, "advantage_eps", advantage_eps, "finite and at least 0")


def check_group_std(sizes: list[int], advantage_eps: float, normalize_by_std: bool) -> None:
    """Raise ValueError if `advantage_eps` is invalid or a group of 1 would be divided by its standard deviation."""
    _check_eps(advantage_eps)
    if normalize_by_std and 1 in sizes:
        raise ValueError(
            "a group of 1 response has no standard deviation: sample at least 2 per question, or set"
            " normalize_by_std=False"
        )


def _whiten(
    values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"], eps: float, correction: int
) -> Float[Tensor, "*shape"]:
    """Scale the counted entries to mean 0 and variance 1; return 0 elsewhere, or everywhere if they are all equal."""
    kept = values[counted]
    if len(kept) < 2 or kept.max() - kept.min() <= RELATIVE_NOISE * kept.abs().max():
        return torch.zeros_like(values)
    return torch.where(counted, (values - kept.mean()) / (kept.std(correction=correction) + eps), 0.0)
