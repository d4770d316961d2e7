"""Token losses: cross-entropy, REINFORCE and the clipped or unclipped ratio. No function here reduces."""

import sys
from typing import TypeVar, assert_never, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core.losses._ratios import (
    attach_gradient,
    clamp_log_ratio,
    compute_clip_surrogate,
    compute_detached_ratio,
    compute_log_ratio,
    mask_flags,
    resolve_clip_bounds,
    zero_outside_mask,
)
from grpo_core.tensor_types import Advantages, Metadata
from grpo_core.types import LossType, LossTypeName

T = TypeVar("T")


@shape_checked
def compute_cross_entropy_loss(
    policy_log_probs: Float[Tensor, "batch seq"], *, response_mask: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    r"""Return $\ell_{it} = -\log \pi_\theta(o_{it})$, the loss of supervised fine-tuning, in nats.

    Differentiable in `policy_log_probs`, with gradient $-1$.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token.

    Examples:
        >>> compute_cross_entropy_loss(torch.tensor([[-0.5, -1.0]]))
        tensor([[0.5000, 1.0000]])
    """
    return -zero_outside_mask(policy_log_probs, response_mask)


@shape_checked
def compute_naive_policy_gradient_loss(
    raw_rewards_or_advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    r"""Return $\ell_{it} = -A_{it} \log \pi_\theta(o_{it})$, the REINFORCE loss of each token.

    Differentiable in `policy_log_probs` only, with gradient $-A_{it}$.

    Args:
        raw_rewards_or_advantages: $A$, in units of reward or unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read; otherwise prompt and
            padding tokens get a loss too.

    Returns:
        The loss of each token.

    Examples:
        >>> compute_naive_policy_gradient_loss(torch.tensor([[2.0]]), torch.tensor([[-0.5, -1.0]]))
        tensor([[1., 2.]])

    References:
        Williams 1992, doi:10.1007/BF00992696, eq. 1.
    """
    losses = -raw_rewards_or_advantages.detach() * zero_outside_mask(policy_log_probs, response_mask)
    return zero_outside_mask(losses, response_mask)


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
    r"""Return the GRPO-Clip loss of each token: PPO's clipped surrogate with the advantage of its response.

    $$\ell_{it} = -\min\bigl(\rho_{it} A_i,\ \operatorname{clip}(\rho_{it}, 1-\epsilon, 1+\epsilon_h)\,A_i\bigr),
    \qquad \rho_{it} = \pi_\theta(o_{it}) / \pi_{\mathrm{old}}(o_{it})$$

    With `dual_clip` $c$, the loss of a token with $A_i < 0$ is at most $-c A_i$, because $\rho$ is also clipped at
    $c$.

    Differentiable in `policy_log_probs` only: the gradient is $-\rho_{it} A_i$, and 0 where a clip is active. The
    value of $\log \rho$ is clamped to 20 nats; beyond that, the gradient uses the clamped $\rho$.

    Args:
        advantages: $A$, unitless: one column, constant over the tokens of a response, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        cliprange: $\epsilon \ge 0$, the distance of the lower bound from 1.
        cliprange_high: $\epsilon_h \ge 0$, the distance of the upper bound from 1; None uses `cliprange`. DAPO uses
            0.2 and 0.28.
        dual_clip: $c > 1$; None sets no upper bound on the ratio of tokens with a negative advantage.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read; otherwise prompt and
            padding tokens get a loss too.

    Returns:
        The loss of each token, and flags of the active clips, each Bool "batch seq": `is_clipped_low` ($A < 0$ and the
        ratio below the lower bound), `is_clipped_high` ($A > 0$ and the ratio above the upper bound),
        `is_clipped_dual` (only with `dual_clip`) and `is_clipped` (any of them).

    Raises:
        ValueError: if `cliprange` or `cliprange_high` is negative or NaN, or `dual_clip` is not above 1.

    Examples:
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
    low, high = resolve_clip_bounds(cliprange, cliprange_high)
    if dual_clip is not None:
        require(dual_clip > 1, "dual_clip", dual_clip, "above 1: it bounds ratios where the advantage is negative")
    advantages = advantages.detach()
    if is_traced():
        ratio = clamp_log_ratio(compute_log_ratio(policy_log_probs, old_log_probs, response_mask)).exp()
        losses, flags = compute_clip_surrogate(ratio, advantages, (low, high), dual_clip)
        return zero_outside_mask(losses, response_mask), mask_flags(flags, response_mask)
    with torch.no_grad():
        ratio = compute_detached_ratio(policy_log_probs, old_log_probs)
        # Clamping the ratio to one bound gives the minimum of both surrogates: the lower bound where A < 0, else the
        # upper.
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
    return attach_gradient(losses, slope, policy_log_probs), mask_flags(flags, response_mask)


@shape_checked
def compute_grpo_no_clip_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\rho_{it} A_i$, $\rho = \pi_\theta / \pi_{\mathrm{old}}$, the unclipped GRPO loss.

    Differentiable in `policy_log_probs` only: the gradient is $-\rho_{it} A_i$, with the value of $\log \rho$ clamped
    to 20 nats. It serves to ablate the clip: no bound limits how far an update moves the policy.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and empty metadata.

    Examples:
        >>> old = torch.tensor([[0.5, 0.5]])
        >>> compute_grpo_no_clip_loss(torch.tensor([[2.0]]), torch.tensor([[0.25, 1.0]]).log(), old.log())
        (tensor([[-1., -4.]]), {})

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    if is_traced():
        ratio = clamp_log_ratio(compute_log_ratio(policy_log_probs, old_log_probs, response_mask)).exp()
        return zero_outside_mask(ratio * -advantages.detach(), response_mask), {}
    with torch.no_grad():
        losses = compute_detached_ratio(policy_log_probs, old_log_probs) * -advantages.detach()
        losses = zero_outside_mask(losses, response_mask)
    # The derivative of the ratio in the log-probability is the ratio itself.
    return attach_gradient(losses, losses.clone(), policy_log_probs), {}


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
    r"""Return the loss $\ell_{it}$ of each token for the objective named by `loss_type`.

    Differentiable in `policy_log_probs` only. Arguments that the chosen loss does not need are ignored.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        loss_type: "no_baseline" ($-r_i \log \pi_\theta$), "reinforce_with_baseline" ($-A_i \log \pi_\theta$),
            "grpo_clip" or "grpo_no_clip".
        raw_rewards: $r_i$, required by "no_baseline".
        advantages: $A_i$, required by the other three. NaN is not refused, because a check would wait for the GPU at
            each call: the loss is NaN then.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, required by the two GRPO losses.
        cliprange: $\epsilon$, required by "grpo_clip".
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and the metadata of the chosen loss.

    Raises:
        ValueError: if `loss_type` is unknown, or an argument that it requires is None.

    Examples:
        >>> compute_policy_gradient_loss(torch.tensor([[-0.5]]), "no_baseline", raw_rewards=torch.tensor([[1.0]]))
        (tensor([[0.5000]]), {})
    """
    if loss_type not in get_args(LossType):
        _refer_to_function(loss_type)
    check_choice("loss_type", loss_type, LossType)
    match loss_type:
        case "no_baseline":
            raw_rewards = _require_argument(raw_rewards, "raw_rewards", loss_type)
            return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs, response_mask=response_mask), {}
        case "reinforce_with_baseline":
            advantages = _require_argument(advantages, "advantages", loss_type)
            return compute_naive_policy_gradient_loss(advantages, policy_log_probs, response_mask=response_mask), {}
        case "grpo_clip":
            advantages = _require_argument(advantages, "advantages", loss_type)
            old_log_probs = _require_argument(old_log_probs, "old_log_probs", loss_type)
            cliprange = _require_argument(cliprange, "cliprange", loss_type)
            return compute_grpo_clip_loss(
                advantages, policy_log_probs, old_log_probs, cliprange, response_mask=response_mask
            )
        case "grpo_no_clip":
            advantages = _require_argument(advantages, "advantages", loss_type)
            old_log_probs = _require_argument(old_log_probs, "old_log_probs", loss_type)
            return compute_grpo_no_clip_loss(advantages, policy_log_probs, old_log_probs, response_mask=response_mask)
        case _:  # pragma: no cover - mypy proves that the cases are exhaustive
            assert_never(loss_type)


def _refer_to_function(loss_type: str) -> None:
    """Raise ValueError if the name is that of an objective with its own function."""
    name = f"compute_{loss_type}_loss"
    if hasattr(sys.modules["grpo_core"], name):  # the public names, which this module cannot import
        raise ValueError(
            f"loss_type={loss_type!r} must be one of {', '.join(get_args(LossType))}: call {name} for this objective, "
            "and compose_policy_loss with its losses"
        )


def _require_argument(value: T | None, name: str, loss_type: str) -> T:
    if value is None:
        raise ValueError(f"loss_type={loss_type!r} needs {name}; got None")
    return value
