"""Entropy and log-probabilities of the distributions that logits define."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import is_traced, shape_checked
from grpo_core.scoring._softmax_stats import (
    Scaling,
    SoftmaxStats,
    StatsGrad,
    check_labels,
    compute_softmax_stats,
    concatenate_stats,
    get_wide_dtype,
    write_gradient,
)
from grpo_core.scoring._token_sets import EVERYTHING, TokenSets


@shape_checked
def compute_entropy(
    logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float = 1.0,
    kept_ids: Int[Tensor, "*batch kept"] | None = None,
    excluded_ids: Int[Tensor, "*batch excluded"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Return $H = \log \sum_v e^{z_v} - \sum_v p_v z_v$ with $z = \text{logits} / T$, in nats.

    $p = \operatorname{softmax}(z)$. Differentiable in `logits`: $\partial H / \partial z_v = -p_v (\log p_v + H)$. A
    logit of $-\infty$ (an impossible token) adds 0 to the entropy and gets gradient 0. A row of only $-\infty$ is not
    a distribution and gives NaN.

    Args:
        logits: unnormalized log-probabilities over the vocabulary; bfloat16 and float16 are promoted to float32.
        temperature: $T > 0$ of the sampled distribution.
        kept_ids: if given, the distribution is the softmax over these tokens, as in `select_log_probs`.
        excluded_ids: tokens outside of the softmax, as in `select_log_probs`.

    Returns:
        The entropy of each distribution, in $[0, \log V]$ nats, in float32 or the wider type of `logits`.

    Raises:
        ValueError: if `temperature` is not positive and finite, or an id lies outside the vocabulary (checked on a CPU
            only).

    Examples:
        >>> compute_entropy(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
        tensor([0.6931, 0.0000])
        >>> compute_entropy(torch.zeros(1, 9), kept_ids=torch.tensor([[3, 5, -1]]))
        tensor([0.6931])

    References:
        Shannon 1948, "A Mathematical Theory of Communication", section 6.
    """
    sets = TokenSets(kept_ids, excluded_ids)
    entropy: Tensor = compute_log_probs_and_entropy(logits, None, temperature, with_entropy=True, sets=sets)[1]
    return entropy


@shape_checked
def select_log_probs(
    logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"],
    *,
    temperature: float = 1.0,
    kept_ids: Int[Tensor, "*batch kept"] | None = None,
    excluded_ids: Int[Tensor, "*batch excluded"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Return $\log p_y = z_y - \log \sum_{v \in S} e^{z_v}$ with $z = \text{logits} / T$, in nats.

    This is the log-probability of each label. Differentiable in `logits`: $\partial \log p_y / \partial z_v = 1[v = y]
    - p_v$. No log-softmax over the vocabulary is stored. A label whose logit is $-\infty$ has log-probability
    $-\infty$.

    $S$ is the vocabulary. A sampler that truncates (top-k, top-p, min-p) or hides tokens draws from the softmax over
    fewer. With its set as $S$, both sides of an importance ratio have the same support. Tokens outside of $S$ have
    probability 0 and get gradient 0, because a set is a constant. Sets cost one copy of the logits.

    Args:
        logits: unnormalized log-probabilities over the vocabulary; bfloat16 and float16 are promoted to float32.
        labels: $y$, token ids in $[0, V)$. No label value is ignored; use masks instead.
        temperature: $T > 0$ of the sampled distribution.
        kept_ids: if given, $S$ holds these tokens only. -1 is padding; a token may occur twice.
        excluded_ids: if given, $S$ does not hold these tokens, even if `kept_ids` does. -1 is padding.

    Returns:
        The log-probability of each label, at most 0, in float32 or the wider type of `logits`.

    Raises:
        ValueError: if `temperature` is not positive and finite, a label or another id lies outside the vocabulary, or
            a label lies outside of its set, as in a row without kept ids. Ids are checked on a CPU only, because the
            check would make a GPU wait. There, an id outside the vocabulary fails a device assertion, a label outside
            of its set has log-probability $-\infty$, and an empty set gives NaN.

    Examples:
        >>> select_log_probs(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]), torch.tensor([1, 0]))
        tensor([-0.6931,  0.0000])
        >>> select_log_probs(torch.zeros(2, 9), torch.tensor([3, 3]), kept_ids=torch.tensor([[3, 5, -1], [3, 5, 7]]))
        tensor([-0.6931, -1.0986])
        >>> select_log_probs(torch.zeros(1, 4), torch.tensor([3]), excluded_ids=torch.tensor([[0]]))
        tensor([-1.0986])

    References:
        DeepSeek-AI 2025, arXiv:2512.02556, section 3.1 (keep sampling mask).
    """
    sets = TokenSets(kept_ids, excluded_ids)
    log_probs: Tensor = compute_log_probs_and_entropy(logits, labels, temperature, with_entropy=False, sets=sets)[0]
    return log_probs


@shape_checked
def compute_collision_probs(
    log_probs: Float[Tensor, "*batch"], sharpened_log_probs: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""Return $\sum_v \pi_v^2 = \pi(y)^2 / \pi'(y)$, the probability that two samples are equal; $\pi' \propto \pi^2$.

    $\pi'$ is the distribution at half the temperature, so two log-probs of any one token give the sum over the
    vocabulary, and every function that returns log-probs can serve. Detached, and at most 1. NaN for a token of
    probability 0.

    Args:
        log_probs: $\log \pi(y)$ of a token of each distribution, in nats, at temperature $\tau$.
        sharpened_log_probs: $\log \pi'(y)$ of the same token, in nats, at temperature $\tau / 2$.

    Returns:
        The probability for each distribution, from $1 / V$ where all tokens are equally likely to 1.

    Examples:
        >>> logits, labels = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([1])
        >>> log_probs, sharpened = (select_log_probs(logits, labels, temperature=tau) for tau in (1.0, 0.5))
        >>> compute_collision_probs(log_probs, sharpened)
        tensor([0.3750])
    """
    return (2 * log_probs.detach() - sharpened_log_probs.detach()).exp().clamp(max=1.0)


def compute_log_probs_and_entropy(
    logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"] | None,
    temperature: float,
    with_entropy: bool,
    sets: TokenSets = EVERYTHING,
) -> tuple[Any, Any]:
    """Return log-probs (None without labels) and entropies (None if not requested) from one pass over the logits."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite: for greedy decoding, use the argmax")
    if is_traced():
        return _compute_traceable(logits, labels, temperature, with_entropy, sets)
    flat_labels = None if labels is None else rearrange(labels, "... -> (...)").long()
    if flat_labels is not None:
        check_labels(flat_labels, logits.shape[-1])
    sets = sets.flatten()
    sets.check(flat_labels, logits.shape[-1])
    outputs = _SoftmaxStatsOfLogits.apply(logits, flat_labels, temperature, with_entropy, sets)  # type: ignore[no-untyped-call]
    log_probs, entropy = (None if output is None else output.view(logits.shape[:-1]) for output in outputs)
    return log_probs, entropy


class _SoftmaxStatsOfLogits(torch.autograd.Function):
    """Log-probs and entropies with a known gradient; autograd would save several tensors of the size of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, temperature: float, with_entropy: bool, sets: TokenSets
    ) -> tuple[Tensor | None, Tensor | None]:
        scaling = Scaling(temperature)
        if not sets.is_everything:
            logits = logits.clone(memory_format=torch.contiguous_format)
            sets.restrict_(logits.view(-1, logits.shape[-1]))
        parts = [
            compute_softmax_stats(
                row_logits, None if labels is None else labels[rows], scaling, with_entropy=with_entropy
            )
            for rows, row_logits in _iterate_row_views(logits)
        ]
        stats = concatenate_stats(parts)
        ctx.set_materialize_grads(False)
        # The gradient does not need the log-probs.
        ctx.save_for_backward(logits, labels, *stats._replace(log_probs=None))
        ctx.temperature = temperature
        return stats.as_outputs()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 5
        logits, labels, *columns = ctx.saved_tensors
        stats, grad = SoftmaxStats(*columns), StatsGrad.from_outputs(grad_log_probs, grad_entropy)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        gradient_rows = gradient.view(-1, logits.shape[-1])
        for rows, row_logits in _iterate_row_views(logits):
            row_labels = None if grad.log_probs is None else labels[rows]
            write_gradient(
                row_logits, gradient_rows[rows], row_labels, ctx.temperature, stats.select(rows), grad.select(rows)
            )
        return gradient, None, None, None, None


def _iterate_row_views(logits: Float[Tensor, "*batch vocab"]) -> Iterator[tuple[slice, Float[Tensor, "rows vocab"]]]:
    """Yield views of all rows without a copy: one view, or several if memory has gaps, as in `logits[:, :-1]`."""
    start, pending = 0, [logits]
    while pending:
        part = pending.pop(0)
        try:
            rows = part.view(-1, part.shape[-1])
        except RuntimeError:
            pending[:0] = part.unbind(0)
            continue
        yield slice(start, start + len(rows)), rows
        start += len(rows)


def _compute_traceable(
    logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"] | None,
    temperature: float,
    with_entropy: bool,
    sets: TokenSets = EVERYTHING,
) -> tuple[Any, Any]:
    """Return the same values by plain expressions, for torch.compile and torch.func."""
    z = logits.to(get_wide_dtype(logits)) / temperature
    if not sets.is_everything:
        z = torch.where(sets.contains(z.shape[-1]), z, -math.inf)
    # A shift changes neither value, and with a maximum of 0 no digits are lost.
    z = z - z.amax(dim=-1, keepdim=True).detach()
    normalizer, log_probs, entropy = z.logsumexp(dim=-1), None, None
    if labels is not None:
        log_probs = z.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1) - normalizer
    if with_entropy:
        # Replace -inf before the product, because 0 * -inf would be NaN in the value and in the gradient.
        reachable = torch.where(z == -math.inf, 0.0, z)
        entropy = normalizer - (z.softmax(dim=-1) * reachable).sum(dim=-1)
    return log_probs, entropy
