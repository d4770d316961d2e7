"""Weights that make up for a sampler whose probabilities are not the trainer's. Nothing here carries a gradient."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, require, shape_checked
from grpo_core.losses._ratios import hold, log_ratio_of, mean_over_row, ratio_of
from grpo_core.masking import masked_sum
from grpo_core.types import ImportanceLevel, ImportanceLevelName, Metadata


@shape_checked
def compute_importance_ratios(
    old_log_probs: Float[Tensor, "batch seq"],
    sampler_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    level: ImportanceLevelName,
) -> Float[Tensor, "batch cols"]:
    r"""$\kappa_{it} = \pi_{\mathrm{old}}(o_{it}) / \mu(o_{it})$: how much likelier the trainer finds what was sampled.

    | level | ratio | columns |
    |---|---|---|
    | token | $\kappa_{it}$ | one for each token; 0 outside the mask |
    | sequence | $\prod_t \kappa_{it}$ | 1 |
    | geometric | $(\prod_t \kappa_{it})^{1 / \lvert o_i \rvert}$ | 1 |

    "sequence" is unbiased, with a variance that grows with length. Feed the same `old_log_probs` to the objective:
    then nothing is corrected twice, for with the sampler's own log-probs in their place every ratio is 1. The
    logarithm is held within 20 nats. Detached; outside the mask nothing is read; 1 for a response without tokens.

    Args:
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats: the trainer's, before the update.
        sampler_log_probs: $\log \mu$ of each token, in nats, of the same tempered distribution, not cut by top-p or
            top-k (those renormalize $\mu$, and every ratio would be off by the mass that was kept).
        response_mask: True where a token belongs to the response.
        level: "token", "sequence" or "geometric".

    Returns:
        The ratios.

    Raises:
        ValueError: if `level` is none of the three.

    Example:
        >>> old, sampler = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.5]]).log()
        >>> compute_importance_ratios(old, sampler, torch.ones(1, 2).bool(), "sequence")
        tensor([[2.]])

    References:
        Ionides 2008, "Truncated Importance Sampling"; Munos et al. 2016, arXiv:1606.02647 (per-step weights).
    """
    check_choice("level", level, ImportanceLevel)
    if level == "token":
        return ratio_of(old_log_probs, sampler_log_probs).masked_fill_(~response_mask, 0.0)
    log_ratio = log_ratio_of(old_log_probs.detach(), sampler_log_probs, response_mask)
    total = mean_over_row(log_ratio, response_mask) if level == "geometric" else log_ratio.sum(dim=1, keepdim=True)
    return hold(total).exp()


@shape_checked
def truncate_importance_weights(
    ratios: Float[Tensor, "batch cols"], *, high: float, low: float = 0.0
) -> Float[Tensor, "batch cols"]:
    r"""$w = \operatorname{clip}(\kappa, l, h)$ (TIS): bounded variance for a bias that pulls towards the sampler.

    Detached. A positive `low` raises small ratios; 0 leaves them, those of masked tokens included.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        high: $h \ge l$.
        low: $l \ge 0$.

    Returns:
        The weights.

    Raises:
        ValueError: if not $0 \le l \le h$.

    Example:
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
    r"""$w = \kappa\, 1[l \le \kappa \le h]$: what lies outside is left out (IcePop of tokens, MIS of sequences).

    Detached.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        high: $h \ge l$.
        low: $l \ge 0$.

    Returns:
        The weights.

    Raises:
        ValueError: if not $0 \le l \le h$.

    Example:
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
    r"""$1[l \le \kappa \le h]$: rejection with weight 1; of "geometric" or "sequence" ratios, of whole responses.

    Give it to `compute_token_weights` as `kept`, whose `rejected_tokens` says what becomes of the denominators.

    Args:
        ratios: $\kappa$ of `compute_importance_ratios`.
        low: $l \ge 0$.
        high: $h \ge l$.

    Returns:
        True for what is kept.

    Raises:
        ValueError: if not $0 \le l \le h$.

    Example:
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
    r"""$w_j \big/ \frac{1}{n} \sum_j w_j$: weights with mean 1, over the response tokens or, of one column, responses.

    The mean is that of the batch given: call it on the whole optimizer batch. Detached. Weights that are all 0 stay 0;
    a response without tokens counts nowhere.

    Args:
        weights: $w \ge 0$.
        response_mask: True where a token belongs to a response.

    Returns:
        The normalized weights.

    Example:
        >>> self_normalize_weights(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 1.5000, 0.0000]])
    """
    counted = _counted(weights, response_mask)
    kept = torch.where(counted, weights.detach(), 0.0)
    total = kept.sum()
    return kept * counted.sum() / torch.where(total > 0, total, 1.0)


@shape_checked
def effective_sample_size(
    weights: Float[Tensor, "batch cols"], response_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    r"""$\bigl(\sum_j w_j\bigr)^2 \big/ \bigl(n \sum_j w_j^2\bigr)$: the share of samples in effect.

    In $(0, 1]$; 1 for equal weights, and 0 if there are none or all are 0. Over the response tokens or, of one column,
    the responses with tokens. Detached.

    Args:
        weights: $w \ge 0$.
        response_mask: True where a token belongs to a response.

    Returns:
        The share.

    Example:
        >>> effective_sample_size(torch.tensor([[2.0], [0.0]]), torch.ones(2, 3).bool())
        tensor(0.5000)

    References:
        Kong 1992, "A note on importance sampling using standardized weights".
    """
    counted = _counted(weights, response_mask)
    kept = torch.where(counted, weights.detach(), 0.0)
    squares = counted.sum() * kept.square().sum()
    return torch.where(squares > 0, kept.sum().square() / torch.where(squares > 0, squares, 1.0), 0.0)


@shape_checked
def describe_mismatch(
    old_log_probs: Float[Tensor, "batch seq"],
    sampler_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
) -> Metadata:
    r"""$\log \kappa = \log \pi_{\mathrm{old}} - \log \mu$ of the response tokens, before any bound.

    Detached; 0 where there are no tokens; outside the mask nothing is read.

    Args:
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats.
        sampler_log_probs: $\log \mu$ of each token, in nats.
        response_mask: True where a token belongs to a response.

    Returns:
        Scalars in nats: `mismatch_mean` and `mismatch_max` of $\lvert \log \kappa \rvert$, `mismatch_kl` (the mean of
        $\kappa - 1 - \log \kappa$, an estimate of $\mathrm{KL}(\mu \Vert \pi_{\mathrm{old}})$); and `mismatch_ess`,
        the `effective_sample_size` of the unbounded $\kappa$ of tokens.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2).bool()
        >>> describe_mismatch(log_probs, log_probs - 0.5, mask)["mismatch_mean"]
        tensor(0.5000)
    """
    log_ratio = log_ratio_of(old_log_probs.detach(), sampler_log_probs, response_mask)
    tokens = response_mask.sum().clamp(min=1)
    held = hold(log_ratio)
    return {
        "mismatch_mean": log_ratio.abs().sum() / tokens,
        "mismatch_max": log_ratio.abs().max() if log_ratio.numel() else log_ratio.new_zeros(()),
        "mismatch_kl": masked_sum(held.expm1() - held, response_mask) / tokens,
        "mismatch_ess": effective_sample_size(held.exp(), response_mask),
    }


def _counted(weights: Float[Tensor, "batch cols"], mask: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch cols"]:
    """Where a weight stands for something: a response token, or a response with tokens."""
    return mask if weights.shape == mask.shape else mask.any(dim=1, keepdim=True)


def _check_bounds(low: float, high: float) -> None:
    require(0 <= low <= high, "low", low, f"between 0 and high={high}")
