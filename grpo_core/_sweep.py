"""Softmax statistics of many rows of logits, and their gradient, a tile of rows at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Wide values exist of one tile at a time. On a CPU its two buffers stay in the cache, where a pass over them costs a
# fifth of what it would in memory; elsewhere few launches matter more.
_TILE_BYTES = {"cpu": 3 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
# exp(-1e4) is 0: what a logit of -inf comes to, without 0 * inf.
_NEVER = -1e4


class Scaling(NamedTuple):
    r"""From logits to the $z$ of a softmax: $z = c \tanh(\text{logits} / c) / T$, without the cap where it is None."""

    temperature: float = 1.0
    softcap: float | None = None


class Statistics(NamedTuple):
    """Of some rows of logits, one column each."""

    log_probs: Float[Tensor, "rows 1"] | None
    normalizer: Float[Tensor, "rows 1"]
    """Logarithm of the sum of all exponentials."""
    entropy: Float[Tensor, "rows 1"] | None


def measure(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"] | None, scaling: Scaling, with_entropy: bool
) -> Statistics:
    """Log-probs where there are labels, and entropies where asked for."""
    dtype = wide_type(logits)
    log_probs, normalizer, entropy = (logits.new_empty(len(logits), 1, dtype=dtype) for _ in range(3))
    for tile, shifted, weights in _tiles(logits):
        z = _scale(logits[tile], scaling, shifted)
        top = z.amax(dim=1, keepdim=True)
        torch.sub(z, top, out=shifted)
        total = torch.exp(shifted, out=weights).sum(dim=1, keepdim=True)
        log_total = total.log()
        normalizer[tile] = top + log_total
        if labels is not None:
            log_probs[tile] = shifted.gather(1, labels[tile, None]) - log_total
        if with_entropy:
            mean = weights.mul_(shifted.clamp_(min=_NEVER)).sum(dim=1, keepdim=True) / total
            entropy[tile] = log_total - mean
    return Statistics(None if labels is None else log_probs, normalizer, entropy if with_entropy else None)


def write_gradient(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    scaling: Scaling,
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    r"""Into `gradient`, which may be `logits`: that of a loss in each logit, from its slopes $g$ and $g_H$.

    $\partial / \partial z_v = g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H)$, times $1 / T$ and the slope of the cap.
    """
    pull = torch.zeros_like(told.normalizer) if by_log_prob is None else by_log_prob / scaling.temperature
    for tile, log_p, room in _tiles(logits):
        z = _scale(logits[tile], scaling, log_p)
        # Where the gradient is wide itself, no copy is made of it.
        p = gradient[tile] if gradient.dtype == room.dtype else room
        slope = None if scaling.softcap is None else 1 - (z * (scaling.temperature / scaling.softcap)).square_()
        torch.sub(z, told.normalizer[tile], out=log_p)
        torch.exp(log_p, out=p)
        if by_entropy is None:
            p.mul_(-pull[tile])
        else:
            assert told.entropy is not None
            spread = by_entropy[tile] / scaling.temperature
            p.mul_(log_p.clamp_(min=_NEVER).add_(told.entropy[tile]).mul_(-spread).sub_(pull[tile]))
        if labels is not None:
            p.scatter_add_(1, labels[tile, None], pull[tile])
        if slope is not None:
            p.mul_(slope)
        if p is room:
            gradient[tile] = room


def wide_type(logits: Tensor) -> torch.dtype:
    """What statistics are taken in: at least float32."""
    return torch.promote_types(logits.dtype, torch.float32)


def check_labels(labels: Int[Tensor, " rows"], vocab: int) -> None:
    """On a CPU; a GPU would have to wait, and reports it by its own assertion."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"labels run from {low} to {high} but the vocabulary has {vocab} tokens: every label must be in"
            f" [0, {vocab}), those of masked positions too"
        )


def slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive parts of `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _scale(logits: Float[Tensor, "rows vocab"], scaling: Scaling, room: Float[Tensor, "rows vocab"]) -> Tensor:
    """$z$ of a tile: the logits themselves where nothing changes them, else in `room`.

    Widened first: arithmetic on bfloat16 would round in bfloat16.
    """
    if scaling == Scaling() and logits.dtype == room.dtype:
        return logits
    room.copy_(logits)
    if scaling.softcap is not None:
        return room.div_(scaling.softcap).tanh_().mul_(scaling.softcap / scaling.temperature)
    return room if scaling.temperature == 1 else room.div_(scaling.temperature)


def _tiles(logits: Float[Tensor, "rows vocab"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows that are widened at a time, and two buffers of their size."""
    rows, vocab = logits.shape
    size = min(rows, _tile_rows(logits))
    both = logits.new_empty(2, size, vocab, dtype=wide_type(logits))
    for tile in slices(rows, max(1, size)):
        count = tile.stop - tile.start
        yield tile, both[0, :count], both[1, :count]


def _tile_rows(logits: Float[Tensor, "rows vocab"]) -> int:
    size = _TILE_BYTES.get(logits.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, size // (logits.shape[1] * wide_type(logits).itemsize))
