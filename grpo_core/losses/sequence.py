"""Losses with a ratio or weight of the whole response. No function here reduces over responses."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core.losses._ratios import (
    clamp_log_ratio,
    compute_clip_surrogate,
    compute_log_ratio,
    mask_flags,
    mean_over_response,
    resolve_clip_bounds,
    zero_outside_mask,
)
from grpo_core.tensor_types import Advantages, Metadata


@shape_checked
def compute_gspo_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    cliprange: float,
    *,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch 1"], Metadata]:
    r"""Return $\ell_i = -\min\bigl(s_i A_i, \operatorname{clip}(s_i, 1-\epsilon, 1+\epsilon_h) A_i\bigr)$ (GSPO).

    $s_i = \exp \frac{1}{\lvert o_i \rvert} \sum_t \log \rho_{it}$ is the geometric mean of the token ratios of a
    response. There is one loss per response, to be weighted with `compute_sequence_weights`. Differentiable in
    `policy_log_probs` only: the gradient is $-s_i A_i / \lvert o_i \rvert$ for each token of a response that is not
    clipped, else 0. The value of the mean log ratio is clamped to 20 nats. The loss of a response without tokens is 0,
    and no value outside the mask is read.

    Args:
        advantages: $A_i$, unitless.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to the response.
        cliprange: $\epsilon \ge 0$. The mean varies much less than the ratio of a token, so the paper uses 0.0003, a
            thousandth of PPO's.
        cliprange_high: $\epsilon_h \ge 0$; None uses `cliprange`. The paper uses 0.0004.

    Returns:
        The loss of each response, and Bool "batch 1" each: `is_clipped_low`, `is_clipped_high` and `is_clipped`, where
        a bound was active.

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN.

    Examples:
        >>> policy, old, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2).bool()
        >>> compute_gspo_loss(torch.ones(1, 1), policy, old, mask, 3e-4)[0]
        tensor([[-1.]])

    References:
        Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7.
    """
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask)
    response_ratio = clamp_log_ratio(mean_over_response(log_ratio, response_mask)).exp()
    bounds = resolve_clip_bounds(cliprange, cliprange_high)
    losses, flags = compute_clip_surrogate(response_ratio, advantages.detach(), bounds)
    has_tokens = response_mask.any(dim=1, keepdim=True)
    return torch.where(has_tokens, losses, 0.0), {name: flag & has_tokens for name, flag in flags.items()}


@shape_checked
def compute_gspo_token_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    cliprange: float,
    *,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\min(s_{it} A_{it}, \operatorname{clip}(s_{it}, 1-\epsilon, 1+\epsilon_h) A_{it})$.

    In GSPO-token, $s_{it} = \operatorname{sg}[s_i]\, \pi_\theta / \operatorname{sg}[\pi_\theta]$ distributes the ratio
    of the response over its tokens, so that each token can have a different advantage. With one advantage per response
    and sequence_mean, value and gradient are those of `compute_gspo_loss`. Differentiable in `policy_log_probs` only:
    the gradient is $-s_i A_{it}$, and 0 where clipped. The mean log ratio is clamped to 20 nats. Exactly 0 outside the
    mask, where no value is read.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to the response.
        cliprange: $\epsilon \ge 0$; the paper uses 0.0003.
        cliprange_high: $\epsilon_h \ge 0$; None uses `cliprange`. The paper uses 0.0004.

    Returns:
        The loss of each token, and Bool "batch seq" each: `is_clipped_low`, `is_clipped_high` and `is_clipped`, where
        a bound was active.

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN.

    Examples:
        >>> policy, old, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2).bool()
        >>> compute_gspo_token_loss(torch.tensor([[1.0, -2.0]]), policy, old, mask, 3e-4)[0]
        tensor([[-1.,  2.]])

    References:
        Zheng et al. 2025, arXiv:2507.18071, eq. 13 and 14.
    """
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask)
    policy = zero_outside_mask(policy_log_probs, response_mask)
    response_ratio = clamp_log_ratio(mean_over_response(log_ratio.detach(), response_mask)).exp()
    ratio = response_ratio * (policy - policy.detach()).exp()
    losses, flags = compute_clip_surrogate(ratio, advantages.detach(), resolve_clip_bounds(cliprange, cliprange_high))
    return zero_outside_mask(losses, response_mask), mask_flags(flags, response_mask)


@shape_checked
def compute_gmpo_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    cliprange: float,
    *,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch 1"], Metadata]:
    r"""Return $\ell_i = -A_i \exp \frac{1}{\lvert o_i \rvert} \sum_t z_{it}$, the mean of clipped log ratios (GMPO).

    $z = \min(\log \rho, \epsilon_h)$ if $A > 0$, and $\max(\log \rho, -\epsilon)$ if $A < 0$: each log ratio is
    clipped in the direction of its advantage before the geometric mean is taken. There is one loss per response, to be
    weighted with `compute_sequence_weights`. Differentiable in `policy_log_probs` only: the gradient is $-e^{\bar z_i}
    A_i / \lvert o_i \rvert$ for each token that is not clipped. The value of the mean is clamped to 20 nats. The loss
    of a response without tokens is 0, and no value outside the mask is read.

    Args:
        advantages: $A_i$, unitless.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to the response.
        cliprange: $\epsilon \ge 0$, in nats; the paper uses 0.4.
        cliprange_high: $\epsilon_h \ge 0$, in nats; None uses `cliprange`.

    Returns:
        The loss of each response, and Bool "batch seq" each: `is_clipped_low`, `is_clipped_high` and `is_clipped`,
        where the log ratio of a token was clipped.

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN.

    Examples:
        >>> policy, old, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.6]]), torch.ones(1, 2).bool()
        >>> compute_gmpo_loss(torch.ones(1, 1), policy, old, mask, 0.4)[0]
        tensor([[-1.]])

    References:
        Zhao et al. 2025, arXiv:2507.20673 (GMPO).
    """
    low, high = resolve_clip_bounds(cliprange, cliprange_high, center=0.0)
    advantages = advantages.detach()
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask)
    flags = {
        "is_clipped_low": (log_ratio < low) & (advantages < 0),
        "is_clipped_high": (log_ratio > high) & (advantages > 0),
    }
    flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
    clipped = torch.where(flags["is_clipped_low"], low, torch.where(flags["is_clipped_high"], high, log_ratio))
    losses = -clamp_log_ratio(mean_over_response(clipped, response_mask)).exp() * advantages
    return torch.where(response_mask.any(dim=1, keepdim=True), losses, 0.0), mask_flags(flags, response_mask)


@shape_checked
def compute_luspo_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    cliprange: float,
    *,
    cliprange_high: float | None = None,
) -> tuple[Float[Tensor, "batch 1"], Metadata]:
    r"""Return $\ell_i = \lvert o_i \rvert\, \ell_i^{\mathrm{GSPO}}$, GSPO scaled by the response length (LUSPO).

    There is one loss per response, to be weighted with `compute_sequence_weights`. Differentiable in
    `policy_log_probs` only: the gradient is $-s_i A_i$ for each token of a response that is not clipped, else 0. In
    all other respects it behaves like `compute_gspo_loss`.

    Args:
        advantages: $A_i$, unitless.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to the response.
        cliprange: $\epsilon \ge 0$; the paper uses 0.002.
        cliprange_high: $\epsilon_h \ge 0$; None uses `cliprange`. The paper uses 0.0025.

    Returns:
        The loss of each response, and the flags of `compute_gspo_loss`.

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN.

    Examples:
        >>> policy, old, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2).bool()
        >>> compute_luspo_loss(torch.ones(1, 1), policy, old, mask, 2e-3)[0]
        tensor([[-2.]])

    References:
        Liu et al. 2026, arXiv:2602.05261 (LUSPO).
    """
    losses, flags = compute_gspo_loss(
        advantages, policy_log_probs, old_log_probs, response_mask, cliprange, cliprange_high=cliprange_high
    )
    return losses * response_mask.sum(dim=1, keepdim=True), flags


@shape_checked
def compute_vespo_loss(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\operatorname{sg}[\varphi(W_i)] A_i \log \pi_\theta(o_{it})$ (VESPO).

    $\varphi(W) = W^k e^{\lambda (1 - W)}$ with the response ratio $W_i = \prod_t \rho_{it}$, a product instead of a
    mean. This is REINFORCE with a weight that is 1 at $W = 1$, has its maximum at $W = k / \lambda$ and falls off
    smoothly on both sides. Differentiable in `policy_log_probs` only: the gradient is $-\varphi A$. $\log W$ is
    clamped to 20 nats. Exactly 0 outside the mask, where no value is read.

    Args:
        advantages: $A_i$, unitless.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats; use those that the sampler reported, if they
            differ.
        response_mask: True where a token belongs to the response.
        positive: $(k, \lambda)$ where $A \ge 0$.
        negative: $(k, \lambda)$ where $A < 0$.

    Returns:
        The loss of each token, and no metadata: nothing is clipped.

    Examples:
        >>> policy, old, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2).bool()
        >>> compute_vespo_loss(torch.ones(1, 1), policy, old, mask)[0]
        tensor([[1., 2.]])

    References:
        Shen et al. 2026, arXiv:2602.10693 (VESPO).
    """
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask).detach()
    log_weight = clamp_log_ratio(log_ratio.sum(dim=1, keepdim=True))
    advantages = advantages.detach()
    power, decay = (
        torch.full_like(log_weight, above).masked_fill(advantages < 0, below)
        for above, below in zip(positive, negative, strict=True)
    )
    weight = (power * log_weight + decay * (1 - log_weight.exp())).exp() * advantages
    return zero_outside_mask(-weight * zero_outside_mask(policy_log_probs, response_mask), response_mask), {}
