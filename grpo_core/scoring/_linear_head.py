"""The output layer of a language model: blocks of logits, and gradients from theirs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core.scoring._softmax_stats import Scaling, Statistics, slices, turn_into_gradient, wide_type

# Past a thousand rows a matrix product is no faster.
_BLOCK_ROWS = 1024


class Head(NamedTuple):
    """$W h + b$, how it becomes the argument of a softmax, and how much of it may stand at once."""

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None
    scaling: Scaling
    max_logits_bytes: int

    def _rows_that_fit(self) -> int:
        dtype = wide_type(self.weight) if self.weight.is_cuda else self.weight.dtype
        return self.max_logits_bytes // (len(self.weight) * dtype.itemsize)

    def fits(self, tokens: int) -> bool:
        """Whether the logits of so many tokens may stand at once."""
        return tokens <= self._rows_that_fit()

    def blocks(self, tokens: int) -> Iterator[slice]:
        """Rows whose logits are made by one matrix product: all of them if they fit."""
        rows = tokens if self.fits(tokens) else min(_BLOCK_ROWS, self._rows_that_fit())
        return slices(tokens, max(1, rows)) if tokens else iter([slice(0, 0)])

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocab"]:
        """$W h + b$ in the precision of a matrix product; on CUDA that of its sums."""
        product = _wide_product(hidden, self.weight.t()) if hidden.is_cuda else hidden @ self.weight.t()
        return product if self.bias is None else product.add_(self.bias)


class GradientSums:
    """$dH$, $dW$ and $db$ of one block of logits after the other; sums over blocks are wide."""

    def __init__(self, head: Head, hidden: Float[Tensor, "tokens width"], needed: tuple[bool, bool, bool]) -> None:
        self._head, self._hidden, self._needed = head, hidden, needed
        # Weights of a step divide by its tokens, and what they leave of float16 a loss scale must still find.
        self._narrow = hidden.dtype == torch.float16
        self._of_hidden: list[Tensor] = []
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None

    def add(
        self,
        rows: slice,
        weights: Float[Tensor, "rows vocab"],
        labels: Int[Tensor, " rows"],
        told: Statistics,
        by_log_prob: Float[Tensor, "rows 1"] | None,
        by_entropy: Float[Tensor, "rows 1"] | None,
    ) -> None:
        """The block of these rows, whose weights are overwritten."""
        if not any(self._needed):
            return
        largest = None
        if self._narrow:
            slopes = [slope for slope in (by_log_prob, by_entropy) if slope is not None]
            # There may be no rows, or no slope at all.
            largest = torch.cat([told.top.new_full((1, 1), 1e-30), *slopes]).abs().amax()
            by_log_prob, by_entropy = (None if s is None else s / largest for s in (by_log_prob, by_entropy))
        same = weights.dtype == self._hidden.dtype
        gradient = weights if same else torch.empty_like(weights, dtype=self._hidden.dtype)
        turn_into_gradient(weights, gradient, labels, self._head.scaling, told, by_log_prob, by_entropy)
        if self._needed[0]:
            self._of_hidden.append(self._restored(gradient @ self._head.weight, largest))
        if self._needed[1]:
            part = self._restored(gradient.t() @ self._hidden[rows], largest)
            self._of_weight = part if self._of_weight is None else self._widened(self._of_weight).add_(part)
        if self._needed[2]:
            part = self._restored(gradient.sum(dim=0, dtype=wide_type(self._hidden)), largest)
            self._of_bias = part if self._of_bias is None else self._of_bias.add_(part)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As wide as they were summed; autograd narrows them, after what is multiplied yet."""
        return torch.cat(self._of_hidden) if self._needed[0] else None, self._of_weight, self._of_bias

    def _widened(self, part: Tensor) -> Tensor:
        return part.to(wide_type(part))

    def _restored(self, part: Tensor, largest: Tensor | None) -> Tensor:
        return part if largest is None else self._widened(part) * largest


def scale(part: Tensor, factor: Tensor) -> Tensor:
    """Without a copy where the factor is known to be 1; looking would make a GPU wait."""
    return part if factor.device.type == "cpu" and factor == 1 else part * factor


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """On CUDA: of narrow inputs, with its float32 sums as they are."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
