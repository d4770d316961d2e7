"""Ratios of probabilities, from their logarithms."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._check import require
from grpo_core.types import Metadata

# exp(20) is 5e8: far outside any trust region, and far inside float32.
LARGEST_LOG_RATIO = 20.0


def hold(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`log_ratio`, its value held within 20 nats; its gradient is not cut: a ratio far out still pulls back."""
    # Infinities made finite first: inf - inf is NaN. Then a difference that is exactly 0, and carries the gradient.
    finite = log_ratio.clamp(torch.finfo(log_ratio.dtype).min, torch.finfo(log_ratio.dtype).max)
    return finite.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).detach() + (finite - finite.detach())


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


def mean_over_row(values: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch 1"]:
    """Mean over the tokens of each response, of `values` that are 0 elsewhere; 0 for a response without tokens."""
    return values.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def clip_bounds(cliprange: float, cliprange_high: float | None, center: float = 1.0) -> tuple[float, float]:
    """The interval in which a ratio counts; around 0 for a log ratio."""
    high = cliprange if cliprange_high is None else cliprange_high
    for name, value in (("cliprange", cliprange), ("cliprange_high", high)):
        require(value >= 0, name, value, "at least 0: it is the distance of a bound from the middle")
    return center - cliprange, center + high


def hide_flags(flags: Metadata, mask: Bool[Tensor, "batch seq"] | None) -> Metadata:
    """False outside the mask."""
    return flags if mask is None else {name: flag & mask for name, flag in flags.items()}
