"""How far the policy is from a reference model: per-token estimates, and what they are worth as a penalty."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core.losses._ratios import hide, hold, log_ratio_of, with_slope
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
    r"""$-x$, $x^2 / 2$, $e^x - x - 1$ ..., $x = \log \pi_{\mathrm{ref}} - \log \pi_\theta$: KL, token by token.

    Estimates of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ from samples of $\pi_\theta$:

    | estimator | value | expected gradient as a loss, on-policy, prefix held fixed |
    |---|---|---|
    | k1 | $-x$ | 0: useless as a loss; right as a penalty in the reward |
    | k2 | $x^2 / 2$ | that of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ |
    | k3 | $e^x - x - 1$ | that of $\mathrm{KL}(\pi_{\mathrm{ref}} \Vert \pi_\theta)$, the other direction |
    | abs | $\lvert x \rvert$ | twice that of the total variation |
    | ratio_k3 | $\rho\,(e^x - x - 1)$ | that of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$, off-policy too |

    The values of k1, k3 and ratio_k3 have the divergence as their expectation, those of k2 differ from it at third
    order. The gradient of a whole response's divergence also has the effect of a token on those after it: that is
    `compute_reward_to_go` of k1, subtracted from the advantages.

    Differentiable in `policy_log_probs` alone; in "ratio_k3" through $\rho$ too, which is what turns its direction.
    $e^x$ and $\rho$ are held within 20 nats in value. k2, k3 and their kind are never negative.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        reference_log_probs: $\log \pi_{\mathrm{ref}}$ of each token, in nats.
        estimator: "k1", "k2", "k3", "abs" or "ratio_k3".
        old_log_probs: for "ratio_k3", $\log$ of the policy that sampled; None: the policy itself, $\rho$ has value 1.
        response_mask: where given, the estimate is exactly 0 outside it, and nothing there is read.

    Returns:
        The estimate of each token, in nats.

    Raises:
        ValueError: if `estimator` is none of the five.

    Example:
        >>> policy, reference = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
        >>> estimate_kl(policy, reference, "k3")
        tensor([[0.1931, 0.0000]])

    References:
        Schulman 2020, "Approximating KL divergence" (k1, k2, k3); DeepSeek-AI 2025, arXiv:2512.02556 (ratio_k3).
    """
    check_choice("estimator", estimator, KLEstimator)
    x = -log_ratio_of(policy_log_probs, reference_log_probs, response_mask)
    match estimator:
        case "k1":
            return -x
        case "k2":
            return x.square() / 2
        case "abs":
            return x.abs()
    if is_traced():
        k3 = hold(x).expm1() - x
    else:
        with torch.no_grad():
            growth = hold(x).expm1()
            value = growth - x
        k3 = with_slope(value, growth, x)
    if estimator == "k3":
        return k3
    old = policy_log_probs if old_log_probs is None else old_log_probs
    return hold(log_ratio_of(policy_log_probs, old, response_mask)).exp() * k3


@shape_checked
def compute_reward_to_go(
    token_rewards: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"], *, discount: float = 1.0
) -> Float[Tensor, "batch seq"]:
    r"""$G_{it} = \sum_{s \ge t} \gamma^{s-t} r_{is}$ over the response tokens: what a token still has influence on.

    A KL penalty in the reward is $A_{it} - \beta G_{it}$ with $r = $ k1 of `estimate_kl`: its policy gradient is that
    of $\mathrm{KL}(\pi_\theta \Vert \pi_{\mathrm{ref}})$ over whole responses. Detached. Tokens outside the mask are
    no steps: what lies beyond them is carried across, undiscounted. Exactly 0 there, and nothing there is read.

    Args:
        token_rewards: $r$, in units of reward.
        response_mask: True where a token belongs to the response.
        discount: $\gamma$ in $[0, 1]$.

    Returns:
        $G$ of each token.

    Raises:
        ValueError: if `discount` is not in $[0, 1]$.

    Example:
        >>> compute_reward_to_go(torch.tensor([[1.0, 7.0, 2.0]]), torch.tensor([[True, False, True]]))
        tensor([[3., 0., 2.]])

    References:
        Hu et al. 2025, arXiv:2501.03262 (REINFORCE++).
    """
    require(0 <= discount <= 1, "discount", discount, "between 0 and 1")
    rewards = hide(token_rewards.detach(), response_mask)
    if discount == 1:
        return hide(rewards.flip(1).cumsum(1).flip(1), response_mask)
    returns, running = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for column in reversed(range(rewards.shape[1])):
        running = torch.where(response_mask[:, column], rewards[:, column] + discount * running, running)
        returns[:, column] = running
    return hide(returns, response_mask)


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
    r"""$c \leftarrow \operatorname{clip}(c \pm \Delta, c_{\min}, c_{\max})$: a bonus that follows the entropy.

    Up where the entropy is at or below the target, else down. A pure function of one step: keep the coefficient in the
    state of the run. As published, the bonus itself is applied only in steps whose last measured entropy is at or
    below the target.

    Args:
        coefficient: $c$, reward per nat.
        entropy: of the last step, in nats per token.
        target: the entropy to hold, in nats per token.
        step: $\Delta \ge 0$.
        low: $c_{\min}$.
        high: $c_{\max}$.

    Returns:
        The coefficient of the next step.

    Raises:
        ValueError: if `step` is negative, not `low` $\le$ `high`, or `entropy` is not finite.

    Example:
        >>> adapt_entropy_coefficient(0.01, entropy=0.1, target=0.2)
        0.015

    References:
        He et al. 2025, arXiv:2505.22312 (Skywork-OR1, adaptive entropy control).
    """
    require(step >= 0, "step", step, "at least 0")
    require(low <= high, "low", low, f"at most high={high}")
    require(math.isfinite(entropy), "entropy", entropy, "finite")
    return min(high, max(low, coefficient + (step if entropy <= target else -step)))
