"""Ratios of probabilities, from their logarithms."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import is_traced, require
from grpo_core.types import Metadata

# exp(20) is 5e8: far outside any trust region, and far inside float32.
LARGEST_LOG_RATIO = 20.0


def hold(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log_ratio`, its value held within 20 nats; its gradient is not cut: a ratio far out still pulls back."""
    held = log_ratio.detach().clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    if is_traced():
        # Made finite first, for inf - inf is NaN. Then a difference that is exactly 0, and carries the gradient.
        finite = log_ratio.nan_to_num()
        return held + (finite - finite.detach())
    return with_slope(held, None, log_ratio)


def with_slope(
    values: Float[Tensor, "*shape"], slope: Float[Tensor, "*shape"] | None, of: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """`values`, whose derivative in `of`, entry by entry, is `slope`: 1 where it is None. `values` must be fresh.

    Where a formula and its derivative are both known, a tape of its intermediate results is not needed. Eager alone:
    those who trace take the formula itself, which has a second derivative and a forward mode too.
    """
    if not (torch.is_grad_enabled() and of.requires_grad):
        return values
    return _WithSlope.apply(values, slope, of)  # type: ignore[no-any-return, no-untyped-call]


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, slope: Tensor | None, _: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        # Handed on as it is: a view could not be changed in place by those who get it.
        ctx.mark_dirty(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, None, gradient if slope is None else gradient * slope


def hide(values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None) -> Float[Tensor, "batch seq"]:
    """0 outside the mask, before any arithmetic: masked later, NaN * 0 would come back in the gradient."""
    return values if mask is None else torch.where(mask, values, 0.0)


def log_ratio_of(
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Differentiable in the policy alone; 0 outside the mask."""
    return hide(policy_log_probs, mask) - hide(old_log_probs.detach(), mask)


@torch.no_grad()
def ratio_of(
    policy_log_probs: Float[Tensor, "batch seq"], old_log_probs: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """The ratio itself, without a gradient and of every token: what lies outside a mask is hidden in the result."""
    return (policy_log_probs - old_log_probs).clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp_()


def mean_over_row(values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch 1"]:
    """Mean over the tokens of each response, of `values` that are 0 elsewhere; 0 for a response without tokens."""
    return values.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def clip_bounds(cliprange: float, cliprange_high: float | None, center: float = 1.0) -> tuple[float, float]:
    """The interval in which a ratio counts; around 0 for a log ratio."""
    high = cliprange if cliprange_high is None else cliprange_high
    for name, value in (("cliprange", cliprange), ("cliprange_high", high)):
        require(value >= 0, name, value, "at least 0: it is the distance of a bound from the middle")
    return center - cliprange, center + high


def clip_surrogate(
    ratio: Float[Tensor, "batch cols"],
    advantages: Float[Tensor, "batch _"],
    bounds: tuple[float, float],
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "batch cols"], Metadata]:
    """PPO's pessimistic minimum, and where it chose the bound."""
    low, high = bounds
    flags = {"is_clipped_low": (ratio < low) & (advantages < 0), "is_clipped_high": (ratio > high) & (advantages > 0)}
    flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if dual_clip is not None:
        flags["is_clipped_dual"] = (ratio > dual_clip) & (advantages < 0)
        flags["is_clipped"] = flags["is_clipped"] | flags["is_clipped_dual"]
        objective = torch.where(flags["is_clipped_dual"], dual_clip * advantages, objective)
    return -objective, flags


def hide_flags(flags: Metadata, mask: Bool[Tensor, "batch seq"] | None) -> Metadata:
    """False outside the mask."""
    return flags if mask is None else {name: flag & mask for name, flag in flags.items()}
