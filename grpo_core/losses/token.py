"""Token losses beyond the clipped ratio: weighted, gated or masked. No function here reduces."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import (
    clamp_log_ratio,
    compute_binary_kl,
    compute_log_ratio,
    mask_flags,
    zero_outside_mask,
)
from grpo_core.tensor_types import Advantages, Metadata


@shape_checked
def compute_cispo_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    ratio_low: float = 0.0,
    ratio_high: float = 5.0,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\operatorname{sg}[\operatorname{clip}(\rho_{it}, l, h)] A_i \log \pi_\theta(o_{it})$.

    CISPO is REINFORCE with a bounded importance weight, so that every token keeps a gradient,
    $-\operatorname{clip}(\rho) A$. The bounds are absolute ratios instead of distances from 1. Differentiable in
    `policy_log_probs` only; $\log \rho$ is clamped to 20 nats.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        ratio_low: $l \ge 0$; 0 sets no lower bound.
        ratio_high: $h \ge l$.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and Bool "batch seq" each: `is_clipped_low` and `is_clipped_high`, where the weight was
        raised to $l$ or lowered to $h$, and `is_clipped` (either of them).

    Raises:
        ValueError: unless $0 \le l \le h$.

    Examples:
        >>> old = torch.tensor([[0.5, 0.125]])
        >>> losses, _ = compute_cispo_loss(torch.ones(1, 1), torch.tensor([[0.5, 1.0]]).log(), old.log(), 0.0, 5.0)
        >>> losses
        tensor([[0.6931, -0.0000]])

    References:
        MiniMax 2025, arXiv:2506.13585, eq. 4 and 5; Khatri et al. 2025, arXiv:2510.13786 (bounds 0 and 5).
    """
    require(0 <= ratio_low <= ratio_high, "ratio_low", ratio_low, f"between 0 and ratio_high={ratio_high}")
    ratio = clamp_log_ratio(compute_log_ratio(policy_log_probs, old_log_probs, response_mask)).detach().exp()
    weight = ratio.clamp(ratio_low, ratio_high) * advantages.detach()
    flags = {"is_clipped_low": ratio < ratio_low, "is_clipped_high": ratio > ratio_high}
    flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
    losses = zero_outside_mask(-weight * zero_outside_mask(policy_log_probs, response_mask), response_mask)
    return losses, mask_flags(flags, response_mask)


@shape_checked
def compute_sapo_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\frac{4}{\tau} \sigma\bigl(\tau (\rho_{it} - 1)\bigr) A_i$ with a soft gate (SAPO).

    The gradient, $-4 \sigma (1 - \sigma) \rho A$, equals that of the unclipped ratio loss at $\rho = 1$ and fades on
    both sides of it. The value at $\rho = 1$ is $-2 A / \tau$ instead of $-A$, so compare its gradients with PPO
    rather than its values. Differentiable in `policy_log_probs` only; $\log \rho$ is clamped to 20 nats.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        temperature_positive: $\tau > 0$ where $A > 0$.
        temperature_negative: $\tau > 0$ elsewhere; a larger value makes the gradient fade faster.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and empty metadata, because nothing is clipped.

    Raises:
        ValueError: if a temperature is not positive.

    Examples:
        >>> compute_sapo_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        (tensor([[-2.]]), {})

    References:
        Gao et al. 2025, arXiv:2511.20347 (SAPO).
    """
    require(temperature_positive > 0, "temperature_positive", temperature_positive, "positive")
    require(temperature_negative > 0, "temperature_negative", temperature_negative, "positive")
    advantages = advantages.detach()
    ratio = clamp_log_ratio(compute_log_ratio(policy_log_probs, old_log_probs, response_mask)).exp()
    temperature = torch.full_like(ratio, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    losses = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantages
    return zero_outside_mask(losses, response_mask), {}


@shape_checked
def compute_dppo_tv_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    threshold_low: float = 0.2,
    threshold_high: float = 0.2,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\rho_{it} A_i M_{it}$ with a mask $M$ by the difference of probabilities (DPPO-TV).

    $M = 0$ where $p - p_\mu > \delta_h$ with $A > 0$, or $p - p_\mu < -\delta_l$ with $A < 0$; elsewhere $M = 1$. The
    trust region limits the change of a probability instead of its ratio, so that the probability of a rare token may
    change by any factor. Differentiable in `policy_log_probs` only: the gradient is $-\rho A$, and 0 where $M = 0$.
    $\log \rho$ is clamped to 20 nats.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log p$ of each token, in nats.
        old_log_probs: $\log p_\mu$ of each token, in nats, under the policy that sampled it, as reported by the
            sampler.
        threshold_low: $\delta_l \ge 0$, a difference of probabilities.
        threshold_high: $\delta_h \ge 0$, a difference of probabilities.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and Bool "batch seq" each: `is_clipped_low` and `is_clipped_high`, where $M = 0$ with
        $A < 0$ or $A > 0$, and `is_clipped` (either of them).

    Raises:
        ValueError: if a threshold is negative.

    Examples:
        >>> old = torch.tensor([[0.5, 0.01]])
        >>> losses, _ = compute_dppo_tv_loss(torch.ones(1, 1), torch.tensor([[0.75, 0.1]]).log(), old.log())
        >>> losses
        tensor([[  0., -10.]])

    References:
        Qi et al. 2026, arXiv:2602.04879 (DPPO, total variation).
    """
    require(threshold_low >= 0, "threshold_low", threshold_low, "at least 0: it is a difference of probabilities")
    require(threshold_high >= 0, "threshold_high", threshold_high, "at least 0: it is a difference of probabilities")
    policy = zero_outside_mask(policy_log_probs, response_mask)
    old = zero_outside_mask(old_log_probs.detach(), response_mask)
    moved = policy.detach().exp() - old.exp()
    low, high = moved < -threshold_low, moved > threshold_high
    return _masked_ratio_loss(advantages, policy - old, low, high, response_mask)


@shape_checked
def compute_dppo_kl_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    threshold: float,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\rho_{it} A_i M_{it}$ with a mask $M$ by the binary KL divergence (DPPO-KL).

    $M = 0$ where $p_\mu \log \frac{p_\mu}{p} + (1 - p_\mu) \log \frac{1 - p_\mu}{1 - p} > \delta$ and the policy has
    moved in the direction of the advantage: up with $A > 0$, down with $A < 0$. The divergence is that of the two
    outcomes "this token" and "any other token". Differentiable in `policy_log_probs` only: the gradient is $-\rho A$,
    and 0 where $M = 0$. $\log \rho$ is clamped to 20 nats.

    1e-8 is added to $1 - p$ and to $1 - p_\mu$, so that the divergence stays finite where $p$ rounds to 1.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log p$ of each token, in nats.
        old_log_probs: $\log p_\mu$ of each token, in nats, under the policy that sampled it, as reported by the
            sampler.
        threshold: $\delta \ge 0$, in nats.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and Bool "batch seq" each: `is_clipped_low` and `is_clipped_high`, where $M = 0$ with
        $A < 0$ or $A > 0$, and `is_clipped` (either of them).

    Raises:
        ValueError: if `threshold` is negative.

    Examples:
        >>> old = torch.tensor([[0.5, 0.01]])
        >>> losses, _ = compute_dppo_kl_loss(torch.ones(1, 1), torch.tensor([[0.9, 0.02]]).log(), old.log(), 0.1)
        >>> losses
        tensor([[ 0., -2.]])

    References:
        Qi et al. 2026, arXiv:2602.04879 (DPPO, binary KL).
    """
    require(threshold >= 0, "threshold", threshold, "at least 0: it is a divergence in nats")
    policy = zero_outside_mask(policy_log_probs, response_mask)
    old = zero_outside_mask(old_log_probs.detach(), response_mask)
    moved = policy.detach() - old
    far = compute_binary_kl(policy.detach(), old) > threshold
    return _masked_ratio_loss(advantages, policy - old, far & (moved < 0), far & (moved > 0), response_mask)


@shape_checked
def compute_kl_cov_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    penalized: Bool[Tensor, "batch seq"],
    kl_coef: float = 1.0,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -\rho_{it} A_i + c\,\lvert \log \rho_{it} \rvert$, penalizing selected tokens (KL-Cov).

    The penalized tokens are those with the highest covariance of advantage and log-probability, which drive the
    entropy down. Select them with `select_high_covariance` over the whole optimizer batch. No ratio is clipped.
    Differentiable in `policy_log_probs` only: the gradient is $-\rho A + c \operatorname{sign}(\log \rho)$. $\log
    \rho$ is clamped to 20 nats in the ratio.

    Args:
        advantages: $A$, unitless: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        penalized: True for the tokens to penalize.
        kl_coef: $c \ge 0$.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and `is_penalized`, Bool "batch seq".

    Raises:
        ValueError: if `kl_coef` is negative.

    Examples:
        >>> policy, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.5]])
        >>> compute_kl_cov_loss(torch.zeros(1, 1), policy, old, torch.tensor([[True, True]]), 2.0)[0]
        tensor([[0., 1.]])

    References:
        Cui et al. 2025, arXiv:2505.22617 (KL-Cov).
    """
    require(kl_coef >= 0, "kl_coef", kl_coef, "at least 0: it penalizes tokens")
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask)
    penalty = torch.where(penalized, kl_coef * log_ratio.abs(), 0.0)
    losses = -clamp_log_ratio(log_ratio).exp() * advantages.detach() + penalty
    return zero_outside_mask(losses, response_mask), mask_flags({"is_penalized": penalized}, response_mask)


@shape_checked
def compute_dro_loss(
    advantages: Advantages,
    policy_log_probs: Float[Tensor, "batch seq"],
    old_log_probs: Float[Tensor, "batch seq"],
    penalty: float,
    *,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    r"""Return $\ell_{it} = -A_i \log \rho_{it} + \frac{\beta}{2} \log^2 \rho_{it}$, a squared log ratio (DRO, OPMD).

    The square holds the policy near the one that sampled, so no ratio multiplies the gradient and no bound cuts it
    off: the gradient is $-A + \beta \log \rho$, which is 0 at $\log \rho = A / \beta$. Up to a constant, the loss is
    the regression $\frac{1}{2 \beta} (A - \beta \log \rho)^2$. Differentiable in `policy_log_probs` only. At $\rho =
    1$ the value is 0. The papers square the log ratio of the whole response, whose variance grows with its length;
    this is the form per token.

    Args:
        advantages: $A$, in units of reward: one column, or one value per token.
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, under the policy that sampled it.
        penalty: $\beta \ge 0$, in units of reward per nat; with 0, the gradient is that of REINFORCE.
        response_mask: if given, the loss is exactly 0 outside it and no value there is read.

    Returns:
        The loss of each token, and empty metadata, because nothing is clipped.

    Raises:
        ValueError: if `penalty` is negative.

    Examples:
        >>> compute_dro_loss(torch.ones(1, 1), torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]), 2.0)[0]
        tensor([[-0.2500,  2.0000]])

    References:
        Richemond et al. 2024, arXiv:2405.19107 (DRO); Kimi Team 2025, arXiv:2501.12599 (online policy mirror descent).
    """
    require(penalty >= 0, "penalty", penalty, "at least 0: it penalizes a distance")
    log_ratio = compute_log_ratio(policy_log_probs, old_log_probs, response_mask)
    losses = -advantages.detach() * log_ratio + penalty / 2 * log_ratio.square()
    return zero_outside_mask(losses, response_mask), {}


def _masked_ratio_loss(
    advantages: Advantages,
    log_ratio: Float[Tensor, "batch seq"],
    too_low: Bool[Tensor, "batch seq"],
    too_high: Bool[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"] | None,
) -> tuple[Float[Tensor, "batch seq"], Metadata]:
    """Return the unclipped ratio loss, 0 where the policy has moved too far in the direction of the advantage."""
    advantages = advantages.detach()
    flags = {"is_clipped_low": too_low & (advantages < 0), "is_clipped_high": too_high & (advantages > 0)}
    flags["is_clipped"] = flags["is_clipped_low"] | flags["is_clipped_high"]
    losses = torch.where(flags["is_clipped"], 0.0, -clamp_log_ratio(log_ratio).exp() * advantages)
    return zero_outside_mask(losses, response_mask), mask_flags(flags, response_mask)
