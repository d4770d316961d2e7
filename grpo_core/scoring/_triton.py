"""Triton kernels of the sweep: one pass over a row of logits for what is told of it, and one for its gradient.

A program of the grid has a row, and takes it a block at a time; everything is computed in float32. Logits and gradient
may have rows that lie apart, but tokens of a row are neighbors.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# Tokens of a block: eight warps load 16 each. Chosen for an H100 by reasoning; it was never timed.
_BLOCK = 4096
# Fusion of products and sums is said aloud: Triton's default for it changes, and warns.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def measure(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"] | None, temperature: float, softcap: float | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Log-prob of the label, largest $z$, sum of the weights, and entropy: a column each, as in `Statistics`."""
    log_probs, top, total, entropy = logits.new_empty(4, len(logits), 1, dtype=torch.float32)
    # By torch, whose assertion notices a label outside the vocabulary.
    chosen = None if labels is None else logits.gather(1, labels[:, None])
    with torch.cuda.device(logits.get_device()):
        _measure[(len(logits),)](
            logits,
            logits.stride(0),
            chosen,
            log_probs,
            top,
            total,
            entropy,
            logits.shape[1],
            temperature,
            softcap,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )
    return None if labels is None else log_probs, top, total, entropy


def write_gradient(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    temperature: float,
    softcap: float | None,
    top: Float[Tensor, "rows 1"],
    total: Float[Tensor, "rows 1"],
    entropy: Float[Tensor, "rows 1"] | None,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    """Into `gradient`, which may be `logits`: that of a loss with these slopes."""
    # A slope that is the same for all rows may be one number that stands for many.
    columns = (None if column is None else column.contiguous() for column in (labels, by_log_prob, by_entropy))
    with torch.cuda.device(logits.get_device()):
        _write_gradient[(len(logits),)](
            logits,
            logits.stride(0),
            gradient,
            gradient.stride(0),
            top,
            total,
            entropy,
            *columns,
            logits.shape[1],
            temperature,
            softcap,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


@triton.jit
def _measure(
    logits: tl.tensor,
    stride: tl.tensor,
    chosen: tl.tensor,
    log_probs: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    entropy: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Sums of $e^{z - m}$ and of $(z - m) e^{z - m}$ follow the largest $z$ so far, $m$, as it grows."""
    row = tl.program_id(0).to(tl.int64)
    # The least number, not -inf: nothing is subtracted from -inf before a token that can come is there. A row without
    # one has a total of 0, and 0 / 0 is told of it.
    highest = -3.4028234663852886e38
    weight = 0.0
    spread = 0.0
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocab
        z = _scale(tl.load(logits + row * stride + place, mask=inside, other=0.0), temperature, softcap)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(highest, tl.max(z, axis=0))
        shifted = z - higher
        e = tl.exp(shifted)
        moved = highest - higher
        kept = tl.exp(moved)
        # A weight of 0 has no part in a product with what may be -inf. A NaN is told by the sum of weights.
        spread = tl.where(kept > 0, kept * (spread + moved * weight), 0.0)
        spread += tl.sum(tl.where(e > 0, e * shifted, 0.0), axis=0)
        weight = kept * weight + tl.sum(e, axis=0)
        highest = higher
    log_total = tl.log(weight)
    tl.store(top + row, highest)
    tl.store(total + row, weight)
    tl.store(entropy + row, log_total - spread / weight)
    if chosen is not None:
        tl.store(log_probs + row, _scale(tl.load(chosen + row), temperature, softcap) - highest - log_total)


@triton.jit
def _write_gradient(
    logits: tl.tensor,
    stride: tl.tensor,
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    entropy: tl.tensor,
    labels: tl.tensor,
    by_log_prob: tl.tensor,
    by_entropy: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    r"""$(g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H))\, \partial z_v / \partial \text{logit}_v$, token by token."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.load(top + row)
    log_total = tl.log(tl.load(total + row))
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocab
        z = _scale(tl.load(logits + row * stride + place, mask=inside, other=0.0), temperature, softcap)
        # In this order no digit is lost to a maximum that is large.
        log_p = z - highest - log_total
        p = tl.exp(log_p)
        # 0, or NaN: that of a row which is no distribution goes on.
        pull = 0.0 * p
        if by_log_prob is not None:
            slope = tl.load(by_log_prob + row) / temperature
            pull -= slope * p
            if labels is not None:
                pull += tl.where(place == tl.load(labels + row), slope, 0.0)
        if by_entropy is not None:
            surprise = tl.where(p > 0, log_p + tl.load(entropy + row), 0.0)
            pull -= tl.load(by_entropy + row) / temperature * p * surprise
        if softcap is not None:
            capped = z * (temperature / softcap)
            pull *= 1 - capped * capped
        tl.store(gradient + row * gradient_stride + place, pull.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _scale(logits: tl.tensor, temperature: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """$z$, as `Scaling` has it."""
    z = logits.to(tl.float32)
    if softcap is not None:
        z = softcap * _tanh(z / softcap)
    return z / temperature


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """By exponentials; next to 0, where digits would cancel, by its series."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))
