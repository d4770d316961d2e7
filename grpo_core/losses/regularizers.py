"""KL divergence from a reference model, as a loss or as a reward penalty, and an adaptive entropy coefficient."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core.losses._ratios import attach_gradient, clamp_log_ratio, compute_log_ratio, zero_outside_mask
from grpo_core.types import KLEstimator, KLEstimatorName


@shape_checked
def estimate_kl(
    policy_log_probs: Float[Tensor, "batch seq"],
    reference_log_probs: Float[Tensor, "batch seq"],
    estimator: KLEstimatorName,
    *,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    response_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    r"""Return an estimate of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ for each sampled token.

    With $x = \log \pi_{\mathrm{ref}} - \log \pi_\theta$ and $\rho = \pi_\theta / \pi_{\mathrm{old}}$:

    | estimator | value | expected gradient as a loss, on-policy, for a fixed prefix |
    |---|---|---|
    | k1 | $-x$ | 0: useless as a loss, correct as a penalty in the reward |
    | k2 | $x^2 / 2$ | that of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ |
    | k3 | $e^x - x - 1$ | that of $\mathrm{KL}(\pi_{\mathrm{ref}} \Vert \pi_\theta)$, the other direction |
    | abs | $\lvert x \rvert$ | twice that of the total variation |
    | ratio_k3 | $\rho\,(e^x - x - 1)$ | that of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$, also off-policy |

    The expectation of k1, k3 and ratio_k3 is the divergence, and that of k2 differs from it in the third order. The
    gradient of the divergence of a whole response also contains the effect of each token on later tokens. To include
    it, subtract `compute_reward_to_go` of k1 from the advantages.

    Differentiable in `policy_log_probs` only; "ratio_k3" also through $\rho$, which reverses the direction of k3. The
    logarithms of $e^x$ and $\rho$ are clamped to 20 nats in value. All estimators but k1 are non-negative.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        reference_log_probs: $\log \pi_{\mathrm{ref}}$ of each token, in nats.
        estimator: "k1", "k2", "k3", "abs" or "ratio_k3".
        old_log_probs: $\log \pi_{\mathrm{old}}$ of the policy that sampled, used by "ratio_k3"; None means the current
            policy, for which the value of $\rho$ is 1.
        response_mask: if given, the estimate is exactly 0 outside it and no value there is read.

    Returns:
        The estimate of each token, in nats.

    Raises:
        ValueError: if `estimator` is unknown.

    Examples:
        >>> policy, reference = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
        >>> estimate_kl(policy, reference, "k3")
        tensor([[0.1931, 0.0000]])

    References:
        Schulman 2020, "Approximating KL divergence" (k1, k2, k3); DeepSeek-AI 2025, arXiv:2512.02556 (ratio_k3).
    """
    check_choice("estimator", estimator, KLEstimator)
    x = -compute_log_ratio(policy_log_probs, reference_log_probs, response_mask)
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "abs":
            return x.abs()
    if is_traced():
        k3 = clamp_log_ratio(x).expm1() - x
    else:
        with torch.no_grad():
            growth = clamp_log_ratio(x).expm1()
            value = growth - x
        k3 = attach_gradient(value, growth, x)
    if estimator == "k3":
        return k3
    old = policy_log_probs if old_log_probs is None else old_log_probs
    return clamp_log_ratio(compute_log_ratio(policy_log_probs, old, response_mask)).exp() * k3


@shape_checked
def compute_reward_to_go(
    token_rewards: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"], *, discount: float = 1.0
) -> Float[Tensor, "batch seq"]:
    r"""Return $G_{it} = \sum_{s \ge t} \gamma^{s-t} r_{is}$ over the response tokens, the reward-to-go of each token.

    To penalize the KL divergence in the reward, use the advantages $A_{it} - \beta G_{it}$ with $r$ = k1 of
    `estimate_kl`. Their policy gradient contains that of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ over whole
    responses. Detached. Tokens outside the mask do not count as steps, so no discount is applied across them. The
    result is exactly 0 there, and no value there is read.

    Args:
        token_rewards: $r$, in units of reward.
        response_mask: True where a token belongs to the response.
        discount: $\gamma$ in $[0, 1]$.

    Returns:
        $G$ of each token.

    Raises:
        ValueError: if `discount` is not in $[0, 1]$.

    Examples:
        >>> compute_reward_to_go(torch.tensor([[1.0, 7.0, 2.0]]), torch.tensor([[True, False, True]]))
        tensor([[3., 0., 2.]])

    References:
        Hu et al. 2025, arXiv:2501.03262 (REINFORCE++).
    """
    require(0 <= discount <= 1, "discount", discount, "between 0 and 1")
    rewards = zero_outside_mask(token_rewards.detach(), response_mask)
    if discount == 1:
        return zero_outside_mask(rewards.flip(1).cumsum(1).flip(1), response_mask)
    returns, running = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for column in reversed(range(rewards.shape[1])):
        running = torch.where(response_mask[:, column], rewards[:, column] + discount * running, running)
        returns[:, column] = running
    return zero_outside_mask(returns, response_mask)


@shape_checked
def adapt_entropy_coefficient(
    coefficient: float,
    entropy: float,
    target: float,
    *,
    step: float = 0.005,
    low: float = 0.0,
    high: float = 1.0,
) -> float:
    r"""Return $\operatorname{clip}(c \pm \Delta, c_{\min}, c_{\max})$, the entropy coefficient of the next step.

    The coefficient grows if the entropy is at or below the target, and shrinks otherwise. This is a pure function of
    one step, so the caller keeps the coefficient in the state of the run. In the paper, the bonus is applied only in
    steps whose last measured entropy is at or below the target.

    Args:
        coefficient: $c$, in reward per nat.
        entropy: entropy of the last step, in nats per token.
        target: target entropy, in nats per token.
        step: $\Delta \ge 0$.
        low: $c_{\min}$.
        high: $c_{\max}$.

    Returns:
        The coefficient of the next step.

    Raises:
        ValueError: if `step` is negative, `low` exceeds `high`, or `entropy` is not finite.

    Examples:
        >>> adapt_entropy_coefficient(0.01, entropy=0.1, target=0.2)
        0.015

    References:
        He et al. 2025, arXiv:2505.22312 (Skywork-OR1, adaptive entropy control).
    """
    require(step >= 0, "step", step, "at least 0")
    require(low <= high, "low", low, f"at most high={high}")
    require(math.isfinite(entropy), "entropy", entropy, "finite")
    return min(high, max(low, coefficient + (step if entropy <= target else -step)))
