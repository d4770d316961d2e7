"""The clipped GRPO loss computed from hidden states, one block of logits at a time."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_core._checks import disable_compile, shape_checked
from grpo_core.losses.aggregation import compute_token_weights, sum_weighted_losses
from grpo_core.losses.policy_gradient import compute_grpo_clip_loss
from grpo_core.scoring.fused_head import fused_linear_token_loss
from grpo_core.tensor_types import Advantages, Metadata


@disable_compile
@shape_checked
def fused_linear_grpo_loss(
    hidden: Float[Tensor, "batch seq width"],
    lm_head_weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, "batch seq"],
    *,
    response_mask: Bool[Tensor, "batch seq"],
    advantages: Advantages,
    old_log_probs: Float[Tensor, "batch seq"] | None,
    cliprange: float,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Float[Tensor, "batch seq"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    max_logits_bytes: int | None = None,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Return $L = \sum_{it} w_{it} \ell_{it}$ with $\ell$ of `compute_grpo_clip_loss`, from hidden states.

    Loss and gradient equal those of `compute_grpo_clip_loss` on log-probabilities of the full logits. They are
    computed in one pass over blocks of logits by `fused_linear_token_loss`.

    Args:
        hidden: $h$, the input of the output layer at the position before each label.
        lm_head_weight: $W$ of the output layer.
        labels: $y$, token ids in $[0, V)$; any value where `response_mask` is False.
        response_mask: True where a token belongs to a response.
        advantages: $A$: one column, or one value per token.
        old_log_probs: $\log \pi_{\mathrm{old}}$, in nats; None means on-policy: every ratio has the value 1 and still
            a gradient.
        cliprange: $\epsilon \ge 0$.
        cliprange_high: $\epsilon_h \ge 0$; None uses `cliprange`.
        dual_clip: $c > 1$, or None.
        weights: $w$, this batch's rows of the `compute_token_weights` of the whole optimizer step; None uses the
            "sequence_mean" weights of this batch.
        bias: $b$ of the output layer, if it has one.
        temperature: $T > 0$ of the sampled distribution.
        logit_softcap: $c > 0$ of a model whose logits are $c \tanh((W h + b) / c)$.
        max_logits_bytes: maximum size of a block of logits; the default is that of `fused_linear_log_probs`.

    Returns:
        The loss, and detached `log_probs`, `token_entropy` and flags of `compute_grpo_clip_loss`.

    Raises:
        ValueError: as in `fused_linear_log_probs` and `compute_grpo_clip_loss`.

    Examples:
        >>> import torch
        >>> loss, values = fused_linear_grpo_loss(
        ...     torch.ones(1, 1, 2), torch.zeros(4, 2), torch.tensor([[3]]), response_mask=torch.tensor([[True]]),
        ...     advantages=torch.tensor([[2.0]]), old_log_probs=torch.tensor([[-2.0]]), cliprange=0.2,
        ... )
        >>> loss, values["is_clipped"]
        (tensor(-2.4000), tensor([[True]]))

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 without the KL term.
    """
    step_weights = compute_token_weights(response_mask, "sequence_mean") if weights is None else weights
    bounds: dict[str, Any] = {"cliprange_high": cliprange_high, "dual_clip": dual_clip}

    def loss_fn(log_probs: Tensor, _: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        old = log_probs if old_log_probs is None else take(old_log_probs)
        losses, _flags = compute_grpo_clip_loss(take(advantages), log_probs, old, cliprange, **bounds)
        return sum_weighted_losses(losses, take(step_weights))

    loss, values = fused_linear_token_loss(
        hidden,
        lm_head_weight,
        labels,
        loss_fn,
        response_mask=response_mask,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        max_logits_bytes=max_logits_bytes,
    )
    old = values["log_probs"] if old_log_probs is None else old_log_probs
    _, flags = compute_grpo_clip_loss(
        advantages, values["log_probs"], old, cliprange, response_mask=response_mask, **bounds
    )
    return loss, values | flags
