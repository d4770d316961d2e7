"""Reward shaping by the length of a response."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked


@shape_checked
def compute_soft_overlong_penalty(
    lengths: Int[Tensor, " rollout"], max_length: int, buffer: int
) -> Float[Tensor, " rollout"]:
    r"""Return 0 up to $L - c$ tokens, $(L - c - n) / c$ from there to $L$, and $-1$ beyond (DAPO's soft penalty).

    In units of reward; add it to the reward. With a buffer of 0, the penalty is 0 up to $L$ and $-1$ beyond.

    Args:
        lengths: $n$, the number of tokens of each response.
        max_length: $L$, the length limit in tokens.
        buffer: $c$ in $[0, L]$, the number of tokens before the limit over which the penalty grows.

    Returns:
        The penalty of each response, in $[-1, 0]$, float32.

    Raises:
        ValueError: if `buffer` is not in $[0, L]$.

    Examples:
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
    r"""Return $v_L + \frac{1}{2} (v_0 - v_L) \bigl(1 + \cos \frac{\pi n}{L}\bigr)$, which goes from $v_0$ to $v_L$.

    In units of reward. In the paper, longer correct responses earn less (from 2 to 1), and longer wrong responses cost
    less (from -10 to 0); call this function once for each kind. Beyond the limit the value stays at $v_L$. The paper's
    separate penalty for responses that reach the limit (-10) is left to the caller.

    Args:
        lengths: $n$, the number of tokens of each response.
        max_length: $L \ge 1$, the length limit in tokens.
        start: $v_0$, the reward at length 0.
        end: $v_L$, the reward at the limit.

    Returns:
        The reward of each response, float32.

    Raises:
        ValueError: if `max_length` is less than 1.

    Examples:
        >>> compute_cosine_length_reward(torch.tensor([0, 10, 20, 99]), max_length=20, start=2.0, end=1.0)
        tensor([2.0000, 1.5000, 1.0000, 1.0000])

    References:
        Yeo et al. 2025, arXiv:2502.03373 (cosine reward).
    """
    require(max_length >= 1, "max_length", max_length, "at least 1")
    share = lengths.to(torch.float32).clamp(max=max_length) / max_length
    return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * share))
