"""From one loss per token or response to the one number that is differentiated."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core._groups import list_sizes
from grpo_core.losses._ratios import with_slope
from grpo_core.masking import masked_sum
from grpo_core.types import Aggregation, AggregationName, Counting, CountingName, GroupSizes


@shape_checked
def compute_token_weights(
    response_mask: Bool[Tensor, "batch seq"],
    aggregation: AggregationName,
    *,
    normalize_constant: float | None = None,
    group_sizes: GroupSizes | None = None,
    kept: Bool[Tensor, "batch _"] | None = None,
    rejected_tokens: CountingName = "count",
    empty_responses: CountingName = "count",
) -> Float[Tensor, "batch seq"]:
    r"""$w_{it}$ of $L = \sum_{it} w_{it} \ell_{it}$, for the $N$ responses of one optimizer step.

    | aggregation | $w_{it}$ | |
    |---|---|---|
    | sequence_mean | $1 / (N n_i)$ | each response counts the same: GRPO |
    | token_mean | $1 / \sum_j n_j$ | each token counts the same: DAPO as it is run |
    | prompt_mean | $1 / (P \sum_{j \in \text{group}} n_j)$ | each question counts the same: DAPO's equation |
    | sequence_sum | $1 / N$ | a response counts as much as it is long |
    | constant | $1 / (N C)$ | the same, of the size of a mean: Dr. GRPO |

    $n_i$ is the number of tokens of response $i$, $P$ that of questions. Call it once for all responses of a step and
    slice the result with them: then loss and gradient do not depend on how the step is cut into micro-batches, given
    to ranks or ordered. Exactly 0 outside the mask and where a token was not `kept`.

    Args:
        response_mask: True where a token belongs to a response.
        aggregation: one of the five.
        normalize_constant: $C > 0$, in tokens, for "constant": the longest possible response. "token_mean" takes it in
            place of its count, where the batch given is a part of the step.
        group_sizes: for "prompt_mean", the number of responses to each question; rows stand group after group.
        kept: False for tokens (or, of one column, responses) that were rejected: by an importance ratio, an entropy.
        rejected_tokens: whether they "count" in $n_i$, so that rejection makes the gradient smaller, or "drop" out of
            it, so that the others weigh more. The default keeps the weights of the others as they are.
        empty_responses: whether responses (and questions) of which no token counts still "count" in $N$ and $P$, or
            "drop" out. The default keeps the weights of the others as they are.

    Returns:
        The weights, float64.

    Raises:
        ValueError: if a name is unknown, "constant" has no `normalize_constant` or one that is not positive and
            finite, or "prompt_mean" has no `group_sizes` or ones that the rows do not fill.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> compute_token_weights(mask, "sequence_mean")
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]], dtype=torch.float64)
        >>> compute_token_weights(mask, "sequence_mean", kept=torch.tensor([[True], [False]]), empty_responses="drop")
        tensor([[0.2500, 0.2500],
                [0.0000, 0.0000]], dtype=torch.float64)

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 (sequence_mean); Yu et al. 2025, arXiv:2503.14476, eq. 8 (token_mean
        and, read literally, prompt_mean); Liu et al. 2025, arXiv:2503.20783, section 3.1 (constant).
    """
    carries, counted = _carried_and_counted(response_mask, kept, rejected_tokens, empty_responses)
    per_response = _per_response(counted, aggregation, normalize_constant, group_sizes, empty_responses)
    return torch.where(carries, per_response[:, None], 0.0)


@shape_checked
def compute_sequence_weights(
    response_mask: Bool[Tensor, "batch seq"],
    *,
    kept: Bool[Tensor, "batch _"] | None = None,
    rejected_tokens: CountingName = "count",
    empty_responses: CountingName = "count",
) -> Float[Tensor, "batch 1"]:
    r"""$v_i = 1 / N$ of $L = \sum_i v_i \ell_i$: the weights of losses that a response has as a whole.

    The only fair ones for such losses: weighed by their tokens, long responses would count more. Call it once for all
    responses of an optimizer step. Exactly 0 for responses without a token that is kept.

    Args:
        response_mask: True where a token belongs to a response.
        kept: False for responses (or tokens) that were rejected.
        rejected_tokens: with "drop", a response of which all is rejected has no tokens.
        empty_responses: whether responses without tokens "count" in $N$ or "drop" out.

    Returns:
        The weights, float64.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> compute_sequence_weights(torch.tensor([[True, True], [False, False]]))
        tensor([[0.5000],
                [0.0000]], dtype=torch.float64)

    References:
        Zheng et al. 2025, arXiv:2507.18071, eq. 5.
    """
    carries, counted = _carried_and_counted(response_mask, kept, rejected_tokens, empty_responses)
    responses = _count(counted.sum(dim=1).to(torch.float64), empty_responses)
    return torch.where(carries.any(dim=1, keepdim=True), 1 / responses, 0.0)


@shape_checked
def sum_weighted_losses(losses: Float[Tensor, "batch cols"], weights: Float[Tensor, "batch _"]) -> Float[Tensor, ""]:
    r"""$L = \sum_{ij} w_{ij} \ell_{ij}$, in the unit and the precision of the losses.

    Differentiable in `losses`; where the weight is 0, the loss is never read and gets gradient exactly 0. The sums of
    any parts of a batch add up to the sum of the whole.

    Args:
        losses: $\ell$, one for each token or one for each response.
        weights: $w$ of `compute_token_weights` or `compute_sequence_weights`, as the losses demand.

    Returns:
        The sum.

    Raises:
        ValueError: if losses of responses are given weights of tokens, or the other way around.

    Example:
        >>> sum_weighted_losses(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0.5, 0.0]]))
        tensor(0.5000)
    """
    if losses.shape != weights.shape:
        kinds = ["one per response" if part.shape[1] == 1 else "one per token" for part in (losses, weights)]
        raise ValueError(
            f"losses have shape {tuple(losses.shape)} ({kinds[0]}) and weights {tuple(weights.shape)} ({kinds[1]}):"
            " losses of whole responses take compute_sequence_weights, those of tokens compute_token_weights"
        )
    if is_traced():
        return (torch.where(weights == 0, 0.0, losses) * weights.detach().to(losses.dtype)).sum()
    with torch.no_grad():
        slope = weights.to(losses.dtype)
        weighted = (losses * slope).masked_fill_(weights == 0, 0.0)
    return with_slope(weighted, slope, losses).sum()


@shape_checked
def aggregate_token_losses(
    token_losses: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    aggregation: AggregationName,
    *,
    normalize_constant: float | None = None,
    group_sizes: GroupSizes | None = None,
) -> Float[Tensor, ""]:
    r"""$L = \sum_{it} w_{it} \ell_{it}$ with the weights of `compute_token_weights`, of a batch or a micro-batch.

    Differentiable in `token_losses`; a token outside the mask is never read and gets gradient exactly 0. A response
    without tokens adds 0 and still counts in $N$.

    Args:
        token_losses: $\ell$, the loss of each token.
        response_mask: True where a token belongs to the response.
        aggregation: "sequence_mean" (GRPO), "token_mean" (DAPO), "prompt_mean", "sequence_sum" or "constant" (Dr.
            GRPO).
        normalize_constant: $C > 0$, in tokens; required by "constant" (longest possible response) and by "token_mean"
            (response tokens of the whole optimizer batch: a mean of micro-batch means would be another objective).
        group_sizes: required by "prompt_mean".

    Returns:
        The loss of the batch.

    Raises:
        ValueError: if `aggregation` is none of the five, or needs an argument that is None, or a `normalize_constant`
            that is not positive or not finite.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate_token_losses(losses, mask, "sequence_mean")
        tensor(3.5000)
        >>> aggregate_token_losses(losses, mask, "token_mean", normalize_constant=3.0)
        tensor(3.)

    References:
        Those of `compute_token_weights`.
    """
    if aggregation == "token_mean":
        _positive(normalize_constant, aggregation)
    weights = _per_response(response_mask, aggregation, normalize_constant, group_sizes, "count")
    # The sum of a long row, before it is weighed, may be more than float16 holds.
    sums = masked_sum(token_losses.to(torch.promote_types(token_losses.dtype, torch.float32)), response_mask, dim=1)
    return (sums * weights.to(sums.dtype)).sum().to(token_losses.dtype)


def _per_response(
    counted: Bool[Tensor, "batch seq"],
    aggregation: str,
    normalize_constant: float | None,
    group_sizes: GroupSizes | None,
    empty_responses: str,
) -> Float[Tensor, " batch"]:
    """The weight of each token of a response."""
    check_choice("aggregation", aggregation, Aggregation)
    tokens = counted.sum(dim=1).to(torch.float64)
    responses = _count(tokens, empty_responses)
    match aggregation:
        case "sequence_mean":
            return 1 / (responses * tokens.clamp(min=1))
        case "token_mean":
            total = tokens.sum().clamp(min=1)
            constant = total if normalize_constant is None else _positive(normalize_constant, aggregation)
            return torch.ones_like(tokens) / constant
        case "prompt_mean":
            if group_sizes is None:
                raise ValueError("aggregation='prompt_mean' needs group_sizes; got None")
            sizes = torch.tensor(list_sizes(len(tokens), group_sizes), device=tokens.device)
            group = torch.arange(len(sizes), device=tokens.device).repeat_interleave(sizes)
            per_group = torch.zeros(len(sizes), dtype=torch.float64, device=tokens.device).index_add(0, group, tokens)
            return 1 / (_count(per_group, empty_responses) * per_group.clamp(min=1))[group]
        case "sequence_sum":
            return torch.ones_like(tokens) / responses
        case _:  # constant
            return torch.ones_like(tokens) / (responses * _positive(normalize_constant, aggregation))


def _carried_and_counted(
    response_mask: Bool[Tensor, "batch seq"],
    kept: Bool[Tensor, "batch _"] | None,
    rejected_tokens: str,
    empty_responses: str,
) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """The tokens that carry loss, and those that count in a denominator."""
    check_choice("rejected_tokens", rejected_tokens, Counting)
    check_choice("empty_responses", empty_responses, Counting)
    if kept is None:
        return response_mask, response_mask
    require(
        kept.shape[1] in (1, response_mask.shape[1]),
        "kept",
        f"[shape {tuple(kept.shape)}]",
        f"one column, or as many as response_mask has: {response_mask.shape[1]}",
    )
    carries = response_mask & kept
    return carries, response_mask if rejected_tokens == "count" else carries


def _count(tokens: Float[Tensor, " part"], empty: str) -> Float[Tensor, ""]:
    """How many parts there are; at least 1."""
    parts = torch.ones_like(tokens) if empty == "count" else (tokens > 0).to(tokens)
    return parts.sum().clamp(min=1)


def _positive(normalize_constant: float | None, aggregation: str) -> float:
    if normalize_constant is None:
        raise ValueError(f"aggregation={aggregation!r} needs normalize_constant; got None")
    if not 0 < normalize_constant < math.inf:
        raise ValueError(f"normalize_constant={normalize_constant} must be positive and finite: it divides the loss")
    return normalize_constant
