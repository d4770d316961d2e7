"""Which tokens and which responses a loss is taken over. Statistics are those of the batch that is given."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import hide, log_ratio_of, mean_over_row
from grpo_core.types import Advantages


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
    r"""The share $f$ of tokens with the highest $(A_{it} - \bar A)(\ell_{it} - \bar \ell)$, $\ell = \log \pi$.

    Means over all response tokens of what is given: call it once on the whole optimizer batch, with the log-probs of
    its start, before any micro-batch; then the choice depends on neither the split nor a random number. Among them
    Clip-Cov drops tokens from its loss (published as a random draw with $l = 1$, $h = 5$), and KL-Cov penalizes
    tokens. Tokens that tie with the last one chosen are chosen too. Detached; False outside the mask, where nothing is
    read.

    Args:
        advantages: $A$: one column, or one for each token.
        log_probs: $\log \pi$ of each token, in nats.
        response_mask: True where a token belongs to a response.
        fraction: $f$ in $[0, 1]$, of the response tokens: $\lfloor f n \rfloor$, but at least 1 if $f > 0$.
        low: $l$; the default never chooses a token whose covariance is not positive.
        high: $h$.

    Returns:
        True for the chosen tokens.

    Raises:
        ValueError: if `fraction` is not in $[0, 1]$.

    Example:
        >>> advantages, log_probs = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0, -0.5], [-3.0, -1.0]])
        >>> select_high_covariance(advantages, log_probs, torch.ones(2, 2).bool(), 0.25)
        tensor([[False, False],
                [ True, False]])

    References:
        Cui et al. 2025, arXiv:2505.22617 (Clip-Cov and KL-Cov).
    """
    require(0 <= fraction <= 1, "fraction", fraction, "between 0 and 1")
    values = hide(advantages.detach().double().expand(response_mask.shape), response_mask)
    scores = hide(log_probs.detach().double(), response_mask)
    count = response_mask.sum().clamp(min=1)
    covariance = (values - values.sum() / count) * (scores - scores.sum() / count)
    candidates = response_mask & (covariance > low) & (covariance < high)
    wanted = max(1, math.floor(fraction * int(response_mask.sum()) + 1e-9)) if fraction > 0 else 0
    return _largest(covariance, candidates, wanted)


@shape_checked
def select_high_entropy(
    token_entropy: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"], fraction: float
) -> Bool[Tensor, "batch seq"]:
    r"""The share $f$ of response tokens with the highest entropy: the forks at which a response is decided.

    The threshold is that of all tokens given: call it once on the whole optimizer batch. Tokens that tie with the last
    one chosen are chosen too. Detached; False outside the mask, where nothing is read.

    Args:
        token_entropy: in nats.
        response_mask: True where a token belongs to a response.
        fraction: $f$ in $[0, 1]$: $\lceil f n \rceil$ of the $n$ response tokens. The paper has 0.2.

    Returns:
        True for the chosen tokens.

    Raises:
        ValueError: if `fraction` is not in $[0, 1]$.

    Example:
        >>> select_high_entropy(torch.tensor([[0.1, 0.9, 0.5]]), torch.ones(1, 3).bool(), 0.5)
        tensor([[False,  True,  True]])

    References:
        Wang et al. 2025, arXiv:2506.01939 (the 80/20 rule).
    """
    require(0 <= fraction <= 1, "fraction", fraction, "between 0 and 1")
    # 0.07 * 100 is 7.000000000000001: no token more for a rounding.
    wanted = math.ceil(fraction * int(response_mask.sum()) - 1e-9)
    return _largest(token_entropy.detach(), response_mask, wanted)


@shape_checked
def keep_on_policy_sequences(
    advantages: Float[Tensor, "batch 1"],
    policy_log_probs: Float[Tensor, "batch seq"],
    behavior_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    threshold: float,
) -> Bool[Tensor, "batch 1"]:
    r"""$M_i = 0$ where $A_i < 0$ and $\operatorname{mean}_t (\log \pi_b - \log \pi_\theta) > \delta$, else 1.

    The off-policy sequence mask: a bad response that the policy has left far behind is no longer pushed away. It looks
    at one response at a time, so micro-batches do not matter. Detached; outside the mask nothing is read; True for a
    response without tokens.

    Args:
        advantages: $A_i$.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats, of the policy as it is now.
        behavior_log_probs: $\log \pi_b$ of each token, in nats, of what sampled it.
        response_mask: True where a token belongs to the response.
        threshold: $\delta$, in nats per token.

    Returns:
        True for the responses to keep.

    Example:
        >>> policy, old, mask = torch.tensor([[-3.0], [-3.0]]), torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1).bool()
        >>> keep_on_policy_sequences(torch.tensor([[-1.0], [1.0]]), policy, old, mask, 0.5)
        tensor([[False],
                [ True]])

    References:
        DeepSeek-AI 2025, arXiv:2512.02556 (DeepSeek-V3.2, off-policy sequence masking).
    """
    divergence = -mean_over_row(
        log_ratio_of(policy_log_probs.detach(), behavior_log_probs, response_mask), response_mask
    )
    return ~((advantages < 0) & (divergence > threshold))


@shape_checked
def drop_truncated_responses(
    response_mask: Bool[Tensor, "batch seq"], truncated: Bool[Tensor, " batch"]
) -> Bool[Tensor, "batch seq"]:
    r"""$m_{it} = 0$ for every token of a response that was cut off: overlong filtering.

    Take it before `compute_token_weights`: its tokens then count in no denominator, and whether it counts as a
    response is that function's `empty_responses`. Advantages still compare with the reward of the cut response.

    Args:
        response_mask: True where a token belongs to a response.
        truncated: True where the length limit, and not the model, ended the response.

    Returns:
        The smaller mask.

    Example:
        >>> drop_truncated_responses(torch.ones(2, 2).bool(), torch.tensor([True, False]))
        tensor([[False, False],
                [ True,  True]])

    References:
        Yu et al. 2025, arXiv:2503.14476 (DAPO, overlong filtering).
    """
    return response_mask & ~truncated[:, None]


def _largest(
    values: Float[Tensor, "batch seq"], candidates: Bool[Tensor, "batch seq"], wanted: int
) -> Bool[Tensor, "batch seq"]:
    """The candidates with the `wanted` largest values; those that tie with the last of them too."""
    found = values[candidates]
    if wanted == 0 or len(found) == 0:
        return torch.zeros_like(candidates)
    return candidates & (values >= found.topk(min(wanted, len(found))).values[-1])
