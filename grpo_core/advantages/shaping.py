"""What is added to a reward for the length of a response, and a coefficient that follows the entropy."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked


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
