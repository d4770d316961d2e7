"""Softmax statistics of many rows of logits, and their gradient: a tile of rows at a time, or by kernels on CUDA."""

import functools
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
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
# The kernels compute in float32: float64 is left to the tiles, and is what they are proven by.
_KERNEL_DEVICES = ("cuda",)
_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Scaling(NamedTuple):
    r"""From logits to the $z$ of a softmax: $z = c \tanh(\text{logits} / c) / T$, without the cap where it is None."""

    temperature: float = 1.0
    softcap: float | None = None


class Statistics(NamedTuple):
    """Of some rows of logits, one column each."""

    log_probs: Float[Tensor, "rows 1"] | None
    top: Float[Tensor, "rows 1"]
    """The largest $z$."""
    total: Float[Tensor, "rows 1"]
    """The sum of all $e^{z - top}$, the weights."""
    entropy: Float[Tensor, "rows 1"] | None

    def results(self) -> tuple[Float[Tensor, " rows"] | None, Float[Tensor, " rows"] | None]:
        """Log-probs and entropies to hand out; no views, for those could not be changed in place."""
        log_probs, entropy = (
            None if value is None else value[:, 0].clone() for value in (self.log_probs, self.entropy)
        )
        return log_probs, entropy


def measure(
    logits: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    scaling: Scaling,
    *,
    with_entropy: bool,
    keeps_weights: bool = False,
) -> Statistics:
    """Log-probs where there are labels, and entropies where asked for.

    With `keeps_weights`, logits give way to their weights: all that `turn_into_gradient` needs, without exponentials.
    Kernels leave them as they are: there an exponential costs less than a pass over memory.
    """
    if _uses_kernels(logits):
        told = _measure_by_kernel(logits, labels, scaling)
        return told if with_entropy else told._replace(entropy=None)
    dtype = wide_type(logits)
    log_probs, top, total, entropy = logits.new_empty(4, len(logits), 1, dtype=dtype)
    for tile, shifted, weights in _tiles(logits):
        z = _scale(logits[tile], scaling, shifted)
        torch.amax(z, dim=1, keepdim=True, out=top[tile])
        torch.sub(z, top[tile], out=shifted)
        torch.sum(torch.exp(shifted, out=weights), dim=1, keepdim=True, out=total[tile])
        if keeps_weights:
            logits[tile] = weights
        if labels is not None:
            log_probs[tile] = shifted.gather(1, labels[tile, None])
        if with_entropy:
            torch.sum(weights.mul_(shifted.clamp_(min=_NEVER)), dim=1, keepdim=True, out=entropy[tile])
    log_total = total.log()
    return Statistics(
        None if labels is None else log_probs.sub_(log_total),
        top,
        total,
        log_total - entropy.div_(total) if with_entropy else None,
    )


def write_gradient(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    temperature: float,
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    r"""Into `gradient`: that of a loss in each logit, from its slopes $g$ in the log-prob and $g_H$ in the entropy.

    $\partial / \partial z_v = g\,(1[v = y] - p_v) - g_H\, p_v (\log p_v + H)$, times $1 / T$.
    """
    if _uses_kernels(logits):
        _write_by_kernel(logits, gradient, labels, Scaling(temperature), told, by_log_prob, by_entropy)
        return
    normalizer = told.top + told.total.log()
    for tile, log_p, room in _tiles(logits):
        # Where the gradient is wide itself, no copy is made of it.
        p = gradient[tile] if gradient.dtype == room.dtype else room
        torch.sub(_scale(logits[tile], Scaling(temperature), log_p), normalizer[tile], out=log_p)
        torch.exp(log_p, out=p)
        _pull(p, log_p, labels, tile, temperature, told, by_log_prob, by_entropy)
        if p is room:
            gradient[tile] = room


def turn_into_gradient(
    weights: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"],
    scaling: Scaling,
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    """The same from the weights that `measure` kept, into `gradient`, which may be `weights`; through a cap too.

    Rounded to bfloat16, a weight is off by as much as the gradient is rounded by; that of the likeliest token is 1.
    Where `measure` ran a kernel, it kept the logits.
    """
    if _uses_kernels(weights):
        _write_by_kernel(weights, gradient, labels, scaling, told, by_log_prob, by_entropy)
        return
    for tile, log_p, p in _tiles(weights):
        p.copy_(weights[tile])
        if by_entropy is not None or scaling.softcap is not None:
            torch.log(p.div_(told.total[tile]), out=log_p).clamp_(min=_NEVER)
            slope = None
            if scaling.softcap is not None:
                assert told.log_probs is not None
                # A weight that came to 0 has lost its logit. Of such tokens only the label is pulled at: its is known.
                log_p.scatter_(1, labels[tile, None], told.log_probs[tile])
                z = log_p + (told.top[tile] + told.total[tile].log())
                slope = 1 - z.mul_(scaling.temperature / scaling.softcap).square_()
            _pull(p, log_p, labels, tile, scaling.temperature, told, by_log_prob, by_entropy)
            gradient[tile] = p if slope is None else p.mul_(slope)
        else:
            pull = torch.zeros_like(told.total) if by_log_prob is None else by_log_prob
            pull = pull[tile] / scaling.temperature
            gradient[tile] = p.mul_(-pull / told.total[tile]).scatter_add_(1, labels[tile, None], pull)


def _pull(
    p: Float[Tensor, "rows vocab"],
    log_p: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    tile: slice,
    temperature: float,
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    """Probabilities of a tile become what pulls at their logits; `log_p` is used up."""
    pull = torch.zeros_like(told.total[tile]) if by_log_prob is None else by_log_prob[tile] / temperature
    if by_entropy is None:
        p.mul_(-pull)
    else:
        assert told.entropy is not None
        spread = by_entropy[tile] / temperature
        p.mul_(log_p.clamp_(min=_NEVER).add_(told.entropy[tile]).mul_(-spread).sub_(pull))
    if labels is not None:
        p.scatter_add_(1, labels[tile, None], pull)


def join(parts: list[Statistics]) -> Statistics:
    """Of parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    columns = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    return Statistics(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]


def _uses_kernels(logits: Float[Tensor, "rows vocab"]) -> bool:
    """One answer for one tensor: by it `measure` decides what to keep, and `turn_into_gradient` what it was given."""
    return (
        logits.device.type in _KERNEL_DEVICES
        and logits.dtype in _KERNEL_TYPES
        and logits.numel() > 0
        and logits.stride(1) == 1
        and not torch.compiler.is_compiling()
        and _is_proven(logits.device, logits.dtype)
    )


@functools.cache
def _is_proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there and agree with the tiles: tried once, so that no run ever breaks on them."""
    try:
        if find_spec("triton") is None:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            worst = _disagreement(device, dtype)
        seen = f"differ from torch by {worst:.3g} times what rounding explains"
    except Exception as error:
        worst, seen = float("inf"), f"fail ({type(error).__name__}: {error})".replace("\n", " ")
    # A NaN is no agreement.
    if worst <= 1:
        return True
    warnings.warn(f"Triton kernels on {device} in {dtype} {seen}: torch is used in their place", stacklevel=2)
    return False


def _disagreement(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between kernels and float64 tiles, over what rounding explains, of logits of every kind.

    They fill blocks in part, cannot come, cannot come for a whole block; with each slope alone, and with both.
    """
    logits = torch.arange(3 * 9001.0).sin_().mul_(8).view(3, -1).to(device, dtype)
    logits[0, 9000] = logits[1, :5000] = -float("inf")
    labels = torch.tensor([0, 8999, 4097], device=device)
    g, g_entropy = torch.tensor([[[1.0], [-2.0], [0.5]], [[-1.0], [0.25], [3.0]]], device=device)
    worst = [0.0]
    for scaling in (Scaling(), Scaling(0.7, 20.0)):
        told, exact = _measure_by_kernel(logits, labels, scaling), logits.double()
        wide = measure(exact, labels, scaling, with_entropy=True, keeps_weights=True)
        worst += [_excess(mine, truth, 3e-5) for mine, truth in zip(told, wide, strict=True)]
        for slopes in ((g, None), (None, g_entropy), (g, g_entropy)):
            gradient, truth = torch.full_like(logits, float("nan")), torch.empty_like(exact)
            pulled = None if slopes[0] is None else labels
            _write_by_kernel(logits, gradient, pulled, scaling, told, *slopes)
            exact_slopes = (None if slope is None else slope.double() for slope in slopes)
            turn_into_gradient(exact, truth, labels, scaling, wide, *exact_slopes)
            worst.append(_excess(gradient, truth, max(3e-5, torch.finfo(dtype).eps)))
    # Not max(): that passes over a NaN.
    return float(torch.tensor(worst).amax())


def _excess(mine: Tensor | None, truth: Tensor | None, relative: float) -> float:
    """The largest difference, over this share of the truth and next to nothing."""
    assert mine is not None
    assert truth is not None
    return float(((mine - truth).abs() / (1e-6 + relative * truth.abs())).amax())


def _measure_by_kernel(
    logits: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"] | None, scaling: Scaling
) -> Statistics:
    """What `measure` tells; imported here, for Triton is not everywhere."""
    from grpo_core.scoring import _triton

    return Statistics(*_triton.measure(logits, labels, *scaling))


def _write_by_kernel(
    logits: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    labels: Int[Tensor, " rows"] | None,
    scaling: Scaling,
    told: Statistics,
    by_log_prob: Float[Tensor, "rows 1"] | None,
    by_entropy: Float[Tensor, "rows 1"] | None,
) -> None:
    """What `write_gradient` and `turn_into_gradient` write, from the logits."""
    from grpo_core.scoring import _triton

    top, total, entropy = told[1:]
    _triton.write_gradient(logits, gradient, labels, *scaling, top, total, entropy, by_log_prob, by_entropy)


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
