"""The output layer of a language model: logits block by block, and the gradients from those of the logits."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core.scoring._softmax_stats import (
    Scaling,
    SoftmaxStats,
    StatsGrad,
    backward_into,
    get_wide_dtype,
    split_range,
)
from grpo_core.scoring._token_sets import TokenSets

# On a CPU, a matrix product of more than a thousand rows is not faster per row. On a GPU, each block reads and writes
# the whole gradient of the weight, which a thousand rows do not hide.
_BLOCK_ROWS, _BLOCK_ROWS_ON_CUDA = 1024, 4096
# Size of a block of logits, unless more memory of a GPU is free.
_MAX_LOGITS_BYTES = 1 << 29


def choose_max_logits_bytes(device: torch.device) -> int:
    """Return the memory that logits may take: 512 MiB, or on CUDA a quarter of the free memory if that is more.

    Their gradient takes up to as much again. The size of a block decides how sums are rounded, so that deterministic
    algorithms do without the free memory, which differs from run to run.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return _MAX_LOGITS_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(_MAX_LOGITS_BYTES, (torch.cuda.mem_get_info(device)[0] + unused) // 4)


class LinearHead(NamedTuple):
    """An output layer $W h + b$, the scaling of its logits, and the memory that logits may take."""

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None
    scaling: Scaling
    max_logits_bytes: int

    def _max_rows(self) -> int:
        dtype = get_wide_dtype(self.weight) if self.weight.is_cuda else self.weight.dtype
        return self.max_logits_bytes // (len(self.weight) * dtype.itemsize)

    def fits(self, tokens: int) -> bool:
        """Return whether the logits of this many tokens fit into `max_logits_bytes`."""
        return tokens <= self._max_rows()

    def iterate_blocks(self, tokens: int) -> Iterator[slice]:
        """Yield the rows of each block of logits: a single block if all logits fit."""
        block_rows = _BLOCK_ROWS_ON_CUDA if self.weight.is_cuda else _BLOCK_ROWS
        rows = tokens if self.fits(tokens) else min(block_rows, self._max_rows())
        return split_range(tokens, max(1, rows)) if tokens else iter([slice(0, 0)])

    def compute_logits(self, hidden: Float[Tensor, "rows width"], sets: TokenSets) -> Float[Tensor, "rows vocab"]:
        r"""Return $W h + b$ in the type of the inputs, or on CUDA in the float32 of the product's sums.

        Logits outside of the sets are $-\infty$.
        """
        product = _multiply_wide(hidden, self.weight.t()) if hidden.is_cuda else hidden @ self.weight.t()
        return sets.restrict_(product if self.bias is None else product.add_(self.bias))


class HeadGradients:
    """Gradients of a loss in hidden states, weight and bias, accumulated over blocks of logits in float32 or wider."""

    def __init__(
        self, head: LinearHead, hidden: Float[Tensor, "tokens width"], needed: tuple[bool, bool, bool]
    ) -> None:
        self._head, self._hidden, self._needed = head, hidden, needed
        # A loss that is a mean has small gradients, which would underflow in float16. They are normalized before the
        # products and rescaled afterwards, so that a loss scale still finds them.
        self._normalizes = hidden.dtype == torch.float16
        self._of_hidden: list[Tensor] = []
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None

    def add(
        self,
        rows: slice,
        exp: Float[Tensor, "rows vocab"],
        labels: Int[Tensor, " rows"],
        stats: SoftmaxStats,
        grad: StatsGrad,
    ) -> None:
        """Add the gradients of a block of rows; `exp`, the stored exponentials of its logits, is overwritten."""
        if not any(self._needed):
            return
        scale = None
        if self._normalizes:
            columns = [column for column in grad if column is not None]
            # The tiny number avoids a maximum over nothing, and a division by 0.
            scale = torch.cat([stats.max_logit.new_full((1, 1), 1e-30), *columns]).abs().amax()
            grad = grad.divide(scale)
        same_type = exp.dtype == self._hidden.dtype
        gradient = exp if same_type else torch.empty_like(exp, dtype=self._hidden.dtype)
        backward_into(gradient, exp, labels, self._head.scaling, stats, grad)
        if self._needed[0]:
            self._of_hidden.append(_rescale(gradient @ self._head.weight, scale))
        if self._needed[1]:
            part = _rescale(gradient.t() @ self._hidden[rows], scale)
            self._of_weight = part if self._of_weight is None else _widen(self._of_weight).add_(part)
        if self._needed[2]:
            part = _rescale(gradient.sum(dim=0, dtype=get_wide_dtype(self._hidden)), scale)
            self._of_bias = part if self._of_bias is None else self._of_bias.add_(part)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the wide type of the sums; autograd narrows them after its last multiplication."""
        return torch.cat(self._of_hidden) if self._needed[0] else None, self._of_weight, self._of_bias


def scale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return the product, without a copy if the factor is known to be 1; a GPU would have to wait for its value."""
    return gradient if factor.device.type == "cpu" and factor == 1 else gradient * factor


def _widen(part: Tensor) -> Tensor:
    return part.to(get_wide_dtype(part))


def _rescale(part: Tensor, scale: Tensor | None) -> Tensor:
    return part if scale is None else _widen(part) * scale


def _multiply_wide(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix product with the float32 sums of narrow inputs (CUDA only)."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)
