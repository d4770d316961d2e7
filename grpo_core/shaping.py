"""What is added to a reward for the length of a response, and a coefficient that follows the entropy."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core._check import require, shape_checked


@shape_checked
def compute_soft_overlong_penalty(
    lengths: Int[Tensor, " rollout"], max_length: int, buffer: int
) -> Float[Tensor, " rollout"]:
    r"""0 up to $L - c$ tokens, then $(L - c - n) / c$ down to $-1$ at $L$, and $-1$ beyond: DAPO's soft punishment.

    In units of reward, to be added to it. With a buffer of 0 it is $-1$ beyond $L$ and 0 up to it.

    Args:
        lengths: $n$, response tokens.
        max_length: $L$, the length limit in tokens.
        buffer: $c$ in $[0, L]$, the last tokens before the limit, over which the penalty grows.

    Returns:
        The penalty of each response, in $[-1, 0]$, float32.

    Raises:
        ValueError: if `buffer` is not in $[0, L]$.

    Example:
        >>> compute_soft_overlong_penalty(torch.tensor([10, 18, 20, 30]), max_length=20, buffer=4)
        tensor([ 0.0000, -0.5000, -1.0000, -1.0000])

    References:
        Yu et al. 2025, arXiv:2503.14476, eq. 13.
    """
    require(0 <= buffer <= max_length, "buffer", buffer, f"between 0 and max_length={max_length}")
    excess = (max_length - buffer - lengths).to(torch.float32)
    return (excess / buffer).clamp(-1, 0) if buffer else torch.where(excess < 0, -1.0, 0.0)


@shape_checked
def compute_cosine_length_reward(
    lengths: Int[Tensor, " rollout"], max_length: int, start: float, end: float
) -> Float[Tensor, " rollout"]:
    r"""$v_L + \frac{1}{2} (v_0 - v_L) \bigl(1 + \cos \frac{\pi n}{L}\bigr)$: from $v_0$ to $v_L$.

    In units of reward. A right answer is worth less the longer it is (2 to 1 in the paper), a wrong one costs less the
    longer it was thought about (-10 to 0): call it once for each. Beyond the limit it stays at $v_L$; the paper gives
    a response that reaches the limit a penalty of its own (-10), which is the caller's to put in.

    Args:
        lengths: $n$, response tokens.
        max_length: $L \ge 1$, the length limit in tokens.
        start: $v_0$.
        end: $v_L$.

    Returns:
        The reward of each response, float32.

    Raises:
        ValueError: if `max_length` is less than 1.

    Example:
        >>> compute_cosine_length_reward(torch.tensor([0, 10, 20, 99]), max_length=20, start=2.0, end=1.0)
        tensor([2.0000, 1.5000, 1.0000, 1.0000])

    References:
        Yeo et al. 2025, arXiv:2502.03373 (cosine reward).
    """
    require(max_length >= 1, "max_length", max_length, "at least 1")
    share = lengths.to(torch.float32).clamp(max=max_length) / max_length
    return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * share))


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
