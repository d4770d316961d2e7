"""Log-probabilities of response tokens under a model."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grpo_core._checks import shape_checked
from grpo_core.scoring._forward import compute_logits_at
from grpo_core.scoring.distributions import compute_log_probs_and_entropy


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
    r"""Return $\log \pi_\theta(y_t \mid x_{\le t})$ of each label, in nats, and optionally the entropies.

    Differentiable in the parameters of the model, through log-probabilities and entropies. Wrap the call in
    `torch.no_grad()` to compute old log-probabilities. The model must be causal and the padding on the right, so that
    no token attends to padding and no attention mask is needed. Call `model.eval()` first to switch off dropout.

    Args:
        model: called as `model(input_ids)`; it returns an object with `.logits` of shape "batch seq vocab".
        input_ids: $x$, token ids of prompt and response, padded on the right.
        labels: $y$, the token that follows each input token.
        return_token_entropy: whether to return `token_entropy` too.
        temperature: $T > 0$ at which the tokens were sampled; the logits are divided by it.
        response_mask: if given, only these positions are scored, and labels elsewhere may have any value. For a model
            whose `forward` takes `logits_to_keep`, as in Hugging Face, columns outside the mask of every row get no
            logits.
        detach_entropy: True returns an entropy without gradient, which saves memory if it is only monitored.

    Returns:
        `log_probs` and, if requested, `token_entropy`, both in nats and exactly 0 outside `response_mask`.

    Raises:
        ValueError: if `temperature` is not positive and finite, or a label lies outside the vocabulary.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids):
        ...         return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 2))
        >>> get_response_log_probs(Uniform(), torch.tensor([[0, 1]]), torch.tensor([[1, 1]]))
        {'log_probs': tensor([[-0.6931, -0.6931]])}
    """
    if response_mask is None:
        logits = compute_logits_at(model, input_ids, None)
        return score_logits(logits, labels, return_token_entropy, temperature, detach_entropy)
    columns = response_mask.any(dim=0).nonzero().squeeze(dim=1)
    kept = response_mask[:, columns]
    # Labels outside the mask may be no token id, such as -100, so replace them by token 0.
    kept_labels = torch.where(kept, labels[:, columns], 0)
    logits = compute_logits_at(model, input_ids, columns)
    scores = score_logits(logits, kept_labels, return_token_entropy, temperature, detach_entropy)
    return {name: _scatter_columns(score, kept, columns, labels.shape[1]) for name, score in scores.items()}


def score_logits(
    logits: Float[Tensor, "*batch vocab"],
    labels: Int[Tensor, "*batch"],
    return_token_entropy: bool,
    temperature: float,
    detach_entropy: bool,
) -> dict[str, Float[Tensor, "*batch"]]:
    """Return `log_probs` of the labels and, if requested, `token_entropy` of each distribution."""
    log_probs, entropy = compute_log_probs_and_entropy(logits, labels, temperature, return_token_entropy)
    if not return_token_entropy:
        return {"log_probs": log_probs}
    return {"log_probs": log_probs, "token_entropy": entropy.detach() if detach_entropy else entropy}


def _scatter_columns(
    values: Float[Tensor, "batch kept"], mask: Bool[Tensor, "batch kept"], columns: Int[Tensor, " kept"], seq: int
) -> Float[Tensor, "batch seq"]:
    """Return `values` in their columns of the full sequence, 0 outside the mask."""
    return values.new_zeros(len(values), seq).index_copy(1, columns, torch.where(mask, values, 0.0))
