r"""Softmax statistics of rows of logits and their gradient, computed a tile of rows at a time, or by Triton on CUDA.

A row of logits becomes $z$ (scaled by temperature and cap), $p = \operatorname{softmax}(z)$, the log-probability of
its label $\log p_y$ and the entropy $H = -\sum_v p_v \log p_v$. For a loss with $g = \partial L / \partial \log p_y$
and $g_H = \partial L / \partial H$, the gradient is

$$\frac{\partial L}{\partial z_v} = g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H).$$
"""

import functools
import math
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Size of the float32 buffers of one tile. On a CPU, both buffers of a tile stay in the cache, where a pass over them
# takes a fifth of the time that a pass over memory takes. On other devices, fewer launches matter more.
_TILE_BYTES = {"cpu": 3 << 20}
_TILE_BYTES_ELSEWHERE = 256 << 20
# Replaces log-probabilities of -inf. Its exponential is 0, and 0 * -1e4 is 0, while 0 * -inf is NaN.
_MIN_LOG_PROB = -1e4
# The kernels compute in float32. float64 is left to the tiles, against which the kernels are verified.
_KERNEL_DEVICES = ("cuda",)
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Scaling(NamedTuple):
    r"""Map from logits to $z = c \tanh(\text{logits} / c) / T$; without the cap if it is None.

    A logit of $-\infty$ stays $-\infty$ under a cap: the token is impossible.
    """

    temperature: float = 1.0
    softcap: float | None = None


class SoftmaxStats(NamedTuple):
    """Statistics of some rows of logits, one column each."""

    log_probs: Float[Tensor, "rows 1"] | None
    """Log-probability of the label; None without labels."""
    max_logit: Float[Tensor, "rows 1"]
    """Largest $z$ of the row."""
    exp_sum: Float[Tensor, "rows 1"]
    """Sum of $e^{z - max}$ over the row."""
    entropy: Float[Tensor, "rows 1"] | None
    """Entropy of the softmax; None if it was not requested."""

    @property
    def log_normalizer(self) -> Float[Tensor, "rows 1"]:
        r"""$\log \sum_v e^{z_v}$ of each row."""
        return self.max_logit + self.exp_sum.log()

    def select(self, rows: slice) -> "SoftmaxStats":
        """Return the statistics of these rows."""
        return SoftmaxStats(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]

    def as_outputs(self) -> tuple[Float[Tensor, " rows"] | None, Float[Tensor, " rows"] | None]:
        """Return log-probs and entropies as new tensors; callers could not modify views in place."""
        log_probs, entropy = (
            None if column is None else column[:, 0].clone() for column in (self.log_probs, self.entropy)
        )
        return log_probs, entropy


class StatsGrad(NamedTuple):
    """Gradient of a loss in the log-probs ($g$) and entropies ($g_H$) of some rows; None for an unused output."""

    log_probs: Float[Tensor, "rows 1"] | None
    entropy: Float[Tensor, "rows 1"] | None

    @classmethod
    def from_outputs(
        cls, log_probs: Float[Tensor, " rows"] | None, entropy: Float[Tensor, " rows"] | None
    ) -> "StatsGrad":
        """Return the gradient of outputs that autograd passes as vectors."""
        return cls(*(None if grad is None else rearrange(grad, "row -> row 1") for grad in (log_probs, entropy)))

    def select(self, rows: slice) -> "StatsGrad":
        """Return the gradient of these rows."""
        return StatsGrad(*(None if grad is None else grad[rows] for grad in self))

    def divide(self, divisor: Tensor | float) -> "StatsGrad":
        """Return the gradient divided by a number."""
        return StatsGrad(*(None if grad is None else grad / divisor for grad in self))


def compute_softmax_stats(
    logits: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    scaling: Scaling,
    *,
    with_entropy: bool,
    store_exp: bool = False,
) -> SoftmaxStats:
    r"""Return log-probs (if there are labels), normalizers and entropies (on request) of all rows.

    $\log p_y = s_y - \log S$ and $H = \log S - \sum_v e^{s_v} s_v / S$ with $s = z - \max z$ and $S = \sum_v e^{s_v}$.

    With `store_exp`, the tiles overwrite `logits` with $e^s$, from which `backward_into` computes the gradient without
    another exponential. The kernels keep the logits, because on a GPU an exponential is cheaper than a pass over
    memory.
    """
    if _uses_kernels(logits):
        stats = _compute_stats_with_kernel(logits, labels, scaling)
        return stats if with_entropy else stats._replace(entropy=None)
    dtype = get_wide_dtype(logits)
    log_probs, max_logit, exp_sum, weighted_sum = logits.new_empty(4, len(logits), 1, dtype=dtype)
    for rows, shifted, exp in _iterate_tiles(logits):
        z = _scale_logits(logits[rows], scaling, out=shifted)
        torch.amax(z, dim=1, keepdim=True, out=max_logit[rows])
        torch.sub(z, max_logit[rows], out=shifted)
        torch.exp(shifted, out=exp)
        torch.sum(exp, dim=1, keepdim=True, out=exp_sum[rows])
        if store_exp:
            logits[rows] = exp
        if labels is not None:
            log_probs[rows] = shifted.gather(1, labels[rows, None])
        if with_entropy:
            finite = shifted.clamp_(min=_MIN_LOG_PROB)
            torch.sum(exp.mul_(finite), dim=1, keepdim=True, out=weighted_sum[rows])
    log_sum = exp_sum.log()
    return SoftmaxStats(
        None if labels is None else log_probs.sub_(log_sum),
        max_logit,
        exp_sum,
        log_sum - weighted_sum.div_(exp_sum) if with_entropy else None,
    )


def store_exponentials(logits: Float[Tensor, "rows vocab"], scaling: Scaling, stats: SoftmaxStats) -> None:
    r"""Overwrite `logits` as `compute_softmax_stats` does with `store_exp`, from statistics that are known."""
    if _uses_kernels(logits):
        return
    for rows, shifted, exp in _iterate_tiles(logits):
        torch.sub(_scale_logits(logits[rows], scaling, out=shifted), stats.max_logit[rows], out=shifted)
        torch.exp(shifted, out=exp)
        logits[rows] = exp


def write_gradient(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    temperature: float,
    stats: SoftmaxStats,
    grad: StatsGrad,
) -> None:
    """Write the gradient of the module's equation in each logit into `gradient`, from uncapped logits."""
    scaling = Scaling(temperature)
    if _uses_kernels(logits):
        _write_gradient_with_kernel(logits, gradient, labels, scaling, stats, grad)
        return
    log_normalizer = stats.log_normalizer
    scaled_grad = grad.divide(temperature)
    for rows, log_p, buffer in _iterate_tiles(logits):
        # A gradient of the buffer's type needs no copy.
        p = gradient[rows] if gradient.dtype == buffer.dtype else buffer
        torch.sub(_scale_logits(logits[rows], scaling, out=log_p), log_normalizer[rows], out=log_p)
        torch.exp(log_p, out=p)
        tile_labels = None if labels is None else labels[rows]
        result = _logit_gradient(p, log_p, tile_labels, stats.select(rows), scaled_grad.select(rows))
        if p is buffer:
            gradient[rows] = result


def backward_into(
    gradient: Float[Tensor, "rows vocab"],
    exp: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"],
    scaling: Scaling,
    stats: SoftmaxStats,
    grad: StatsGrad,
) -> None:
    r"""Write the gradient of the module's equation in each logit into `gradient`, from stored exponentials.

    `exp` is what `compute_softmax_stats` with `store_exp` left of the logits: $e^{z - \max z}$, or the logits
    themselves if it ran a kernel. `gradient` may be the same tensor. A cap multiplies the gradient by $\partial z /
    \partial \text{logit} \cdot T = 1 - (z T / c)^2$. A bfloat16 exponential is rounded by as much as a bfloat16
    gradient.
    """
    if _uses_kernels(exp):
        _write_gradient_with_kernel(exp, gradient, labels, scaling, stats, grad)
        return
    scaled_grad = grad.divide(scaling.temperature)
    for rows, log_p, p in _iterate_tiles(exp):
        tile_labels, tile_stats, tile_grad = labels[rows], stats.select(rows), scaled_grad.select(rows)
        p.copy_(exp[rows])
        if grad.entropy is None and scaling.softcap is None:
            gradient[rows] = _log_prob_gradient(p, tile_labels, tile_stats.exp_sum, tile_grad)
            continue
        p.div_(tile_stats.exp_sum)
        torch.log(p, out=log_p)
        cap_slope = None
        if scaling.softcap is not None:
            assert tile_stats.log_probs is not None
            # An exponential that underflowed to 0 has lost its logit. This matters for the label only, whose
            # log-probability is known.
            log_p.scatter_(1, tile_labels[:, None], tile_stats.log_probs)
            z = log_p + tile_stats.log_normalizer
            # The slope of an impossible token is 0 instead of -inf.
            cap_slope = (1 - z.mul_(scaling.temperature / scaling.softcap).square_()).clamp_(min=0)
        result = _logit_gradient(p, log_p, tile_labels, tile_stats, tile_grad)
        gradient[rows] = result if cap_slope is None else result.mul_(cap_slope)


def _logit_gradient(
    p: Float[Tensor, "rows vocab"],
    log_p: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    stats: SoftmaxStats,
    grad: StatsGrad,
) -> Float[Tensor, "rows vocab"]:
    r"""Return $g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H)$ of a tile. It overwrites `p` and `log_p`."""
    label_grad = torch.zeros_like(stats.exp_sum) if grad.log_probs is None else grad.log_probs
    if grad.entropy is None:
        gradient = p.mul_(-label_grad)
    else:
        assert stats.entropy is not None
        log_p_plus_entropy = log_p.clamp_(min=_MIN_LOG_PROB).add_(stats.entropy)
        factor = log_p_plus_entropy.mul_(-grad.entropy).sub_(label_grad)
        gradient = p.mul_(factor)
    return gradient if labels is None else gradient.scatter_add_(1, labels[:, None], label_grad)


def _log_prob_gradient(
    exp: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"],
    exp_sum: Float[Tensor, "rows 1"],
    grad: StatsGrad,
) -> Float[Tensor, "rows vocab"]:
    r"""Return $g\,(1[v = y] - e_v / S)$ of a tile. It overwrites `exp`."""
    label_grad = torch.zeros_like(exp_sum) if grad.log_probs is None else grad.log_probs
    return exp.mul_(-label_grad / exp_sum).scatter_add_(1, labels[:, None], label_grad)


def concatenate_stats(parts: list[SoftmaxStats]) -> SoftmaxStats:
    """Return the statistics of consecutive parts of the rows as one."""
    if len(parts) == 1:
        return parts[0]
    columns = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    return SoftmaxStats(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]


def _uses_kernels(logits: Float[Tensor, "rows vocab"]) -> bool:
    """Return whether the Triton kernels process this tensor; the answer is the same in forward and backward."""
    return (
        logits.device.type in _KERNEL_DEVICES
        and logits.dtype in _KERNEL_TYPES
        and logits.numel() > 0
        and logits.stride(1) == 1
        and not torch.compiler.is_compiling()
        and _has_verified_kernels(logits.device, logits.dtype)
    )


@functools.cache
def _has_verified_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on the device and agree with the tiles; tested once per device and type."""
    try:
        if find_spec("triton") is None:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = _measure_kernel_error(device, dtype)
        problem = f"differ from torch by {error:.3g} times what rounding explains"
    except Exception as exception:
        error, problem = float("inf"), f"fail ({type(exception).__name__}: {exception})".replace("\n", " ")
    # This is False for a NaN, which is no agreement.
    if error <= 1:
        return True
    warnings.warn(f"Triton kernels on {device} in {dtype} {problem}: torch is used instead", stacklevel=2)
    return False


def _measure_kernel_error(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference between kernels and float64 tiles, relative to what rounding explains.

    The logits fill a block partly, and contain tokens and a whole block of probability 0. Each gradient is tested
    alone and both together.
    """
    logits = torch.arange(3 * 9001.0).sin_().mul_(8).view(3, -1).to(device, dtype)
    logits[0, 9000] = logits[1, :5000] = -float("inf")
    labels = torch.tensor([0, 8999, 4097], device=device)
    g, g_entropy = torch.tensor([[[1.0], [-2.0], [0.5]], [[-1.0], [0.25], [3.0]]], device=device)
    errors = [0.0]
    for scaling in (Scaling(), Scaling(0.7, 20.0)):
        stats, exact = _compute_stats_with_kernel(logits, labels, scaling), logits.double()
        exact_stats = compute_softmax_stats(exact, labels, scaling, with_entropy=True, store_exp=True)
        errors += [_compute_excess_error(*pair, 3e-5) for pair in zip(stats, exact_stats, strict=True)]
        for grad in (StatsGrad(g, None), StatsGrad(None, g_entropy), StatsGrad(g, g_entropy)):
            gradient, exact_gradient = torch.full_like(logits, float("nan")), torch.empty_like(exact)
            kernel_labels = None if grad.log_probs is None else labels
            _write_gradient_with_kernel(logits, gradient, kernel_labels, scaling, stats, grad)
            exact_grad = StatsGrad(*(None if column is None else column.double() for column in grad))
            backward_into(exact_gradient, exact, labels, scaling, exact_stats, exact_grad)
            errors.append(_compute_excess_error(gradient, exact_gradient, max(3e-5, torch.finfo(dtype).eps)))
    # max() would skip a NaN.
    return float(torch.tensor(errors).amax())


def _compute_excess_error(value: Tensor | None, exact: Tensor | None, tolerance: float) -> float:
    """Return the largest difference as a multiple of the tolerated relative error."""
    assert value is not None
    assert exact is not None
    return float(((value - exact).abs() / (1e-6 + tolerance * exact.abs())).amax())


def _compute_stats_with_kernel(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"] | None, scaling: Scaling
) -> SoftmaxStats:
    # Imported here, because Triton is not installed everywhere.
    from grpo_core.scoring import _triton

    return SoftmaxStats(*_triton.compute_softmax_stats(logits, labels, *scaling))


def _write_gradient_with_kernel(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    scaling: Scaling,
    stats: SoftmaxStats,
    grad: StatsGrad,
) -> None:
    from grpo_core.scoring import _triton

    max_logit, exp_sum, entropy = stats[1:]
    _triton.write_gradient(logits, gradient, labels, *scaling, max_logit, exp_sum, entropy, *grad)


def get_wide_dtype(logits: Tensor) -> torch.dtype:
    """Return the type in which statistics are computed: at least float32."""
    return torch.promote_types(logits.dtype, torch.float32)


def check_labels(labels: Int[Tensor, " rows"], vocab: int) -> None:
    """Raise ValueError if a label lies outside the vocabulary; on a GPU, which would have to wait, do nothing."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"labels run from {low} to {high} but the vocabulary has {vocab} tokens: every label must be in"
            f" [0, {vocab}), including those of masked positions"
        )


def split_range(total: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` that cover `total`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _scale_logits(
    logits: Float[Tensor, "rows vocab"], scaling: Scaling, out: Float[Tensor, "rows vocab"]
) -> Float[Tensor, "rows vocab"]:
    """Return $z$ of a tile, computed in `out` and in its type, or the logits themselves if nothing changes."""
    if scaling == Scaling() and logits.dtype == out.dtype:
        return logits
    out.copy_(logits)
    if scaling.softcap is not None:
        out.div_(scaling.softcap).tanh_().mul_(scaling.softcap / scaling.temperature)
        return out.masked_fill_(logits == -math.inf, -math.inf)
    return out if scaling.temperature == 1 else out.div_(scaling.temperature)


def _iterate_tiles(logits: Float[Tensor, "rows vocab"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the rows of each tile with two float32 (or wider) buffers of its shape, which all tiles share."""
    rows, vocab = logits.shape
    size = min(rows, _tile_rows(logits))
    buffers = logits.new_empty(2, size, vocab, dtype=get_wide_dtype(logits))
    for tile in split_range(rows, max(1, size)):
        count = tile.stop - tile.start
        yield tile, buffers[0, :count], buffers[1, :count]


def _tile_rows(logits: Float[Tensor, "rows vocab"]) -> int:
    size = _TILE_BYTES.get(logits.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, size // (logits.shape[1] * get_wide_dtype(logits).itemsize))
