"""The loss of a pair of responses, one of which is preferred."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import compute_log_ratio
from grpo_core.tensor_types import Metadata


@shape_checked
def compute_dpo_loss(
    chosen_log_probs: Float[Tensor, "batch seq"],
    rejected_log_probs: Float[Tensor, "batch other"],
    reference_chosen_log_probs: Float[Tensor, "batch seq"],
    reference_rejected_log_probs: Float[Tensor, "batch other"],
    chosen_mask: Bool[Tensor, "batch seq"],
    rejected_mask: Bool[Tensor, "batch other"],
    beta: float,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, "batch 1"], Metadata]:
    r"""Return $\ell_i = -(1 - \epsilon) \log \sigma(\beta m_i) - \epsilon \log \sigma(-\beta m_i)$ of each pair (DPO).

    $m_i = \sum_t \log \frac{\pi_\theta}{\pi_{\mathrm{ref}}}(\text{chosen}_{it}) - \sum_t \log
    \frac{\pi_\theta}{\pi_{\mathrm{ref}}}(\text{rejected}_{it})$. The loss is the negative log-likelihood of the
    preference under the reward $\beta \log (\pi_\theta / \pi_{\mathrm{ref}})$. Differentiable in `chosen_log_probs`
    and `rejected_log_probs`: the gradient is $-g$ at each token of the chosen response and $g$ at each token of the
    rejected one, $g = \beta ((1 - \epsilon)\,\sigma(-\beta m_i) - \epsilon\,\sigma(\beta m_i))$. Where both policies
    are equal, the loss is $\log 2$. No value outside the masks is read. A response without tokens adds 0 to $m_i$.

    Args:
        chosen_log_probs: $\log \pi_\theta$ of each token of the preferred response, in nats.
        rejected_log_probs: $\log \pi_\theta$ of each token of the other response, in nats.
        reference_chosen_log_probs: $\log \pi_{\mathrm{ref}}$ of the preferred response, in nats.
        reference_rejected_log_probs: $\log \pi_{\mathrm{ref}}$ of the other response, in nats.
        chosen_mask: True where a token belongs to the preferred response.
        rejected_mask: True where a token belongs to the other response.
        beta: $\beta > 0$, in units of reward per nat; a larger one stays nearer to the reference.
        label_smoothing: $\epsilon$ in $[0, 0.5)$, the share of preferences that are assumed to be wrong.

    Returns:
        The loss of each pair, and detached metadata, "batch 1" each: `margin`, $\beta m_i$; `is_preferred`, Bool,
        where it is positive.

    Raises:
        ValueError: if `beta` is not positive, or `label_smoothing` is not in $[0, 0.5)$.

    Examples:
        >>> log_probs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
        >>> compute_dpo_loss(log_probs, log_probs - 1, log_probs, log_probs, mask, mask, 0.5)
        (tensor([[0.3133]]), {'margin': tensor([[1.]]), 'is_preferred': tensor([[True]])})

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (DPO); Mitchell 2023, "A note on DPO with noisy preferences"
        (label smoothing).
    """
    require(beta > 0, "beta", beta, "positive")
    require(0 <= label_smoothing < 0.5, "label_smoothing", label_smoothing, "at least 0 and below 0.5")
    chosen = compute_log_ratio(chosen_log_probs, reference_chosen_log_probs, chosen_mask)
    rejected = compute_log_ratio(rejected_log_probs, reference_rejected_log_probs, rejected_mask)
    margin = beta * (chosen.sum(dim=1, keepdim=True) - rejected.sum(dim=1, keepdim=True))
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)
    margin = margin.detach()
    return losses, {"margin": margin, "is_preferred": margin > 0}
