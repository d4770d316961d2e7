"""From the logits of a vocabulary to one number per token."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import is_traced, shape_checked
from grpo_core.scoring._softmax_stats import (
    Scaling,
    Statistics,
    check_labels,
    join,
    measure,
    wide_type,
    write_gradient,
)


@shape_checked
def compute_entropy(logits: Float[Tensor, "*batch vocab"], *, temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    r"""$H = \log \sum_v e^{z_v} - \sum_v p_v z_v$, $p = \operatorname{softmax}(z)$, $z = \text{logits} / T$, in nats.

    Differentiable in `logits`: $\partial H / \partial z_v = -p_v (\log p_v + H)$. A logit of $-\infty$, a token that
    cannot come, adds 0 to the value and gets gradient 0. A row of nothing but $-\infty$ is no distribution: NaN.

    Args:
        logits: unnormalized log-probabilities of each token of the vocabulary; bfloat16 and float16 are promoted.
        temperature: $T > 0$ of the sampled distribution.

    Returns:
        The entropy of each distribution, in $[0, \log V]$ nats, in float32 or the wider type of `logits`.

    Raises:
        ValueError: if `temperature` is not positive and finite.

    Example:
        >>> compute_entropy(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
        tensor([0.6931, 0.0000])

    References:
        Shannon 1948, "A Mathematical Theory of Communication", section 6.
    """
    entropy: Tensor = measure_logits(logits, None, temperature, with_entropy=True)[1]
    return entropy


@shape_checked
def select_log_probs(
    logits: Float[Tensor, "*batch vocab"], labels: Int[Tensor, "*batch"], *, temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    r"""$\log p_y = z_y - \log \sum_v e^{z_v}$, $z = \text{logits} / T$: log-probability of each label, in nats.

    Differentiable in `logits`: $\partial \log p_y / \partial z_v = 1[v = y] - p_v$. No log-softmax over the vocabulary
    is kept, only its two terms. A label whose logit is $-\infty$ has log-probability $-\infty$.

    Args:
        logits: unnormalized log-probabilities of each token of the vocabulary; bfloat16 and float16 are promoted.
        labels: $y$, token ids in $[0, V)$; there is no "ignore" label, masks do that job.
        temperature: $T > 0$ of the sampled distribution.

    Returns:
        The log-probability of each label, at most 0, in float32 or the wider type of `logits`.

    Raises:
        ValueError: if `temperature` is not positive and finite, or a label lies outside the vocabulary (on a CPU; a
            GPU reports that by its own assertion, for looking would make it wait).

    Example:
        >>> select_log_probs(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), torch.tensor([1, 0]))
        tensor([-0.6931,  0.0000])
    """
    log_probs: Tensor = measure_logits(logits, labels, temperature, with_entropy=False)[0]
    return log_probs


def measure_logits(
    logits: Float[Tensor, "*batch vocab"], labels: Int[Tensor, "*batch"] | None, temperature: float, with_entropy: bool
) -> tuple[Any, Any]:
    """Both of the above from one sweep, None where there are no labels or no entropy is asked for."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; for greedy decoding take the argmax")
    if is_traced():
        return _plain_expressions(logits, labels, temperature, with_entropy)
    flat = None if labels is None else labels.reshape(-1).long()
    if flat is not None:
        check_labels(flat, logits.shape[-1])
    values = _Measured.apply(logits, flat, temperature, with_entropy)  # type: ignore[no-untyped-call]
    log_probs, entropy = (None if value is None else value.view(logits.shape[:-1]) for value in values)
    return log_probs, entropy


class _Measured(torch.autograd.Function):
    """Eager torch would keep, and pass over, several tensors of the size of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, temperature: float, with_entropy: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        scaling = Scaling(temperature)
        parts = [
            measure(rows, None if labels is None else labels[place], scaling, with_entropy=with_entropy)
            for place, rows in _row_views(logits)
        ]
        told = join(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, told.top, told.total, told.entropy)
        ctx.temperature = temperature
        return told.results()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if by_log_prob is None and by_entropy is None:
            return (None,) * 4
        logits, labels, *told = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows_of_gradient = gradient.view(-1, logits.shape[-1])
        for place, rows in _row_views(logits):
            slopes = (None if slope is None else slope[place, None] for slope in (by_log_prob, by_entropy))
            # Without a pull on the label's log-prob there is none on the label.
            pulled = None if by_log_prob is None else labels[place]
            part = Statistics(None, *(None if value is None else value[place] for value in told))  # type: ignore[arg-type]
            write_gradient(rows, rows_of_gradient[place], pulled, ctx.temperature, part, *slopes)
        return gradient, None, None, None


def _row_views(logits: Float[Tensor, "*batch vocab"]) -> Iterator[tuple[slice, Float[Tensor, "rows vocab"]]]:
    """All rows where they lie: at once, or part by part where memory has gaps, as in `logits[:, :-1]`. No copy."""
    start, waiting = 0, [logits]
    while waiting:
        part = waiting.pop(0)
        try:
            rows = part.view(-1, part.shape[-1])
        except RuntimeError:
            waiting[:0] = part.unbind(0)
            continue
        yield slice(start, start + len(rows)), rows
        start += len(rows)


def _plain_expressions(
    logits: Float[Tensor, "*batch vocab"], labels: Int[Tensor, "*batch"] | None, temperature: float, with_entropy: bool
) -> tuple[Any, Any]:
    """The same for torch.compile, which fuses them, and torch.func, which takes them apart."""
    z = logits.to(wide_type(logits)) / temperature
    # Neither value feels a shift. With the maximum at 0 no digit is lost to it.
    z = z - z.amax(dim=-1, keepdim=True).detach()
    normalizer, log_probs, entropy = z.logsumexp(dim=-1), None, None
    if labels is not None:
        log_probs = z.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1) - normalizer
    if with_entropy:
        # 0 * -inf is NaN, in the value and again in the gradient: the product never sees the infinity.
        reachable = torch.where(z == -math.inf, 0.0, z)
        entropy = normalizer - (z.softmax(dim=-1) * reachable).sum(dim=-1)
    return log_probs, entropy
