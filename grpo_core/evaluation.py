"""What to look at beside a loss: intervals, votes, silent groups, and where a gradient comes from."""

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
    r"""$\bar p$, and Wilson's interval around it for values in $[0, 1]$.

    $$\Bigl(\bar p + \frac{z^2}{2m} \mp z \sqrt{\bar p (1 - \bar p) / m + z^2 / (4 m^2)}\Bigr) \Big/ (1 + z^2 / m)$$

    Over $m$ questions. Unlike the mean plus or minus two standard errors, it stays within $[0, 1]$ and is not empty at
    0 and 1. For zeros and ones it is Wilson's; for values between, whose variance is less, it is too wide rather than
    too narrow.

    Args:
        values: one number in $[0, 1]$ per question: an accuracy, a pass@k.
        confidence: in $(0, 1)$.

    Returns:
        The mean, and the lower and upper end of the interval.

    Raises:
        ValueError: if there are no values, one lies outside $[0, 1]$, or `confidence` outside $(0, 1)$.

    Example:
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
    return mean, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@shape_checked
def compute_majority_accuracy(
    answers: Sequence[Sequence[Hashable]], is_correct: Sequence[Sequence[bool]]
) -> Float[Tensor, " question"]:
    r"""maj@k: 1 where the most frequent of a question's $k$ answers is right, else 0.

    Answers that tie share the question: the share of them that is right. An answer of None is no vote, and a question
    without a vote is wrong. Answers count as the same if they are equal: normalize them before.

    Args:
        answers: for each question, the answers of its responses.
        is_correct: for each of them, whether it is right.

    Returns:
        One number in $[0, 1]$ per question, float64.

    Raises:
        ValueError: if the two do not have the same lengths.

    Example:
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
    r"""$P\bigl(\bigl|\sum_i s_i d_i\bigr| \ge \bigl|\sum_i d_i\bigr|\bigr)$ over all signs $s \in \{-1, 1\}^m$.

    Small where one of two models is better on the same questions. The permutation test of paired differences,
    two-sided and exact: if neither model is better, each difference is as likely as its opposite. Of differences in
    $\{-1, 0, 1\}$, one response of each model to each question, it is McNemar's exact test. It answers for the
    questions asked as a sample of all that could be asked. 1 without any difference.

    Time and memory grow with $\sum_i |d_i|$: time with $m$ times that.

    Args:
        differences: $d$, for each question how many of $k$ responses the one model has right more than the other.

    Returns:
        The probability, in $(0, 1]$; what is too small for a number is the least normal one, $2^{-1022}$.

    Example:
        >>> compute_sign_flip_p_value(torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]))  # 2 / 2^6
        0.03125
        >>> compute_sign_flip_p_value(torch.tensor([2, -1, 0]))
        1.0

    References:
        Fisher 1935, The Design of Experiments, section 21; McNemar 1947, doi:10.1007/BF02295996.
    """
    sizes = [abs(difference) for difference in differences.tolist() if difference]
    # Of each sum that the differences with a positive sign can come to, the share of all choices.
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
    r"""$1 - \binom{n - c}{k} \big/ \binom{n}{k}$: unbiased probability that one of $k$ responses is right.

    It is the mean over all $k$-subsets of the $n$ responses. Exact in integers, then rounded to float64. Monotone in
    $k$ and in $c$; for $k = 1$ it is $c / n$.

    Args:
        n_correct: $c$, right responses to each question.
        n_samples: $n$, responses to each question.
        k: $1 \le k \le n$.

    Returns:
        One probability per question.

    Raises:
        ValueError: if $k$ is less than 1 or exceeds an $n$, or a $c$ is not in $[0, n]$.

    Example:
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
    # One division of integers: 1 - a / b would round twice.
    values = [(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for c, n in zip(right, samples, strict=True)]
    return torch.tensor(values, dtype=torch.float64)
