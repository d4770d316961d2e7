"""Triton kernels for softmax statistics: one pass over a row of logits for its statistics, one for its gradient.

Each program of the grid processes one row, block by block, in float32. The rows of logits and gradient may have any
stride, but the tokens of a row must be contiguous.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# Tokens per block: each thread of eight warps loads 16. Chosen for an H100 by reasoning, without measurements.
_BLOCK = 4096
# Set explicitly, because Triton warns that its default for fused multiply-add will change.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def compute_softmax_stats(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"] | None, temperature: float, softcap: float | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return log-prob of the label, largest $z$, sum of exponentials and entropy, in the order of `SoftmaxStats`."""
    log_probs, max_logit, exp_sum, entropy = logits.new_empty(4, len(logits), 1, dtype=torch.float32)
    # torch.gather checks that every label lies inside the vocabulary.
    label_logits = None if labels is None else logits.gather(1, labels[:, None])
    with torch.cuda.device(logits.get_device()):
        _stats_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            label_logits,
            log_probs,
            max_logit,
            exp_sum,
            entropy,
            logits.shape[1],
            temperature,
            softcap,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )
    return None if labels is None else log_probs, max_logit, exp_sum, entropy


def write_gradient(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    temperature: float,
    softcap: float | None,
    max_logit: Float[Tensor, "rows 1"],
    exp_sum: Float[Tensor, "rows 1"],
    entropy: Float[Tensor, "rows 1"] | None,
    grad_log_prob: Float[Tensor, "rows 1"] | None,
    grad_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    """Write the gradient of a loss in each logit into `gradient`, which may be `logits`."""
    # An expanded column (one number for all rows) has stride 0, but the kernel expects stride 1.
    columns = (None if column is None else column.contiguous() for column in (labels, grad_log_prob, grad_entropy))
    with torch.cuda.device(logits.get_device()):
        _gradient_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            gradient,
            gradient.stride(0),
            max_logit,
            exp_sum,
            entropy,
            *columns,
            logits.shape[1],
            temperature,
            softcap,
            BLOCK=_BLOCK,
            **_OPTIONS,
        )


@triton.jit
def _stats_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    label_logits: tl.tensor,
    log_probs: tl.tensor,
    max_logit: tl.tensor,
    exp_sum: tl.tensor,
    entropy: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Store the statistics of a row; the sums over $e^{z - m}$ are rescaled whenever the running maximum $m$ grows."""
    row = tl.program_id(0).to(tl.int64)
    # The least float32 instead of -inf, so that -inf - -inf never occurs. A row that consists of -inf has an exp_sum
    # of 0, and its statistics become 0 / 0 = NaN.
    row_max = -3.4028234663852886e38
    exp_sum_so_far = 0.0
    weighted_sum = 0.0
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab
        z = _scale_logits(tl.load(logits + row * stride + token, mask=inside, other=0.0), temperature, softcap)
        z = tl.where(inside, z, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(z, axis=0))
        shifted = z - new_max
        exp = tl.exp(shifted)
        moved = row_max - new_max
        rescale = tl.exp(moved)
        # Skip products of 0 and -inf, which would be NaN. A NaN among the logits still reaches exp_sum.
        weighted_sum = tl.where(rescale > 0, rescale * (weighted_sum + moved * exp_sum_so_far), 0.0)
        weighted_sum += tl.sum(tl.where(exp > 0, exp * shifted, 0.0), axis=0)
        exp_sum_so_far = rescale * exp_sum_so_far + tl.sum(exp, axis=0)
        row_max = new_max
    log_sum = tl.log(exp_sum_so_far)
    tl.store(max_logit + row, row_max)
    tl.store(exp_sum + row, exp_sum_so_far)
    tl.store(entropy + row, log_sum - weighted_sum / exp_sum_so_far)
    if label_logits is not None:
        tl.store(log_probs + row, _scale_logits(tl.load(label_logits + row), temperature, softcap) - row_max - log_sum)


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    max_logit: tl.tensor,
    exp_sum: tl.tensor,
    entropy: tl.tensor,
    labels: tl.tensor,
    grad_log_prob: tl.tensor,
    grad_entropy: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    softcap: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    r"""Store $(g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H))\, \partial z_v / \partial \text{logit}_v$ of a row."""
    row = tl.program_id(0).to(tl.int64)
    row_max = tl.load(max_logit + row)
    log_sum = tl.log(tl.load(exp_sum + row))
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab
        z = _scale_logits(tl.load(logits + row * stride + token, mask=inside, other=0.0), temperature, softcap)
        # This order of subtractions loses no digits to a large maximum.
        log_p = z - row_max - log_sum
        p = tl.exp(log_p)
        # 0, or NaN for a row that is not a distribution.
        result = 0.0 * p
        if grad_log_prob is not None:
            label_grad = tl.load(grad_log_prob + row) / temperature
            result -= label_grad * p
            if labels is not None:
                result += tl.where(token == tl.load(labels + row), label_grad, 0.0)
        if grad_entropy is not None:
            log_p_plus_entropy = tl.where(p > 0, log_p + tl.load(entropy + row), 0.0)
            result -= tl.load(grad_entropy + row) / temperature * p * log_p_plus_entropy
        if softcap is not None:
            capped = z * (temperature / softcap)
            # The slope of an impossible token is 0 instead of -inf, which would make its gradient NaN.
            result *= tl.maximum(1 - capped * capped, 0.0)
        tl.store(gradient + row * gradient_stride + token, result.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _scale_logits(logits: tl.tensor, temperature: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Return $z$ as defined by `Scaling`."""
    z = logits.to(tl.float32)
    if softcap is not None:
        z = tl.where(z > -float("inf"), softcap * _tanh(z / softcap), z)
    return z / temperature


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Return tanh from exponentials, or from its series near 0, where the exponentials would cancel."""
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    exp = tl.exp(-2 * tl.abs(x))
    far = (1 - exp) / (1 + exp)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))
