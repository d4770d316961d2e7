"""Ratios of probabilities computed from log-probabilities, and helpers of the losses that use them."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import is_traced, require
from grpo_core.tensor_types import Metadata

# exp(20) is 5e8, far outside any trust region and far inside the range of float32.
MAX_LOG_RATIO = 20.0
# Keeps the logarithm of 1 - p finite where p rounds to 1.
_EPS = 1e-8


def clamp_log_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp the value of `log_ratio` to 20 nats but keep its gradient, so that an extreme ratio is still corrected."""
    clamped = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if is_traced():
        # The difference is exactly 0 and carries the gradient. It must be finite, because inf - inf is NaN.
        finite = log_ratio.nan_to_num()
        return clamped + (finite - finite.detach())
    return attach_gradient(clamped, None, log_ratio)


def attach_gradient(
    values: Float[Tensor, "*shape"], slope: Float[Tensor, "*shape"] | None, of: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return `values` with `slope` (1 if None) as their elementwise derivative in `of`; `values` must be a new tensor.

    With a known derivative, autograd need not save the intermediate results of the formula. Use it in eager mode only:
    traced code needs the plain formula, which also has a second derivative and a forward mode.
    """
    if not (torch.is_grad_enabled() and of.requires_grad):
        return values
    return _AttachGradient.apply(values, slope, of)  # type: ignore[no-any-return, no-untyped-call]


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slope: Tensor | None, _: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        # Return `values` itself instead of a view, which callers could not modify in place.
        ctx.mark_dirty(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, gradient if slope is None else gradient * slope


def zero_outside_mask(
    values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None
) -> Float[Tensor, "batch seq"]:
    """Return 0 outside the mask. Apply it before any arithmetic: masking later would leave NaN * 0 in the gradient."""
    return values if mask is None else torch.where(mask, values, 0.0)


def compute_log_ratio(
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    r"""Return $\log \rho$, 0 outside the mask and differentiable in `policy_log_probs` only."""
    return zero_outside_mask(policy_log_probs, mask) - zero_outside_mask(old_log_probs.detach(), mask)


@torch.no_grad()
def compute_detached_ratio(
    policy_log_probs: Float[Tensor, "batch seq"], old_log_probs: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Return the clamped ratio of every token without a gradient; callers mask the result."""
    return (policy_log_probs - old_log_probs).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp_()


def compute_binary_kl(
    policy_log_probs: Float[Tensor, "batch seq"], old_log_probs: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    r"""Return $\mathrm{KL}(p_{\mathrm{old}} \Vert p)$ of the two outcomes "this token" and "any other token"."""
    p, p_old = policy_log_probs.exp(), old_log_probs.exp()
    others = (1 - p_old) * ((1 - p_old + _EPS) / (1 - p + _EPS)).log()
    return p_old * (old_log_probs - policy_log_probs) + others


def mean_over_response(
    values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch 1"]:
    """Return the mean of each response over its tokens (0 without tokens); `values` must be 0 outside the mask."""
    return values.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def resolve_clip_bounds(cliprange: float, cliprange_high: float | None, center: float = 1.0) -> tuple[float, float]:
    """Return the lower and upper bound of a ratio around `center`: 1, or 0 for log ratios."""
    high = cliprange if cliprange_high is None else cliprange_high
    for name, value in (("cliprange", cliprange), ("cliprange_high", high)):
        require(value >= 0, name, value, "at least 0: it is the distance of a bound from the center")
    return center - cliprange, center + high


def compute_clip_surrogate(
    ratio: Float[Tensor, "batch cols"],
    advantages: Float[Tensor, "batch _"],
    bounds: tuple[float, float],
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "batch cols"], Metadata]:
    """Return the loss of PPO's pessimistic minimum and flags of where the bound was active."""
    low, high = bounds
    flags = {"is_clipped_low": (ratio < low) & (advantages < 0), "is_clipped_high": (ratio > high) & (advantages > 0)}
    flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        flags["is_clipped_dual"] = (ratio > dual_clip) & (advantages < 0)
        flags["is_clipped"] = flags["is_clipped"] | flags["is_clipped_dual"]
        objective = torch.where(flags["is_clipped_dual"], dual_clip * advantages, objective)
    return -objective, flags


def mask_flags(flags: Metadata, mask: Bool[Tensor, "batch seq"] | None) -> Metadata:
    """Set every flag to False outside the mask."""
    return flags if mask is None else {name: flag & mask for name, flag in flags.items()}
