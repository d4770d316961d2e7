"""The output layer of a language model: logits, what is told of them, and their gradient in their place."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Past a thousand rows a matrix product is no faster.
_BLOCK_ROWS = 1024
# Wide values exist of one tile of a block at a time. On a CPU its two buffers stay in the cache, where a pass over
# them costs a fifth of what it would in memory; elsewhere few launches matter more.
_TILE_BYTES = {"cpu": 3 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
# exp(-1e4) is 0: what a logit of -inf comes to, without 0 * inf.
_NEVER = -1e4


class Head(NamedTuple):
    r"""$z = c \tanh((W h + b) / c) / T$, without the cap where there is none."""

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None
    temperature: float
    softcap: float | None
    max_logits_bytes: int

    @property
    def wide(self) -> torch.dtype:
        """What statistics are taken in."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def _logits_dtype(self) -> torch.dtype:
        return self.wide if self.weight.is_cuda else self.weight.dtype

    def _rows_that_fit(self) -> int:
        return self.max_logits_bytes // (len(self.weight) * self._logits_dtype.itemsize)

    def fits(self, tokens: int) -> bool:
        """Whether the logits of so many tokens may stand at once."""
        return tokens <= self._rows_that_fit()

    def blocks(self, tokens: int) -> Iterator[slice]:
        """Rows whose logits are made by one matrix product: all of them if they fit."""
        rows = tokens if self.fits(tokens) else min(_BLOCK_ROWS, self._rows_that_fit())
        return _slices(tokens, max(1, rows)) if tokens else iter([slice(0, 0)])

    def tiles(self, rows: int) -> Iterator[slice]:
        """Rows that are widened at a time."""
        return _slices(rows, _tile_rows(self))

    def buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Room for any tile of a block of `rows`, twice."""
        tile = next(self.tiles(rows), slice(0, 0))
        both = self.weight.new_empty(2, tile.stop - tile.start, len(self.weight), dtype=self.wide)
        return both[0], both[1]

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocab"]:
        """$W h + b$ in the precision of a matrix product; on CUDA that of its sums."""
        product = _wide_product(hidden, self.weight.t()) if hidden.is_cuda else hidden @ self.weight.t()
        return product if self.bias is None else product.add_(self.bias)


class Statistics(NamedTuple):
    """Of some rows of logits, one column each."""

    log_probs: Float[Tensor, "rows 1"]
    normalizer: Float[Tensor, "rows 1"]
    """Logarithm of the sum of all exponentials."""
    entropy: Float[Tensor, "rows 1"] | None


def measure(
    head: Head, logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"], with_entropy: bool
) -> Statistics:
    """Of a block of logits, which stay as they are."""
    log_probs, normalizer, entropy = (logits.new_empty(len(logits), 1, dtype=head.wide) for _ in range(3))
    buffers = head.buffers(len(logits))
    for tile in head.tiles(len(logits)):
        shifted, weights = (buffer[: tile.stop - tile.start] for buffer in buffers)
        _scale(head, logits[tile], shifted)
        top = shifted.amax(dim=1, keepdim=True)
        picked = shifted.sub_(top).gather(1, labels[tile, None])
        total = torch.exp(shifted, out=weights).sum(dim=1, keepdim=True)
        log_total = total.log()
        log_probs[tile], normalizer[tile] = picked - log_total, top + log_total
        if with_entropy:
            mean = weights.mul_(shifted.clamp_(min=_NEVER)).sum(dim=1, keepdim=True) / total
            entropy[tile] = log_total - mean
    return Statistics(log_probs, normalizer, entropy if with_entropy else None)


def turn_into_gradient(
    head: Head,
    logits: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"],
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> Float[Tensor, "rows vocab"]:
    r"""That of the loss in each logit, from its slopes $g$ and $g_H$, in the place of the logits where types agree.

    $\partial / \partial z_v = g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H)$, times $1 / T$ and the slope of the cap.
    """
    by_log_prob = torch.zeros_like(told.log_probs) if by_log_prob is None else by_log_prob / head.temperature
    gradient = logits if logits.dtype == head.weight.dtype else torch.empty_like(logits, dtype=head.weight.dtype)
    buffers = head.buffers(len(logits))
    for tile in head.tiles(len(logits)):
        log_p, p = (buffer[: tile.stop - tile.start] for buffer in buffers)
        _scale(head, logits[tile], log_p)
        slope = None if head.softcap is None else 1 - (log_p * (head.temperature / head.softcap)).square_()
        torch.exp(log_p.sub_(told.normalizer[tile]), out=p)
        if by_entropy is None:
            p.mul_(-by_log_prob[tile])
        else:
            assert told.entropy is not None
            pull = by_entropy[tile] / head.temperature
            p.mul_(log_p.clamp_(min=_NEVER).add_(told.entropy[tile]).mul_(-pull).sub_(by_log_prob[tile]))
        p.scatter_add_(1, labels[tile, None], by_log_prob[tile])
        gradient[tile] = p if slope is None else p.mul_(slope)
    return gradient


def _scale(head: Head, logits: Float[Tensor, "rows vocab"], out: Float[Tensor, "rows vocab"]) -> None:
    """$z$ of a tile, widened first: arithmetic on bfloat16 would round in bfloat16."""
    out.copy_(logits)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap / head.temperature)
    elif head.temperature != 1:
        out.div_(head.temperature)


def _tile_rows(head: Head) -> int:
    size = _TILE_BYTES.get(head.weight.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, size // (len(head.weight) * head.wide.itemsize))


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
        logits: Float[Tensor, "rows vocab"],
        labels: Int[Tensor, " rows"],
        told: Statistics,
        by_log_prob: Float[Tensor, "rows 1"] | None,
        by_entropy: Float[Tensor, "rows 1"] | None,
    ) -> None:
        """The block of these rows, whose logits are overwritten."""
        if not any(self._needed):
            return
        largest = None
        if self._narrow:
            slopes = [slope for slope in (by_log_prob, by_entropy) if slope is not None]
            largest = torch.stack([slope.abs().amax() for slope in slopes]).amax().clamp(min=1e-30)
            by_log_prob, by_entropy = (None if s is None else s / largest for s in (by_log_prob, by_entropy))
        gradient = turn_into_gradient(self._head, logits, labels, told, by_log_prob, by_entropy)
        if self._needed[0]:
            self._of_hidden.append(self._restored(gradient @ self._head.weight, largest))
        if self._needed[1]:
            part = self._restored(gradient.t() @ self._hidden[rows], largest)
            self._of_weight = part if self._of_weight is None else self._widened(self._of_weight).add_(part)
        if self._needed[2]:
            part = self._restored(gradient.sum(dim=0, dtype=self._head.wide), largest)
            self._of_bias = part if self._of_bias is None else self._of_bias.add_(part)

    def result(self, by_loss: Tensor | float = 1.0) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Times the slope of what follows, in the types of the inputs."""
        sums = (torch.cat(self._of_hidden) if self._needed[0] else None, self._of_weight, self._of_bias)
        return tuple(None if part is None else _times(part, by_loss).to(self._hidden.dtype) for part in sums)  # type: ignore[return-value]

    def _widened(self, part: Tensor) -> Tensor:
        return part.to(self._head.wide)

    def _restored(self, part: Tensor, largest: Tensor | None) -> Tensor:
        return part if largest is None else self._widened(part) * largest


def _times(part: Tensor, factor: Tensor | float) -> Tensor:
    """Without a copy where the factor is known to be 1; looking would make a GPU wait."""
    known = isinstance(factor, float) or factor.device.type == "cpu"
    return part if known and factor == 1 else part * factor


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """On CUDA: of narrow inputs, with its float32 sums as they are."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
