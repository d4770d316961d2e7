"""Policy-gradient losses of single tokens: REINFORCE and the ratio, clipped or not. Nothing here reduces."""

from typing import TypeVar, assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core.losses._ratios import (
    clip_bounds,
    clip_surrogate,
    hide,
    hide_flags,
    hold,
    log_ratio_of,
    ratio_of,
    with_slope,
)
from grpo_core.types import Advantages, LossType, LossTypeName, Metadata

T = TypeVar("T")


@shape_checked
def compute_cross_entropy_loss(
    policy_log_probs: Float[Tensor, "batch seq"], *, response_mask: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    r"""$\ell_{it} = -\log \pi_\theta(o_{it})$: the loss of supervised fine-tuning, in nats.

    Differentiable in `policy_log_probs`: $-1$.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: where given, the loss is exactly 0 outside it, and nothing there is read.

    Returns:
        The loss of each token.

    Example:
        >>> compute_cross_entropy_loss(torch.tensor([[-0.5, -1.0]]))
        tensor([[0.5000, 1.0000]])
    """
    return -hide(policy_log_probs, response_mask)


@shape_checked
def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    r"""$\ell_{it} = -A_{it} \log \pi_\theta(o_{it})$: REINFORCE, whose gradient in the log-probability is $-A_{it}$.

    Differentiable in `policy_log_probs` alone.

    Args:
        raw_rewards_or_advantages: $A$, in units of reward (or of none): one column, or one for each token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: where given, the loss is exactly 0 outside it, and nothing there is read. Else prompt and
            padding tokens get a value too.

    Returns:
        The loss of each token.

    Example:
        >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-0.5, -1.0]]))
        tensor([[1., 2.]])

    References:
        Williams 1992, doi:10.1007/BF00992696, eq. 1.
    """
    return hide(-raw_rewards_or_advantages.detach() * hide(policy_log_probs, response_mask), response_mask)


@shape_checked
def compute_grpo_clip_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    cliprange: float,
    *,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""GRPO-Clip loss of each token: PPO's clipped surrogate with the advantage of its response.

    $$\ell_{it} = -\min\bigl(\rho_{it} A_i,\ \operatorname{clip}(\rho_{it}, 1-\epsilon, 1+\epsilon_h)\,A_i\bigr),
    \qquad \rho_{it} = \pi_\theta(o_{it}) / \pi_{\mathrm{old}}(o_{it})$$

    With `dual_clip` $c$, a token with $A_i < 0$ costs at most $-c A_i$: $\rho$ is cut at $c$ there too.

    Differentiable in `policy_log_probs` alone: $-\rho_{it} A_i$, and 0 where a clip lowered the objective. $\log \rho$
    is held within 20 nats in value; beyond, the gradient keeps its form with the $\rho$ of 20 nats.

    Args:
        advantages: $A$, no unit: one column, constant over the tokens of a response, or one for each token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, from the policy that sampled it.
        cliprange: $\epsilon \ge 0$, how far below 1 the ratio may fall.
        cliprange_high: $\epsilon_h \ge 0$, how far above 1 it may rise; None takes `cliprange`. DAPO has 0.2 and 0.28.
        dual_clip: $c > 1$; None leaves the ratio of a token with a negative advantage without an upper bound.
        response_mask: where given, the loss is exactly 0 outside it, and nothing there is read. Else prompt and
            padding tokens get a value too.

    Returns:
        The loss of each token, and where a clip lowered the objective, Bool "batch seq" each: `is_clipped_low`
        ($A < 0$, ratio under the lower bound), `is_clipped_high` ($A > 0$, over the upper one), `is_clipped` (any);
        with `dual_clip`, `is_clipped_dual`.

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN, or `dual_clip` not above 1.

    Example:
        >>> old = torch.tensor([[0.5, 0.5]])
        >>> losses, metadata = compute_grpo_clip_loss(
        ...     torch.tensor([[2.0]]), torch.tensor([[0.25, 1.0]]).log(), old.log(), 0.5
        ... )
        >>> losses, metadata["is_clipped"]
        (tensor([[-1., -3.]]), tensor([[False,  True]]))

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7; Shao et al. 2024, arXiv:2402.03300, eq. 3 without the KL term;
        Yu et al. 2025, arXiv:2503.14476, eq. 10 (two bounds); Ye et al. 2019, arXiv:1912.09729 (dual clip).
    """
    low, high = clip_bounds(cliprange, cliprange_high)
    if dual_clip is not None:
        require(dual_clip > 1, "dual_clip", dual_clip, "above 1: it bounds ratios where the advantage is negative")
    advantages = advantages.detach()
    if is_traced():
        ratio = hold(log_ratio_of(policy_log_probs, old_log_probs, response_mask)).exp()
        losses, flags = clip_surrogate(ratio, advantages, (low, high), dual_clip)
        return hide(losses, response_mask), hide_flags(flags, response_mask)
    with torch.no_grad():
        ratio = ratio_of(policy_log_probs, old_log_probs)
        # The minimum of both surrogates is one, of a ratio with the bound that lowers it: from below where A < 0.
        lower = torch.full_like(advantages, -torch.inf, dtype=ratio.dtype).masked_fill_(advantages < 0, low)
        upper = torch.full_like(advantages, torch.inf, dtype=ratio.dtype).masked_fill_(advantages > 0, high)
        flags = {"is_clipped_low": ratio < lower, "is_clipped_high": ratio > upper}
        flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
        if dual_clip is not None:
            flags["is_clipped_dual"] = (ratio > dual_clip) & (advantages < 0)
            flags["is_clipped"] |= flags["is_clipped_dual"]
            upper.masked_fill_(advantages < 0, dual_clip)
        losses = torch.maximum(ratio, lower)
        torch.minimum(losses, upper, out=losses).mul_(-advantages)
        slope = ratio.mul_(-advantages).mul_(~flags["is_clipped"])
        if response_mask is not None:
            losses.masked_fill_(~response_mask, 0)
            slope.masked_fill_(~response_mask, 0)
    return with_slope(losses, slope, policy_log_probs), hide_flags(flags, response_mask)


@shape_checked
def compute_grpo_no_clip_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""GRPO loss of each token, unclipped: $\ell_{it} = -\rho_{it} A_i$, $\rho = \pi_\theta / \pi_{\mathrm{old}}$.

    Differentiable in `policy_log_probs` alone: $-\rho_{it} A_i$, $\log \rho$ held within 20 nats in value. For the
    ablation of the clip: nothing bounds how far an update moves the policy.

    Args:
        advantages: $A$, no unit: one column, or one for each token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, from the policy that sampled it.
        response_mask: where given, the loss is exactly 0 outside it, and nothing there is read.

    Returns:
        The loss of each token, and no metadata.

    Example:
        >>> old = torch.tensor([[0.5, 0.5]])
        >>> compute_grpo_no_clip_loss(torch.tensor([[2.0]]), torch.tensor([[0.25, 1.0]]).log(), old.log())
        (tensor([[-1., -4.]]), {})

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    if is_traced():
        ratio = hold(log_ratio_of(policy_log_probs, old_log_probs, response_mask)).exp()
        return hide(ratio * -advantages.detach(), response_mask), {}
    with torch.no_grad():
        losses = ratio_of(policy_log_probs, old_log_probs) * -advantages.detach()
        losses = hide(losses, response_mask)
    # The ratio is its own derivative.
    return with_slope(losses, losses.clone(), policy_log_probs), {}


@shape_checked
def compute_policy_gradient_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    loss_type: LossTypeName,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""$\ell_{it}$ of the chosen objective: one door to the losses of this file.

    Differentiable in `policy_log_probs` alone. What the chosen loss does not need is not looked at.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        loss_type: "no_baseline" ($-r_i \log \pi_\theta$), "reinforce_with_baseline" ($-A_i \log \pi_\theta$),
            "grpo_clip" or "grpo_no_clip".
        raw_rewards: $r_i$, for "no_baseline".
        advantages: $A_i$, for the other three.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, for the two GRPO losses.
        cliprange: $\epsilon$, for "grpo_clip".
        response_mask: where given, the loss is exactly 0 outside it, and nothing there is read.

    Returns:
        The loss of each token, and the metadata of the chosen loss.

    Raises:
        ValueError: if `loss_type` is none of the four, or an argument that it needs is None.

    Example:
        >>> compute_policy_gradient_loss(torch.tensor([[-0.5]]), "no_baseline", raw_rewards=torch.tensor([[1.0]]))
        (tensor([[0.5000]]), {})
    """
    check_choice("loss_type", loss_type, LossType)
    match loss_type:
        case "no_baseline":
            raw_rewards = _required(raw_rewards, "raw_rewards", loss_type)
            return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs, response_mask=response_mask), {}
        case "reinforce_with_baseline":
            advantages = _required(advantages, "advantages", loss_type)
            return compute_naive_policy_gradient_loss(advantages, policy_log_probs, response_mask=response_mask), {}
        case "grpo_clip":
            advantages = _required(advantages, "advantages", loss_type)
            old_log_probs = _required(old_log_probs, "old_log_probs", loss_type)
            cliprange = _required(cliprange, "cliprange", loss_type)
            return compute_grpo_clip_loss(
                advantages, policy_log_probs, old_log_probs, cliprange, response_mask=response_mask
            )
        case "grpo_no_clip":
            advantages = _required(advantages, "advantages", loss_type)
            old_log_probs = _required(old_log_probs, "old_log_probs", loss_type)
            return compute_grpo_no_clip_loss(advantages, policy_log_probs, old_log_probs, response_mask=response_mask)
        case _:  # pragma: no cover - mypy shows that nothing is left
            assert_never(loss_type)


def _required(value: T | None, name: str, loss_type: str) -> T:
    if value is None:
        raise ValueError(f"loss_type={loss_type!r} needs {name}; got None")
    return value
