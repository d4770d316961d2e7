"""Selection of the tokens and responses that enter a loss, by statistics of the given batch."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import compute_log_ratio, mean_over_response, zero_outside_mask
from grpo_core.tensor_types import Advantages


@shape_checked
def select_high_covariance(
    advantages: Advantages,
    log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    fraction: float,
    *,
    low: float = 0.0,
    high: float = math.inf,
) -> Bool[Tensor, "batch seq"]:
    r"""Select the share $f$ of tokens with the highest $(A_{it} - \bar A)(\ell_{it} - \bar \ell)$, $\ell = \log \pi$.

    The means run over all given response tokens. Call it once on the whole optimizer batch, with the log-probs from
    before the update, so that the selection does not depend on how the batch is split. Clip-Cov drops the selected
    tokens from its loss (the paper draws them at random, with $l = 1$ and $h = 5$), and KL-Cov penalizes them. Tokens
    that tie with the last selected token are selected too. Detached; False outside the mask, where no value is read.

    Args:
        advantages: $A$: one column, or one value per token.
        log_probs: $\log \pi$ of each token, in nats.
        response_mask: True where a token belongs to a response.
        fraction: $f$ in $[0, 1]$; it selects $\lfloor f n \rfloor$ of the $n$ response tokens, but at least 1 if $f >
            0$.
        low: $l$; the covariance must exceed it. The default selects only tokens with a positive covariance.
        high: $h$; the covariance must be below it.

    Returns:
        True for the selected tokens.

    Raises:
        ValueError: if `fraction` is not in $[0, 1]$.

    Examples:
        >>> advantages, log_probs = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0, -0.5], [-3.0, -1.0]])
        >>> select_high_covariance(advantages, log_probs, torch.ones(2, 2).bool(), 0.25)
        tensor([[False, False],
                [ True, False]])

    References:
        Cui et al. 2025, arXiv:2505.22617 (Clip-Cov and KL-Cov).
    """
    require(0 <= fraction <= 1, "fraction", fraction, "between 0 and 1")
    values = zero_outside_mask(advantages.detach().double().expand(response_mask.shape), response_mask)
    scores = zero_outside_mask(log_probs.detach().double(), response_mask)
    count = response_mask.sum().clamp(min=1)
    covariance = (values - values.sum() / count) * (scores - scores.sum() / count)
    candidates = response_mask & (covariance > low) & (covariance < high)
    n_selected = max(1, math.floor(fraction * int(response_mask.sum()) + 1e-9)) if fraction > 0 else 0
    return _select_largest(covariance, candidates, n_selected)


@shape_checked
def select_high_entropy(
    token_entropy: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"], fraction: float
) -> Bool[Tensor, "batch seq"]:
    r"""Select the share $f$ of response tokens with the highest entropy, at which the course of a response is decided.

    The threshold is taken over all given tokens, so call it once on the whole optimizer batch. Tokens that tie with
    the last selected token are selected too. Detached; False outside the mask, where no value is read.

    Args:
        token_entropy: entropy of the distribution of each token, in nats.
        response_mask: True where a token belongs to a response.
        fraction: $f$ in $[0, 1]$; it selects $\lceil f n \rceil$ of the $n$ response tokens. The paper uses 0.2.

    Returns:
        True for the selected tokens.

    Raises:
        ValueError: if `fraction` is not in $[0, 1]$.

    Examples:
        >>> select_high_entropy(torch.tensor([[0.1, 0.9, 0.5]]), torch.ones(1, 3).bool(), 0.5)
        tensor([[False,  True,  True]])

    References:
        Wang et al. 2025, arXiv:2506.01939 (the 80/20 rule).
    """
    require(0 <= fraction <= 1, "fraction", fraction, "between 0 and 1")
    # 0.07 * 100 is 7.000000000000001, and this rounding error must not add a token.
    n_selected = math.ceil(fraction * int(response_mask.sum()) - 1e-9)
    return _select_largest(token_entropy.detach(), response_mask, n_selected)


@shape_checked
def keep_on_policy_sequences(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    behavior_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    threshold: float,
) -> Bool[Tensor, "batch 1"]:
    r"""Return $M_i = 0$ where $A_i < 0$ and $\operatorname{mean}_t (\log \pi_b - \log \pi_\theta) > \delta$, else 1.

    This off-policy sequence mask drops a response with a negative advantage once the policy has moved far away from
    it. It considers each response separately, so the split into micro-batches does not matter. Detached; no value
    outside the mask is read. True for a response without tokens.

    Args:
        advantages: $A_i$.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats, under the current policy.
        behavior_log_probs: $\log \pi_b$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to the response.
        threshold: $\delta$, in nats per token.

    Returns:
        True for the responses to keep.

    Examples:
        >>> policy, old, mask = torch.tensor([[-3.0], [-3.0]]), torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1).bool()
        >>> keep_on_policy_sequences(torch.tensor([[-1.0], [1.0]]), policy, old, mask, 0.5)
        tensor([[False],
                [ True]])

    References:
        DeepSeek-AI 2025, arXiv:2512.02556 (DeepSeek-V3.2, off-policy sequence masking).
    """
    divergence = -mean_over_response(
        compute_log_ratio(policy_log_probs.detach(), behavior_log_probs, response_mask), response_mask
    )
    return ~((advantages < 0) & (divergence > threshold))


@shape_checked
def keep_within_second_moment(
    policy_log_probs: Float[Tensor, "batch seq"],
    behavior_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    threshold: float,
) -> Bool[Tensor, "batch seq"]:
    r"""Keep the tokens of smallest $(\log \rho_{it})^2$, as many as have a mean of at most $\tau$ (M2PO).

    $\log \rho = \log \pi - \log \pi_b$. The tokens of largest square are dropped one after the other until the mean
    of the others is at most $\tau$, which drops only the few tokens that are far from the policy that sampled them.
    The mean runs over all given response tokens, so call the function once on the whole optimizer batch. Tokens that
    tie with a dropped token are dropped too, and so are those whose log ratio is NaN or infinite. If no token is close
    enough, none is kept. Detached; False outside the mask, where no value is read.

    Args:
        policy_log_probs: $\log \pi$ of each token, in nats, under the trainer's policy before the update.
        behavior_log_probs: $\log \pi_b$ of each token, in nats, under the policy that sampled it.
        response_mask: True where a token belongs to a response.
        threshold: $\tau \ge 0$, in nats squared. The paper uses 0.04.

    Returns:
        True for the tokens to keep, for `compute_token_weights(kept=...)`.

    Raises:
        ValueError: if `threshold` is negative.

    Examples:
        >>> policy, old = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.1, -0.8, -2.0]])
        >>> keep_within_second_moment(policy, old, torch.ones(1, 3).bool(), 0.04)
        tensor([[ True,  True, False]])

    References:
        Zheng et al. 2025, arXiv:2510.01161 (M2PO).
    """
    require(threshold >= 0, "threshold", threshold, "at least 0: it bounds a mean of squares")
    log_ratio = compute_log_ratio(policy_log_probs.detach().double(), behavior_log_probs.double(), response_mask)
    squares = log_ratio.square().nan_to_num(math.inf, math.inf)
    ordered = squares[response_mask].sort().values
    # The mean of the smallest squares grows with their number.
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    n_kept = int((means <= threshold).sum())
    return response_mask & (squares < ordered[n_kept]) if n_kept < len(ordered) else response_mask.clone()


@shape_checked
def drop_truncated_responses(
    response_mask: Bool[Tensor, "batch seq"], truncated: Bool[Tensor, " batch"]
) -> Bool[Tensor, "batch seq"]:
    r"""Return the mask with $m_{it} = 0$ for every token of a truncated response (overlong filtering).

    Apply it before `compute_token_weights`. The tokens of truncated responses then count in no denominator, and
    `empty_responses` of that function decides whether the responses count. Their rewards still enter the advantages of
    their groups.

    Args:
        response_mask: True where a token belongs to a response.
        truncated: True where the length limit ended the response.

    Returns:
        The mask without the truncated responses.

    Examples:
        >>> drop_truncated_responses(torch.ones(2, 2).bool(), torch.tensor([True, False]))
        tensor([[False, False],
                [ True,  True]])

    References:
        Yu et al. 2025, arXiv:2503.14476 (DAPO, overlong filtering).
    """
    return response_mask & ~truncated[:, None]


def _select_largest(
    values: Float[Tensor, "batch seq"], candidates: Bool[Tensor, "batch seq"], count: int
) -> Bool[Tensor, "batch seq"]:
    """Return the candidates with the `count` largest values, and those that tie with the last of these."""
    candidate_values = values[candidates]
    count = min(count, len(candidate_values))
    if count == 0:
        return torch.zeros_like(candidates)
    threshold = candidate_values.topk(count).values[-1]
    return candidates & (values >= threshold)
