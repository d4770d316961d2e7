"""Where the gradient of a loss comes from."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked


@shape_checked
def compute_gradient_share(
    log_prob_gradients: Float[Tensor, "batch seq"], selected: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    r"""$\sum_{i \in S} \sum_t \lvert g_{it} \rvert \big/ \sum_{it} \lvert g_{it} \rvert$: where a gradient comes from.

    $g_{it} = \partial L / \partial \log \pi_\theta(o_{it})$: how much of the pull on the policy comes from the
    selected responses: those with a positive advantage, or the long ones. Shares of selections that part the batch add
    up to 1. 0 where there is no gradient at all.

    Args:
        log_prob_gradients: $g$, the gradient of the loss in the log-probability of each token.
        selected: True for the responses of $S$.

    Returns:
        The share, in $[0, 1]$.

    Example:
        >>> compute_gradient_share(torch.tensor([[1.0, -2.0], [1.0, 0.0]]), torch.tensor([True, False]))
        tensor(0.7500)
    """
    pull = log_prob_gradients.detach().abs().sum(dim=1)
    total = pull.sum()
    return torch.where(selected, pull, 0.0).sum() / torch.where(total > 0, total, 1.0)
