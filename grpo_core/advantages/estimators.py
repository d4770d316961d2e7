"""How much better than its alternatives a response was: from rewards to advantages."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core._groups import RELATIVE_NOISE, list_sizes, split_groups
from grpo_core.types import Advantages, GroupSizes


@shape_checked
def normalize_group_rewards(
    rewards: Float[Tensor, " rollout"],
    group_sizes: GroupSizes,
    *,
    advantage_eps: float = 1e-6,
    normalize_by_std: bool = True,
    correction: int = 1,
) -> Float[Tensor, " rollout"]:
    r"""$A_i = (r_i - \bar r) / (s + \epsilon)$ within each group, $s$ the standard deviation; no unit.

    Rewards are data: the result is detached. A group whose rewards are all the same (their range is within a millionth
    of the largest) carries no signal and gets exactly 0: in floating point their $s$ need not be 0. A response that
    could not be scored (NaN or infinite) gets 0 and takes part in no statistic.

    Args:
        rewards: $r$, group after group.
        group_sizes: $G$, the number of responses to each question: one number, or one for each group.
        advantage_eps: $\epsilon$, in units of reward; keeps a tiny $s$ from inflating $A$.
        normalize_by_std: False leaves the division out, $A_i = r_i - \bar r$, as Dr. GRPO does.
        correction: 1 for the unbiased $s$ (division by $G - 1$), 0 for that of a population.

    Returns:
        The advantage of each response, with mean 0 in each group; float64 for float64 rewards, else float32.

    Raises:
        ValueError: if the rollouts do not fill the groups, a group of 1 is to be divided by its standard deviation,
            `advantage_eps` is negative, or `correction` is neither 0 nor 1.

    Example:
        >>> normalize_group_rewards(torch.tensor([1.0, 0.0, 0.1, 0.1]), 2, normalize_by_std=False)
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    References:
        Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783, section 3.1 (undivided).
    """
    check_group_std(list_sizes(len(rewards), group_sizes), advantage_eps, normalize_by_std)
    require(correction in (0, 1), "correction", correction, "0 or 1")
    groups = split_groups(rewards, group_sizes)
    advantages = groups.rewards - groups.mean
    if normalize_by_std:
        advantages = advantages / (groups.std(correction) + advantage_eps)
    return groups.signal_as_rollouts(advantages)


@shape_checked
def compute_leave_one_out_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes
) -> Float[Tensor, " rollout"]:
    r"""$A_i = r_i - \frac{1}{G-1} \sum_{j \ne i} r_j$ (RLOO): each response against the mean of the others.

    In units of reward; $G/(G-1)$ times the centered reward, and with it the gradient of the expected reward is
    unbiased. Detached. Exactly 0 for a group without signal, of one response, or for one that could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Example:
        >>> compute_leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
        tensor([ 1.0000, -0.5000, -0.5000])

    References:
        Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for
        Free!".
    """
    groups = split_groups(rewards, group_sizes)
    others = groups.rewards.sum(dim=1, keepdim=True) - groups.rewards
    return groups.signal_as_rollouts(groups.rewards - others / (groups.n_scored - 1).clamp(min=1))


@shape_checked
def compute_batch_std_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, *, advantage_eps: float = 1e-4
) -> Float[Tensor, " rollout"]:
    r"""$A_i = (r_i - \bar r) / (s + \epsilon)$, $\bar r$ of the group, $s$ of the whole batch (Lite PPO).

    $s$ is the unbiased standard deviation of all rewards as they came, not of the centered ones. Detached; no unit.
    Exactly 0 for a group without signal, whatever the batch; and for a response that could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.
        advantage_eps: $\epsilon$, in units of reward.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or `advantage_eps` is negative.

    Example:
        >>> compute_batch_std_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2, advantage_eps=0.0)
        tensor([ 1., -1.,  0.,  0.])

    References:
        Liu et al. 2025, arXiv:2508.08221 (Lite PPO: group mean, batch standard deviation).
    """
    _check_eps(advantage_eps)
    groups = split_groups(rewards, group_sizes)
    everything = groups.rewards[groups.scored]
    spread = everything.std() if len(everything) > 1 else everything.new_ones(())
    return groups.signal_as_rollouts((groups.rewards - groups.mean) / (spread + advantage_eps))


@shape_checked
def compute_gdpo_advantages(
    rewards: Float[Tensor, "rollout reward"],
    group_sizes: GroupSizes,
    *,
    reward_weights: list[float] | None = None,
    advantage_eps: float = 1e-4,
) -> Float[Tensor, " rollout"]:
    r"""$A = (S - \bar S) / (s + \epsilon)$ over the batch, $S_i = \sum_k w_k A_{ik}$: several rewards (GDPO).

    $A_{ik}$ is reward $k$ of response $i$, normalized within its group by `normalize_group_rewards`, so that a reward
    of large scale cannot drown another. Detached; no unit. A reward that could not be scored adds 0 to $S_i$; a
    response without any gets 0. Exactly 0 for a group without signal in any reward ($\bar S$ is 0 up to rounding, as
    each $A_{ik}$ sums to 0 in its group).

    Args:
        rewards: $r_{ik}$, group after group, one column for each reward; NaN or infinite where it could not be scored.
        group_sizes: $G$: one number, or one for each group.
        reward_weights: $w$, one for each reward; None weighs all by 1.
        advantage_eps: $\epsilon$ of both divisions.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, a group has 1 response, `advantage_eps` is negative, or
            there is not one weight per reward.

    Example:
        >>> compute_gdpo_advantages(torch.tensor([[1.0, 0.0], [0.0, 100.0]]), 2, reward_weights=[3.0, 1.0])
        tensor([ 0.7071, -0.7071])

    References:
        Liu et al. 2026, arXiv:2601.05242 (GDPO).
    """
    weights = [1.0] * rewards.shape[1] if reward_weights is None else reward_weights
    require(len(weights) == rewards.shape[1], "reward_weights", weights, f"{rewards.shape[1]} numbers, one per reward")
    columns = [normalize_group_rewards(column, group_sizes, advantage_eps=advantage_eps) for column in rewards.T]
    total = torch.stack([w * column.double() for w, column in zip(weights, columns, strict=True)]).sum(dim=0)
    scored = rewards.isfinite().any(dim=1)
    white = _whiten(total, scored, advantage_eps, correction=1)
    return torch.where(total == 0, 0.0, white).to(columns[0].dtype)


@shape_checked
def compute_opo_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, lengths: Int[Tensor, " rollout"]
) -> Float[Tensor, " rollout"]:
    r"""$A_i = r_i - \sum_j n_j r_j \big/ \sum_j n_j$ over the group (OPO): a baseline weighted by length.

    Of least variance if the squared gradient of a response grows with its length and the policy is the sampler's own.
    In units of reward; the length-weighted sum of a group is 0. Detached. Exactly 0 for a group without signal, for a
    response that could not be scored, and in a group whose scored responses are all empty.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.
        lengths: $n$, response tokens.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or a length is negative.

    Example:
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
    return groups.signal_as_rollouts(torch.where(total > 0, groups.rewards - baseline, 0.0))


@shape_checked
def compute_gpg_advantages(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Float[Tensor, " rollout"]:
    r"""$A_i = \frac{B}{B - M} (r_i - \bar r)$ (GPG): centered, and scaled up for the groups that teach nothing.

    $B$ counts the scored responses of the batch, $M$ those of them in groups without signal: the gradient has the
    size that it would have if all groups taught. In units of reward. Detached. Exactly 0 for a group without signal
    and for a response that could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Example:
        >>> compute_gpg_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 2)
        tensor([ 1., -1.,  0.,  0.])

    References:
        Chu et al. 2025, arXiv:2504.02546 (GPG).
    """
    groups = split_groups(rewards, group_sizes)
    teaching = (groups.n_scored * groups.has_signal).sum()
    scale = groups.n_scored.sum() / teaching.clamp(min=1)
    return groups.signal_as_rollouts(scale * (groups.rewards - groups.mean))


@shape_checked
def compute_maxrl_advantages(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Float[Tensor, " rollout"]:
    r"""$A_i = (r_i - \bar r) / \bar r$ (MaxRL): the rarer success is in the group, the more it weighs.

    For rewards of 0 and 1 the mean of $A_i \nabla \log \pi(o_i)$ has the gradient of $-\sum_{k=1}^{G-1} (1 - p)^k / k$
    as its expectation, the first terms of $\log p$, where $p$ is the probability of success. Detached; no unit.
    Exactly 0 for a group without signal (with no success among them) and for a response that could not be scored.

    Args:
        rewards: $r \ge 0$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or a reward is negative.

    Example:
        >>> compute_maxrl_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
        tensor([ 3., -1., -1., -1.])

    References:
        Tajwar et al. 2026, arXiv:2602.02710 (MaxRL).
    """
    groups = split_groups(rewards, group_sizes)
    if groups.rewards.numel() and groups.rewards.min() < 0:
        raise ValueError(
            f"rewards hold {groups.rewards.min().item()}: each must be at least 0, for their mean divides"
        )
    mean = torch.where(groups.has_signal, groups.mean, 1.0)
    return groups.signal_as_rollouts((groups.rewards - mean) / mean)


@shape_checked
def compute_remax_advantages(
    rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes, greedy_rewards: Float[Tensor, " group"]
) -> Float[Tensor, " rollout"]:
    r"""$A_i = r_i - r_{\text{greedy}}$ (ReMax): each response against the greedy one to the same question.

    In units of reward. Detached. The baseline does not depend on the samples, so a group of equal rewards has an
    advantage where the greedy response differs, and a group may have one member. Exactly 0 where the two differ by
    rounding alone, and where either could not be scored.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number, or one for each group.
        greedy_rewards: the reward of the greedy response to each question.

    Returns:
        The advantage of each response.

    Raises:
        ValueError: if the rollouts do not fill the groups, or there is not one greedy reward per group.

    Example:
        >>> compute_remax_advantages(torch.tensor([1.0, 0.0, 0.1]), [2, 1], torch.tensor([0.0, 0.1]))
        tensor([1., 0., 0.])

    References:
        Li et al. 2023, arXiv:2310.10505 (ReMax).
    """
    groups = split_groups(rewards, group_sizes)
    found, wanted = len(greedy_rewards), len(groups.rewards)
    require(found == wanted, "greedy_rewards", f"[{found} values]", f"one value for each of the {wanted} groups")
    baseline = greedy_rewards.detach().double()[:, None]
    difference = groups.rewards - baseline
    size = torch.maximum(groups.rewards.abs(), baseline.abs())
    return groups.as_rollouts(torch.where(difference.abs() > RELATIVE_NOISE * size, difference, 0.0).nan_to_num(0.0))


@shape_checked
def whiten_over_tokens(
    advantages: Advantages,
    response_mask: Bool[Tensor, "batch seq"],
    *,
    advantage_eps: float = 1e-8,
    correction: int = 1,
) -> Advantages:
    r"""$\hat A_{it} = (A_{it} - \mu) / (\sigma + \epsilon)$, $\mu$ and $\sigma$ over all response tokens of the batch.

    A response counts as often as it has tokens. Of rewards, this is the advantage of REINFORCE++; of rewards centered
    in their groups, that of REINFORCE++-baseline. Detached; no unit. Exactly 0 if all values are the same up to
    rounding, and outside the mask, where no value is read. Do it on the whole batch, before it is split.

    Args:
        advantages: $A$, one for each response (one column) or for each token.
        response_mask: True where a token belongs to the response.
        advantage_eps: $\epsilon$, in units of `advantages`.
        correction: 1 for the unbiased $\sigma$, 0 for that of a population.

    Returns:
        As many columns as `advantages` has.

    Raises:
        ValueError: if `advantage_eps` is negative, or `correction` is neither 0 nor 1.

    Example:
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
    if advantages.shape != white.shape:  # one value per response: that of any of its tokens, 0 if it has none
        white = white.sum(dim=1, keepdim=True) / response_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return white.to(torch.promote_types(advantages.dtype, torch.float32))


def _check_eps(advantage_eps: float) -> None:
    require(0 <= advantage_eps < math.inf, "advantage_eps", advantage_eps, "finite and at least 0")


def check_group_std(sizes: list[int], advantage_eps: float, normalize_by_std: bool) -> None:
    """Raise ValueError if `advantage_eps` is invalid, or a group of 1 is to be divided by its standard deviation."""
    _check_eps(advantage_eps)
    if normalize_by_std and 1 in sizes:
        raise ValueError(
            "a group of 1 response has no standard deviation: sample at least 2 per question, or set"
            " normalize_by_std=False"
        )


def _whiten(
    values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"], eps: float, correction: int
) -> Float[Tensor, "*shape"]:
    """Mean 0 and variance 1 over the counted entries; 0 elsewhere, and everywhere if they differ by rounding alone."""
    kept = values[counted]
    if len(kept) < 2 or kept.max() - kept.min() <= RELATIVE_NOISE * kept.abs().max():
        return torch.zeros_like(values)
    return torch.where(counted, (values - kept.mean()) / (kept.std(correction=correction) + eps), 0.0)
