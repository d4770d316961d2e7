"""Log-probabilities of given tokens under a model."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grpo_core._checks import shape_checked
from grpo_core.scoring._forward import logits_at
from grpo_core.scoring.distributions import measure_logits


@shape_checked
def get_response_log_probs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    return_token_entropy: bool = False,
    *,
    temperature: float = 1.0,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
    detach_entropy: bool = False,
) -> dict[str, Float[Tensor, "batch seq"]]:
    r"""$\log \pi_\theta(y_t \mid x_{\le t})$ of each label, in nats, and on request the entropy of each distribution.

    Differentiable in the parameters of the model, through log-probability and entropy alike; wrap the call in
    `torch.no_grad()` for old log-probabilities. The model must be causal and the padding on the right: then no token
    sees padding, and no attention mask is needed. Dropout is the caller's affair (`model.eval()`).

    Args:
        model: called as `model(input_ids)`, returns an object with `.logits` of shape "batch seq vocab".
        input_ids: $x$, token ids of prompt and response, padded on the right.
        labels: $y$, the token after each of them.
        return_token_entropy: whether to return `token_entropy` too.
        temperature: $T > 0$ the tokens were sampled at; logits are divided by it.
        response_mask: where given, only these positions are scored. Columns that no row needs never become logits, if
            the model's `forward` takes `logits_to_keep`, as Hugging Face's do; other labels may hold anything.
        detach_entropy: True for an entropy that is only looked at: without a gradient, and nothing kept for one.

    Returns:
        `log_probs`, in nats; `token_entropy`, in nats, if asked for. Both are exactly 0 outside `response_mask`.

    Raises:
        ValueError: if `temperature` is not positive and finite, or a label lies outside the vocabulary.

    Example:
        >>> from types import SimpleNamespace
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))
        >>> get_response_log_probs(Uniform(), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
        {'log_probs': tensor([[-0.6931, -0.6931]])}
    """
    if response_mask is None:
        logits = logits_at(model, input_ids, None)
        return score_logits(logits, labels, return_token_entropy, temperature, detach_entropy)
    columns = response_mask.any(dim=0).nonzero().squeeze(dim=1)
    kept = response_mask[:, columns]
    # Token 0 stands in for the labels that nobody asked about, which may be no token at all (-100).
    kept_labels = torch.where(kept, labels[:, columns], 0)
    logits = logits_at(model, input_ids, columns)
    scores = score_logits(logits, kept_labels, return_token_entropy, temperature, detach_entropy)
    return {name: _spread(score, kept, columns, labels.shape[1]) for name, score in scores.items()}


def score_logits(
    logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"],
    return_token_entropy: bool,
    temperature: float,
    detach_entropy: bool,
) -> dict[str, Float[Tensor, "*batch"]]:
    """`log_probs` of the labels and, if asked for, `token_entropy` of each distribution."""
    log_probs, entropy = measure_logits(logits, labels, temperature, return_token_entropy)
    if not return_token_entropy:
        return {"log_probs": log_probs}
    return {"log_probs": log_probs, "token_entropy": entropy.detach() if detach_entropy else entropy}


def _spread(
    values: Float[Tensor, "batch kept"], mask: Bool[Tensor, "batch kept"], columns: Int[Tensor, " kept"], seq: int
) -> Float[Tensor, "batch seq"]:
    """`values` back in their columns, 0 wherever nothing was asked for."""
    return values.new_zeros(len(values), seq).index_copy(1, columns, torch.where(mask, values, 0.0))
