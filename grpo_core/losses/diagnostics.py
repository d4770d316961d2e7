"""Diagnostics of the gradient of a loss."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked


@shape_checked
def compute_gradient_share(
    log_prob_gradients: Float[Tensor, "batch seq"], selected: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    r"""Return $\sum_{i \in S} \sum_t \lvert g_{it} \rvert \big/ \sum_{it} \lvert g_{it} \rvert$ for the responses $S$.

    $g_{it} = \partial L / \partial \log \pi_\theta(o_{it})$. The result is the share of the gradient that comes from
    the selected responses, such as those with a positive advantage or the long ones. The shares of selections that
    partition the batch add up to 1. The share is 0 if the gradient is 0 everywhere. Detached.

    Args:
        log_prob_gradients: $g$, the gradient of the loss in the log-probability of each token.
        selected: True for the responses in $S$.

    Returns:
        The share, in $[0, 1]$.

    Examples:
        >>> compute_gradient_share(torch.tensor([[1.0, -2.0], [1.0, 0.0]]), torch.tensor([True, False]))
        tensor(0.7500)
    """
    magnitude = log_prob_gradients.detach().abs().sum(dim=1)
    total = magnitude.sum()
    return torch.where(selected, magnitude, 0.0).sum() / torch.where(total > 0, total, 1.0)
