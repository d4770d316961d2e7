"""Reductions over the entries that a boolean mask keeps, whatever the entries it hides may hold."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked


@shape_checked
def masked_sum(
    tensor: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    r"""$\sum_{j} m_j x_j$: sum of the entries that the mask keeps, in the unit of the entries.

    Differentiable in `tensor`. A hidden entry is never read: NaN or infinity there changes neither the sum nor the
    gradient, which is exactly 0 at that place. The sum over nothing is 0.

    Args:
        tensor: $x$, the values to add up.
        mask: $m$, True where a value counts.
        dim: the dimension to sum over; None sums over all of them.

    Returns:
        The sum, `tensor` without dimension `dim`.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    # Not `tensor * mask`: NaN * 0 is NaN, and so is inf * 0.
    kept = torch.where(mask, tensor, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


@shape_checked
def masked_mean(
    tensor: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    r"""$\sum_j m_j x_j \big/ \sum_j m_j$: mean of the entries that the mask keeps, in the unit of the entries.

    Differentiable in `tensor`; exactly 0 gradient where the mask is False, NaN and infinity there included. The mean
    over nothing is NaN, as `tensor.mean()` of nothing is: a hidden default would hide a batch without responses.
    `aggregate_token_losses` is the reduction that forgives an empty response.

    Args:
        tensor: $x$, the values to average.
        mask: $m$, True where a value counts.
        dim: the dimension to average over; None averages over all of them.

    Returns:
        The mean, `tensor` without dimension `dim`; NaN for each slice that the mask leaves empty.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]]), dim=1)
        tensor([2., nan])
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(tensor, mask, dim) / count


@shape_checked
def masked_normalize(
    tensor: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    normalize_constant: float = 1.0,
    dim: int | None = None,
) -> Float[Tensor, "*reduced"]:
    r"""$\frac{1}{C} \sum_j m_j x_j$: sum of the entries that the mask keeps, over a constant chosen by the caller.

    Differentiable in `tensor`; exactly 0 gradient where the mask is False. With $C$ the longest possible response,
    every token of every response weighs the same, as Dr. GRPO has it. Nothing kept gives 0.

    Args:
        tensor: $x$, the values to add up.
        mask: $m$, True where a value counts.
        normalize_constant: $C$, often a number of tokens; neither 0 nor NaN nor infinite.
        dim: the dimension to sum over; None sums over all of them.

    Returns:
        The sum over the constant, `tensor` without dimension `dim`.

    Raises:
        ValueError: if `normalize_constant` is 0 or not finite.

    Example:
        >>> masked_normalize(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.ones(2, 2).bool(), 4.0, dim=1)
        tensor([1., 3.])

    References:
        Liu et al. 2025, arXiv:2503.20783, section 3.1 (a constant in place of the length of the response).
    """
    if normalize_constant == 0 or not math.isfinite(normalize_constant):
        raise ValueError(f"normalize_constant={normalize_constant} must be finite and not 0: it divides the sum")
    return masked_sum(tensor, mask, dim) / normalize_constant
