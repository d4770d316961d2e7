"""An advantage of each token: the reward against a baseline that weighs responses by the gradient they had so far."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core._groups import list_group_sizes, split_groups
from grpo_core.types import GroupSizes


@shape_checked
def compute_otb_advantages(
    rewards: Float[Tensor, " rollout"],
    group_sizes: GroupSizes,
    log_probs: Float[Tensor, "rollout seq"],
    collision_probs: Float[Tensor, "rollout seq"],
    response_mask: Bool[Tensor, "rollout seq"],
) -> Float[Tensor, "rollout seq"]:
    r"""Return $A_{it} = r_i - \sum_j W_{jt} r_j \big/ \sum_j W_{jt}$, with an optimal baseline of each token (OTB).

    $W_{jt} = \sum_{s \le t} \bigl(1 - 2 \pi(o_{js}) + \sum_v \pi_v^2\bigr)$ is the squared gradient of the response's
    log-prob up to token $t$ in the logits. So responses of which the policy was unsure decide the baseline. The sums
    run over the scored responses of the group that have a token $t$. For the first token, no other number as baseline
    gives this gradient a smaller variance. As with a group mean, the response itself is part of its baseline. In units
    of reward; detached; no value outside the mask is read. Exactly 0 outside the mask, for a group without signal, for
    a response that could not be scored, where no other response has a token, and where every policy was certain.

    Args:
        rewards: $r$, group after group; NaN or infinite where a response could not be scored.
        group_sizes: $G$: one number for all groups, or one per group.
        log_probs: $\log \pi$ of each token, in nats, before the update.
        collision_probs: $\sum_v \pi_v^2$ of each token's distribution, as `compute_collision_probs` returns it.
        response_mask: True where a token belongs to a response.

    Returns:
        The advantage of each token.

    Raises:
        ValueError: if the rollouts do not fill the groups.

    Examples:
        >>> log_probs, mask = torch.tensor([[0.5], [0.8]]).log(), torch.ones(2, 1).bool()
        >>> compute_otb_advantages(torch.tensor([1.0, 0.0]), 2, log_probs, torch.tensor([[0.5], [0.68]]), mask)
        tensor([[ 0.1379],
                [-0.8621]])

    References:
        Li et al. 2026, arXiv:2602.07078, with the logit-gradient proxy; `handle_zero_tail=False` in verl.
    """
    sizes = torch.tensor(list_group_sizes(len(rewards), group_sizes), device=rewards.device, dtype=torch.long)
    group_of = torch.repeat_interleave(sizes)
    groups = split_groups(rewards, group_sizes)
    scores = groups.rewards[groups.present][:, None]
    mask = response_mask & (groups.scored & groups.has_signal)[groups.present][:, None]

    def sum_group(values: Float[Tensor, "rollout seq"]) -> Float[Tensor, "rollout seq"]:
        """Return the sum over the group of each response."""
        return values.new_zeros(len(sizes), values.shape[1]).index_add_(0, group_of, values)[group_of]

    squares = 1 - 2 * log_probs.detach().double().exp() + collision_probs.detach().double()
    # Rounding makes the square of a certain token slightly negative.
    weights = torch.where(mask, squares, 0.0).clamp(min=0).cumsum(dim=1) * mask
    total = sum_group(weights)
    baseline = sum_group(weights * scores) / torch.where(total > 0, total, 1.0)
    has_baseline = (total > 0) & (sum_group(mask.double()) > 1)
    return torch.where(mask & has_baseline, scores - baseline, 0.0).to(groups.dtype)
