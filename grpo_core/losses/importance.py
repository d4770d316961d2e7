"""Importance weights that correct for a sampler whose probabilities differ from the trainer's; all are detached."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, require, shape_checked
from grpo_core.losses._ratios import (
    clamp_log_ratio,
    compute_binary_kl,
    compute_detached_ratio,
    compute_log_ratio,
    mean_over_response,
    zero_outside_mask,
)
from grpo_core.masking import masked_sum
from grpo_core.tensor_types import Metadata
from grpo_core.types import Divergence, DivergenceName, ImportanceLevel, ImportanceLevelName


@shape_checked
def compute_importance_ratios(
    old_log_probs: Float[Tensor, "batch seq"],
    sampler_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    level: ImportanceLevelName,
) -> Float[Tensor, "batch cols"]:
    r"""Return $\kappa_{it} = \pi_{\mathrm{old}}(o_{it}) / \mu(o_{it})$, the trainer's probability over the sampler's.

    | level | ratio | columns |
    |---|---|---|
    | token | $\kappa_{it}$ | one per token; 0 outside the mask |
    | sequence | $\prod_t \kappa_{it}$ | 1 |
    | geometric | $(\prod_t \kappa_{it})^{1 / \lvert o_i \rvert}$ | 1 |

    "sequence" is unbiased, but its variance grows with the length. Pass the same `old_log_probs` to the objective. If
    the objective used the sampler's log-probs instead, it would correct the same mismatch a second time. The logarithm
    of a ratio is clamped to 20 nats. Detached; no value outside the mask is read. The ratio of a response without
    tokens is 1.

    Args:
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, computed by the trainer before the update.
        sampler_log_probs: $\log \mu$ of each token, in nats, at the same temperature and without top-p or top-k, which
            renormalize $\mu$ and would scale every ratio by the probability mass that was kept.
        response_mask: True where a token belongs to the response.
        level: "token", "sequence" or "geometric".

    Returns:
        The ratios.

    Raises:
        ValueError: if `level` is unknown.

    Examples:
        >>> old, sampler = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> compute_importance_ratios(old, sampler, torch.ones(1, 2).bool(), "sequence")
        tensor([[2.]])

    References:
        Ionides 2008, "Truncated Importance Sampling"; Munos et al. 2016, arXiv:1606.02647 (per-step weights).
    """
    check_choice("level", level, ImportanceLevel)
    if level == "token":
        return compute_detached_ratio(old_log_probs, sampler_log_probs).masked_fill_(~response_mask, 0.0)
    log_ratio = compute_log_ratio(old_log_probs.detach(), sampler_log_probs, response_mask)
    total = (
        mean_over_response(log_ratio, response_mask) if level == "geometric" else log_ratio.sum(dim=1, keepdim=True)
    )
    return clamp_log_ratio(total).exp()


@shape_checked
def compute_importance_divergences(
    old_log_probs: Float[Tensor, "batch seq"],
    sampler_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    measure: DivergenceName,
    level: ImportanceLevelName,
) -> Float[Tensor, "batch cols"]:
    r"""Return $d_{it} \ge 0$, how far the trainer's probability $p$ of a token is from the sampler's $q$, either way.

    | measure | $d_{it}$, with $p = \pi_{\mathrm{old}}(o_{it})$ and $q = \mu(o_{it})$ |
    |---|---|
    | binary_kl | $q \log \frac{q}{p} + (1 - q) \log \frac{1 - q}{1 - p}$, of "this token" and "any other token" |
    | total_variation | $\lvert p - q \rvert$, of the same two outcomes |
    | k2 | $\frac12 \log^2 \frac{p}{q}$ |
    | k3 | $\frac{p}{q} - 1 - \log \frac{p}{q}$ |

    The levels are those of `compute_importance_ratios`: "token" gives $d_{it}$, 0 outside the mask; "sequence" its sum
    over the response, and "geometric" its mean, in one column. The mean of k2 or k3 estimates
    $\mathrm{KL}(\mu \Vert \pi_{\mathrm{old}})$ per token. To gate tokens or responses, pass the divergences to
    `keep_within_bounds` with `low=0`. Unlike a bound on the ratio, one on binary_kl or total_variation lets the
    probability of a rare token change by a large factor. Detached; no value outside the mask is read. The divergence
    of a response without tokens is 0. 1e-8 is added to $1 - p$ and $1 - q$, and $\log \frac pq$ is clamped to 20 nats
    in k3.

    Args:
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, computed by the trainer before the update.
        sampler_log_probs: $\log \mu$ of each token, in nats.
        response_mask: True where a token belongs to the response.
        measure: "binary_kl", "total_variation", "k2" or "k3".
        level: "token", "sequence" or "geometric".

    Returns:
        The divergences: in nats, those of total_variation as a difference of probabilities.

    Raises:
        ValueError: if `measure` or `level` is unknown.

    Examples:
        >>> old, sampler = torch.tensor([[0.5, 0.02]]).log(), torch.tensor([[0.8, 0.01]]).log()
        >>> compute_importance_divergences(old, sampler, torch.ones(1, 2).bool(), "total_variation", "token")
        tensor([[0.3000, 0.0100]])

    References:
        Qi et al. 2026, arXiv:2602.04879 (binary_kl and total_variation); Schulman 2020, "Approximating KL divergence"
        (k2 and k3).
    """
    check_choice("measure", measure, Divergence)
    check_choice("level", level, ImportanceLevel)
    old = zero_outside_mask(old_log_probs.detach(), response_mask)
    sampler = zero_outside_mask(sampler_log_probs.detach(), response_mask)
    match measure:
        case "binary_kl":
            divergences = compute_binary_kl(old, sampler)
        case "total_variation":
            divergences = (old.exp() - sampler.exp()).abs()
        case "k2":
            divergences = (old - sampler).square() / 2
        case _:
            log_ratio = clamp_log_ratio(old - sampler)
            divergences = log_ratio.expm1() - log_ratio
    divergences = divergences.clamp(min=0)  # rounding makes some slightly negative
    if level == "token":
        return divergences
    if level == "geometric":
        return mean_over_response(divergences, response_mask)
    return divergences.sum(dim=1, keepdim=True)


@shape_checked
def truncate_importance_weights(
    ratios: Float[Tensor, "batch cols"], *, high: float, low: float = 0.0
) -> Float[Tensor, "batch cols"]:
    r"""Return $w = \operatorname{clip}(\kappa, l, h)$, truncated importance weights (TIS).

    Truncation bounds the variance and biases the gradient toward the sampler's policy. Detached. A positive `low`
    raises small ratios; with 0, small ratios and the zeros of masked tokens stay as they are.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        high: $h \ge l$.
        low: $l \ge 0$.

    Returns:
        The weights.

    Raises:
        ValueError: unless $0 \le l \le h$.

    Examples:
        >>> truncate_importance_weights(torch.tensor([[0.5, 3.0]]), high=2.0)
        tensor([[0.5000, 2.0000]])

    References:
        Ionides 2008, "Truncated Importance Sampling"; Munos et al. 2016, arXiv:1606.02647.
    """
    _check_bounds(low, high)
    return ratios.detach().clamp(low, high)


@shape_checked
def mask_importance_weights(
    ratios: Float[Tensor, "batch cols"], *, high: float, low: float = 0.0
) -> Float[Tensor, "batch cols"]:
    r"""Return $w = \kappa\, 1[l \le \kappa \le h]$, 0 outside the bounds (IcePop for tokens, MIS for sequences).

    Detached.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        high: $h \ge l$.
        low: $l \ge 0$.

    Returns:
        The weights.

    Raises:
        ValueError: unless $0 \le l \le h$.

    Examples:
        >>> mask_importance_weights(torch.tensor([[0.5, 3.0]]), high=2.0)
        tensor([[0.5000, 0.0000]])

    References:
        Ling Team 2025, arXiv:2510.18855 (IcePop).
    """
    _check_bounds(low, high)
    ratios = ratios.detach()
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


@shape_checked
def keep_within_bounds(ratios: Float[Tensor, "batch cols"], *, low: float, high: float) -> Bool[Tensor, "batch cols"]:
    r"""Return $1[l \le \kappa \le h]$, which rejects tokens or whole responses and gives all others weight 1.

    "geometric" and "sequence" ratios reject whole responses. Pass the result to `compute_token_weights` as `kept`; its
    `rejected_tokens` decides whether rejected tokens count in the denominators.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        low: $l \ge 0$.
        high: $h \ge l$.

    Returns:
        True for the tokens or responses to keep.

    Raises:
        ValueError: unless $0 \le l \le h$.

    Examples:
        >>> keep_within_bounds(torch.tensor([[1.0001], [1.2]]), low=0.99, high=1.01)
        tensor([[ True],
                [False]])
    """
    _check_bounds(low, high)
    ratios = ratios.detach()
    return (ratios >= low) & (ratios <= high)


@shape_checked
def self_normalize_weights(
    weights: Float[Tensor, "batch cols"], response_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch cols"]:
    r"""Return $w_j \big/ \frac{1}{n} \sum_j w_j$, weights with mean 1.

    The mean runs over the response tokens of the given batch or, for weights with one column, over its responses, so
    call it on the whole optimizer batch. Detached. Weights that are all 0 stay 0. A response without tokens is
    excluded from the mean and gets weight 0.

    Args:
        weights: $w \ge 0$.
        response_mask: True where a token belongs to a response.

    Returns:
        The normalized weights.

    Examples:
        >>> self_normalize_weights(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 1.5000, 0.0000]])
    """
    counted = _select_counted(weights, response_mask)
    kept = torch.where(counted, weights.detach(), 0.0)
    total = kept.sum()
    return kept * counted.sum() / torch.where(total > 0, total, 1.0)


@shape_checked
def effective_sample_size(
    weights: Float[Tensor, "batch cols"], response_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    r"""Return $\bigl(\sum_j w_j\bigr)^2 \big/ \bigl(n \sum_j w_j^2\bigr)$, the relative effective sample size.

    The sums run over the response tokens or, for weights with one column, over the responses that have tokens. The
    share is 1 for equal weights, and 0 if there are no weights or all are 0. Detached.

    Args:
        weights: $w \ge 0$.
        response_mask: True where a token belongs to a response.

    Returns:
        The share, in $[0, 1]$.

    Examples:
        >>> effective_sample_size(torch.tensor([[2.0], [0.0]]), torch.ones(2, 3).bool())
        tensor(0.5000)

    References:
        Kong 1992, "A note on importance sampling using standardized weights".
    """
    counted = _select_counted(weights, response_mask)
    kept = torch.where(counted, weights.detach(), 0.0)
    squares = counted.sum() * kept.square().sum()
    return torch.where(squares > 0, kept.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)


@shape_checked
def describe_mismatch(
    old_log_probs: Float[Tensor, "batch seq"],
    sampler_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
) -> Metadata:
    r"""Return statistics of $\log \kappa = \log \pi_{\mathrm{old}} - \log \mu$ over response tokens, without bounds.

    Detached; 0 if there are no tokens. No value outside the mask is read.

    Args:
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats.
        sampler_log_probs: $\log \mu$ of each token, in nats.
        response_mask: True where a token belongs to a response.

    Returns:
        `mismatch_mean` and `mismatch_max`, the mean and the maximum of $\lvert \log \kappa \rvert$ in nats;
        `mismatch_kl`, the mean of $\kappa - 1 - \log \kappa$ in nats, an estimate of $\mathrm{KL}(\mu \Vert
        \pi_{\mathrm{old}})$; `mismatch_ess`, the `effective_sample_size` of the token ratios without bounds.

    Examples:
        >>> log_probs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
        >>> describe_mismatch(log_probs, log_probs - 0.5, mask)["mismatch_mean"]
        tensor(0.5000)
    """
    log_ratio = compute_log_ratio(old_log_probs.detach(), sampler_log_probs, response_mask)
    tokens = response_mask.sum().clamp(min=1)
    clamped = clamp_log_ratio(log_ratio)
    return {
        "mismatch_mean": log_ratio.abs().sum() / tokens,
        "mismatch_max": log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(()),
        "mismatch_kl": masked_sum(clamped.expm1() - clamped, response_mask) / tokens,
        "mismatch_ess": effective_sample_size(clamped.exp(), response_mask),
    }


def _select_counted(
    weights: Float[Tensor, "batch cols"], mask: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, "batch cols"]:
    """Return where a weight belongs to a response token, or (one column) to a response that has tokens."""
    return mask if weights.shape == mask.shape else mask.any(dim=1, keepdim=True)


def _check_bounds(low: float, high: float) -> None:
    require(0 <= low <= high, "low", low, f"between 0 and high={high}")
