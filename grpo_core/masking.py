"""Reductions over the entries that a boolean mask keeps; masked entries may hold NaN or infinity."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked


@shape_checked
def masked_sum(
    tensor: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    r"""Return $\sum_{j} m_j x_j$, the sum of the entries that the mask keeps, in their unit.

    Differentiable in `tensor`. Masked entries are never read: NaN or infinity there changes neither the sum nor the
    gradient, which is exactly 0 there. The sum over an empty selection is 0.

    Args:
        tensor: $x$, the values to sum.
        mask: $m$, True where a value counts.
        dim: the dimension to sum over; None sums over all dimensions.

    Returns:
        The sum, without dimension `dim`.

    Examples:
        >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    # torch.where instead of `tensor * mask`, because NaN * 0 and inf * 0 are NaN.
    kept = torch.where(mask, tensor, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


@shape_checked
def masked_mean(
    tensor: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    r"""Return $\sum_j m_j x_j \big/ \sum_j m_j$, the mean of the entries that the mask keeps, in their unit.

    Differentiable in `tensor`; the gradient is exactly 0 where the mask is False, even at NaN or infinity. The mean
    over an empty selection is NaN, like `tensor.mean()` of an empty tensor, so that a batch without responses is
    noticed. Use `aggregate_token_losses` to reduce batches that contain empty responses.

    Args:
        tensor: $x$, the values to average.
        mask: $m$, True where a value counts.
        dim: the dimension to average over; None averages over all dimensions.

    Returns:
        The mean, without dimension `dim`; NaN for each slice in which the mask keeps no entry.

    Examples:
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
    r"""Return $\frac{1}{C} \sum_j m_j x_j$, the sum of the entries that the mask keeps divided by a constant.

    Differentiable in `tensor`; the gradient is exactly 0 where the mask is False. If $C$ is the longest possible
    response, every token of every response has the same weight, as in Dr. GRPO. An empty selection gives 0.

    Args:
        tensor: $x$, the values to sum.
        mask: $m$, True where a value counts.
        normalize_constant: $C$, often a number of tokens; finite and not 0.
        dim: the dimension to sum over; None sums over all dimensions.

    Returns:
        The normalized sum, without dimension `dim`.

    Raises:
        ValueError: if `normalize_constant` is 0 or not finite.

    Examples:
        >>> masked_normalize(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.ones(2, 2).bool(), 4.0, dim=1)
        tensor([1., 3.])

    References:
        Liu et al. 2025, arXiv:2503.20783, section 3.1 (a constant instead of the response length).
    """
    if normalize_constant == 0 or not math.isfinite(normalize_constant):
        raise ValueError(f"normalize_constant={normalize_constant} must be finite and not 0: it divides the sum")
    return masked_sum(tensor, mask, dim) / normalize_constant
