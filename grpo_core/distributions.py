"""From the logits of a vocabulary to one number per token."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core._check import shape_checked


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
    scaled = _scale(logits, temperature)
    # H does not feel a shift. With the maximum at 0 neither term is negative, and neither loses digits to the offset.
    shifted = scaled - scaled.amax(dim=-1, keepdim=True).detach()
    # 0 * -inf is NaN, in the value and again in the gradient: the product never sees the infinity.
    reachable = torch.where(shifted == -math.inf, 0.0, shifted)
    return shifted.logsumexp(dim=-1) - (shifted.softmax(dim=-1) * reachable).sum(dim=-1)


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
    scaled = _scale(logits, temperature)
    return _logits_of(scaled, labels) - scaled.logsumexp(dim=-1)


def _scale(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch vocab"]:
    """Logits over the temperature, in at least float32."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite; for greedy decoding take the argmax")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The logits of a batch are the largest tensor of the step: no copy is made of them where none is needed.
    return wide if temperature == 1 else wide / temperature


def _logits_of(logits: Float[Tensor, "*batch vocab"], labels: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The logit of each label; a ValueError in place of gather's own message if a label is out of range."""
    try:
        return logits.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    except RuntimeError as error:
        low, high, vocab = int(labels.min()), int(labels.max()), logits.shape[-1]
        if low >= 0 and high < vocab:
            raise
        raise ValueError(
            f"labels run from {low} to {high} but the vocabulary has {vocab} tokens: every label must be in"
            f" [0, {vocab}), those of masked positions too"
        ) from error
