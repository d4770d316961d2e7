"""Statistics of evaluations: pass@k, majority votes, confidence intervals and a test of paired differences."""

import math
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo_core._checks import require, shape_checked


@shape_checked
def estimate_mean_interval(
    values: Float[Tensor, " question"], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    r"""Return $\bar p$ and the Wilson score interval around it, for values in $[0, 1]$.

    $$\Bigl(\bar p + \frac{z^2}{2m} \mp z \sqrt{\bar p (1 - \bar p) / m + z^2 / (4 m^2)}\Bigr) \Big/ (1 + z^2 / m)$$

    $m$ is the number of questions. Unlike the mean plus or minus two standard errors, the interval stays within $[0,
    1]$ and has a positive width at 0 and 1. For fractional values, whose variance is smaller than that of zeros and
    ones, the interval is conservative.

    Args:
        values: one number in $[0, 1]$ per question, such as an accuracy or a pass@k.
        confidence: in $(0, 1)$.

    Returns:
        The mean, the lower end and the upper end of the interval.

    Raises:
        ValueError: if there are no values, a value lies outside $[0, 1]$, or `confidence` lies outside $(0, 1)$.

    Examples:
        >>> mean, low, high = estimate_mean_interval(torch.tensor([1.0, 1.0, 1.0, 1.0]))
        >>> mean, round(low, 3), high
        (1.0, 0.51, 1.0)

    References:
        Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    require(0 < confidence < 1, "confidence", confidence, "between 0 and 1, both excluded")
    given = values.detach().double()
    inside = bool(((given >= 0) & (given <= 1)).all()) and len(given) > 0
    require(inside, "values", given.tolist()[:8], "at least one number, all of them in [0, 1]")
    m, mean = len(given), given.mean().item()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = mean + z**2 / (2 * m)
    half = z * math.sqrt(mean * (1 - mean) / m + z**2 / (4 * m**2))
    scale = 1 + z**2 / m
    low, high = (middle - half) / scale, (middle + half) / scale
    return mean, max(0.0, min(low, mean)), min(1.0, max(high, mean))  # rounding must not exclude the mean


@shape_checked
def compute_majority_accuracy(
    answers: Sequence[Sequence[Hashable]], is_correct: Sequence[Sequence[bool]]
) -> Float[Tensor, " question"]:
    r"""Return maj@k for each question: 1 if the most frequent of its $k$ answers is correct, else 0.

    If several answers tie, the value is the share of them that is correct. An answer of None does not vote, and a
    question without votes gets 0. Answers are compared by equality, so normalize them first.

    Args:
        answers: for each question, the answers of its responses.
        is_correct: for each question, whether each of these answers is correct.

    Returns:
        One number in $[0, 1]$ per question, float64.

    Raises:
        ValueError: if `answers` and `is_correct` differ in their lengths.

    Examples:
        >>> compute_majority_accuracy([["4", "4", "5"], ["1", "2", None]], [[True, True, False], [True, False, False]])
        tensor([1.0000, 0.5000], dtype=torch.float64)

    References:
        Wang et al. 2022, arXiv:2203.11171 (self-consistency).
    """
    if [len(row) for row in answers] != [len(row) for row in is_correct]:
        raise ValueError("answers and is_correct must have the same lengths: one verdict per answer")
    values = []
    for row, verdicts in zip(answers, is_correct, strict=True):
        votes = Counter(answer for answer in row if answer is not None)
        right = {answer for answer, verdict in zip(row, verdicts, strict=True) if verdict}
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        values.append(sum(answer in right for answer in winners) / len(winners) if winners else 0.0)
    return torch.tensor(values, dtype=torch.float64)


@shape_checked
def compute_sign_flip_p_value(differences: Int[Tensor, " pair"]) -> float:
    r"""Return $P\bigl(\bigl|\sum_i s_i d_i\bigr| \ge \bigl|\sum_i d_i\bigr|\bigr)$ over all signs $s \in \{-1, 1\}^m$.

    This is the exact two-sided permutation test of paired differences. Its null hypothesis is that neither model is
    better, so that each difference is as likely as its opposite. A small value means that one model is better on the
    same questions, which are taken as a sample of all possible questions. For differences in $\{-1, 0, 1\}$ (one
    response of each model per question) it is McNemar's exact test. Without any difference the value is 1.

    Memory grows with $\sum_i |d_i|$, and time with $m$ times that sum.

    Args:
        differences: $d$, for each question the number of correct responses of one model minus that of the other.

    Returns:
        The p-value in $(0, 1]$; values too small for a float are returned as the least normal float, $2^{-1022}$.

    Examples:
        >>> compute_sign_flip_p_value(torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]))  # 2 / 2^6
        0.03125
        >>> compute_sign_flip_p_value(torch.tensor([2, -1, 0]))
        1.0

    References:
        Fisher 1935, The Design of Experiments, section 21; McNemar 1947, doi:10.1007/BF02295996.
    """
    sizes = [abs(difference) for difference in differences.tolist() if difference]
    # shares[k] is the share of all choices of signs in which the differences with a positive sign sum to k.
    shares = torch.zeros(sum(sizes) + 1, dtype=torch.float64)
    shares[0] = 1.0
    for size in sizes:
        shares /= 2
        shares[size:] += shares[:-size].clone()
    sums = 2 * torch.arange(len(shares)) - sum(sizes)
    extreme = shares[sums.abs() >= abs(int(differences.sum()))].sum().item()
    return min(1.0, max(sys.float_info.min, extreme))


@shape_checked
def estimate_pass_at_k(
    n_correct: Int[Tensor, " question"], n_samples: Int[Tensor, " question"] | int, k: int
) -> Float[Tensor, " question"]:
    r"""Return $1 - \binom{n - c}{k} \big/ \binom{n}{k}$, the unbiased estimate of pass@k for each question.

    It is the mean, over all $k$-subsets of the $n$ responses, of whether a subset contains a correct response. It is
    computed exactly in integers and rounded once to float64. It increases with $k$ and with $c$, and is $c / n$ for $k
    = 1$.

    Args:
        n_correct: $c$, the number of correct responses to each question.
        n_samples: $n$, the number of responses to each question.
        k: $1 \le k \le n$.

    Returns:
        One probability per question.

    Raises:
        ValueError: if $k$ is less than 1 or exceeds an $n$, or a $c$ is not in $[0, n]$.

    Examples:
        >>> estimate_pass_at_k(torch.tensor([0, 1, 4]), 4, k=2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)

    References:
        Chen et al. 2021, arXiv:2107.03374, eq. 1.
    """
    right = n_correct.tolist()
    samples = [n_samples] * len(right) if isinstance(n_samples, int) else n_samples.tolist()
    require(
        1 <= k <= min(samples, default=k), "k", k, f"between 1 and the number of samples, {min(samples, default=k)}"
    )
    if any(not 0 <= c <= n for c, n in zip(right, samples, strict=True)):
        raise ValueError("n_correct must lie between 0 and n_samples for every question")
    # A single division of integers, because 1 - a / b would round twice.
    values = [(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for c, n in zip(right, samples, strict=True)]
    return torch.tensor(values, dtype=torch.float64)
