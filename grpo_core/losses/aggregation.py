"""Reduction of losses per token or per response to the scalar that is differentiated."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import check_choice, is_traced, require, shape_checked
from grpo_core._groups import list_group_sizes
from grpo_core.losses._ratios import attach_gradient
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
    r"""Return the weights $w_{it}$ of $L = \sum_{it} w_{it} \ell_{it}$ for the $N$ responses of one optimizer step.

    | aggregation | $w_{it}$ | |
    |---|---|---|
    | sequence_mean | $1 / (N n_i)$ | every response has the same weight: GRPO |
    | token_mean | $1 / \sum_j n_j$ | every token has the same weight: DAPO as implemented |
    | prompt_mean | $1 / (P \sum_{j \in \text{group}} n_j)$ | every question has the same weight: DAPO's equation |
    | sequence_sum | $1 / N$ | a response has a weight proportional to its length |
    | constant | $1 / (N C)$ | the same, scaled to the size of a mean: Dr. GRPO |

    $n_i$ is the number of tokens of response $i$, and $P$ the number of questions. Call it once for all responses of a
    step and slice the result together with them. Loss and gradient then do not depend on the order of the responses or
    on how they are split into micro-batches and ranks. Exactly 0 outside the mask and where a token is not `kept`.

    Args:
        response_mask: True where a token belongs to a response.
        aggregation: one of the five names above.
        normalize_constant: $C > 0$, in tokens; the longest possible response for "constant". "token_mean" uses it
            instead of its own count of tokens, for a batch that is only a part of the step.
        group_sizes: the number of responses to each question, required by "prompt_mean"; rows are ordered by group.
        kept: False for rejected tokens (or responses, if one column), such as those with an importance ratio out of
            bounds.
        rejected_tokens: whether rejected tokens "count" in $n_i$, which makes the gradient smaller, or "drop" out of
            it, which increases the weights of the others. The default leaves the weights of the others unchanged.
        empty_responses: whether responses and questions without counted tokens "count" in $N$ and $P$ or "drop" out.
            The default leaves the weights of the others unchanged.

    Returns:
        The weights, float64.

    Raises:
        ValueError: if a name is unknown, `normalize_constant` is missing for "constant" or not positive and finite, or
            `group_sizes` is missing for "prompt_mean" or does not match the rows.

    Examples:
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
    weighted, counted = _select_tokens(response_mask, kept, rejected_tokens, empty_responses)
    per_response = _compute_weight_per_token(counted, aggregation, normalize_constant, group_sizes, empty_responses)
    return torch.where(weighted, per_response[:, None], 0.0)


@shape_checked
def compute_sequence_weights(
    response_mask: Bool[Tensor, "batch seq"],
    *,
    kept: Bool[Tensor, "batch _"] | None = None,
    rejected_tokens: CountingName = "count",
    empty_responses: CountingName = "count",
) -> Float[Tensor, "batch 1"]:
    r"""Return the weights $v_i = 1 / N$ of $L = \sum_i v_i \ell_i$, for losses of whole responses.

    Every response has the same weight; token weights would give long responses more. Call it once for all responses of
    an optimizer step. Exactly 0 for responses without kept tokens.

    Args:
        response_mask: True where a token belongs to a response.
        kept: False for rejected responses (or tokens).
        rejected_tokens: with "drop", a response whose tokens are all rejected counts as empty.
        empty_responses: whether empty responses "count" in $N$ or "drop" out.

    Returns:
        The weights, float64.

    Raises:
        ValueError: if a name is unknown.

    Examples:
        >>> compute_sequence_weights(torch.tensor([[True, True], [False, False]]))
        tensor([[0.5000],
                [0.0000]], dtype=torch.float64)

    References:
        Zheng et al. 2025, arXiv:2507.18071, eq. 5.
    """
    weighted, counted = _select_tokens(response_mask, kept, rejected_tokens, empty_responses)
    responses = _count_parts(counted.sum(dim=1).to(torch.float64), empty_responses)
    return torch.where(weighted.any(dim=1, keepdim=True), 1 / responses, 0.0)


@shape_checked
def sum_weighted_losses(losses: Float[Tensor, "batch cols"], weights: Float[Tensor, "batch _"]) -> Float[Tensor, ""]:
    r"""Return $L = \sum_{ij} w_{ij} \ell_{ij}$, in the unit and the precision of the losses.

    Differentiable in `losses`. A loss with weight 0 is never read, and its gradient is exactly 0. The sums of the
    parts of a batch add up to the sum of the whole batch.

    Args:
        losses: $\ell$, one per token or one per response.
        weights: $w$, from `compute_token_weights` for token losses or `compute_sequence_weights` for response losses.

    Returns:
        The sum.

    Raises:
        ValueError: if the shapes differ, for example if response losses are given token weights.

    Examples:
        >>> sum_weighted_losses(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0.5, 0.0]]))
        tensor(0.5000)
    """
    if losses.shape != weights.shape:
        kinds = ["one per response" if part.shape[1] == 1 else "one per token" for part in (losses, weights)]
        raise ValueError(
            f"losses have shape {tuple(losses.shape)} ({kinds[0]}) and weights {tuple(weights.shape)} ({kinds[1]}):"
            " losses of whole responses need compute_sequence_weights, token losses compute_token_weights"
        )
    if is_traced():
        return (torch.where(weights == 0, 0.0, losses) * weights.detach().to(losses.dtype)).sum()
    with torch.no_grad():
        slope = weights.to(losses.dtype)
        weighted = (losses * slope).masked_fill_(weights == 0, 0.0)
    return attach_gradient(weighted, slope, losses).sum()


@shape_checked
def aggregate_token_losses(
    token_losses: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    aggregation: AggregationName,
    *,
    normalize_constant: float | None = None,
    group_sizes: GroupSizes | None = None,
) -> Float[Tensor, ""]:
    r"""Return $L = \sum_{it} w_{it} \ell_{it}$ with the weights of `compute_token_weights` for the given batch.

    Differentiable in `token_losses`. Tokens outside the mask are never read, and their gradient is exactly 0. A
    response without tokens adds 0 and still counts in $N$.

    Args:
        token_losses: $\ell$, the loss of each token.
        response_mask: True where a token belongs to the response.
        aggregation: "sequence_mean" (GRPO), "token_mean" (DAPO), "prompt_mean", "sequence_sum" or "constant" (Dr.
            GRPO).
        normalize_constant: $C > 0$, in tokens; required by "constant" (the longest possible response) and by
            "token_mean" (the response tokens of the whole optimizer batch, because a mean of micro-batch means would
            be a different objective).
        group_sizes: the number of responses to each question, required by "prompt_mean".

    Returns:
        The loss of the batch.

    Raises:
        ValueError: if `aggregation` is unknown, an argument that it requires is None, or `normalize_constant` is not
            positive and finite.

    Examples:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate_token_losses(losses, mask, "sequence_mean")
        tensor(3.5000)
        >>> aggregate_token_losses(losses, mask, "token_mean", normalize_constant=3.0)
        tensor(3.)

    References:
        See `compute_token_weights`.
    """
    if aggregation == "token_mean":
        _check_normalize_constant(normalize_constant, aggregation)
    weights = _compute_weight_per_token(response_mask, aggregation, normalize_constant, group_sizes, "count")
    # Sum in float32, because the unweighted sum of a long row may exceed the range of float16.
    sums = masked_sum(token_losses.to(torch.promote_types(token_losses.dtype, torch.float32)), response_mask, dim=1)
    return (sums * weights.to(sums.dtype)).sum().to(token_losses.dtype)


def _compute_weight_per_token(
    counted: Bool[Tensor, "batch seq"],
    aggregation: str,
    normalize_constant: float | None,
    group_sizes: GroupSizes | None,
    empty_responses: str,
) -> Float[Tensor, " batch"]:
    """Return the weight of each token of a response."""
    check_choice("aggregation", aggregation, Aggregation)
    tokens = counted.sum(dim=1).to(torch.float64)
    responses = _count_parts(tokens, empty_responses)
    match aggregation:
        case "sequence_mean":
            return 1 / (responses * tokens.clamp(min=1))
        case "token_mean":
            total = tokens.sum().clamp(min=1)
            constant = (
                total if normalize_constant is None else _check_normalize_constant(normalize_constant, aggregation)
            )
            return torch.ones_like(tokens) / constant
        case "prompt_mean":
            if group_sizes is None:
                raise ValueError("aggregation='prompt_mean' needs group_sizes; got None")
            sizes = torch.tensor(list_group_sizes(len(tokens), group_sizes), device=tokens.device)
            group = torch.arange(len(sizes), device=tokens.device).repeat_interleave(sizes)
            per_group = torch.zeros(len(sizes), dtype=torch.float64, device=tokens.device).index_add(0, group, tokens)
            return 1 / (_count_parts(per_group, empty_responses) * per_group.clamp(min=1))[group]
        case "sequence_sum":
            return torch.ones_like(tokens) / responses
        case _:  # constant
            return torch.ones_like(tokens) / (responses * _check_normalize_constant(normalize_constant, aggregation))


def _select_tokens(
    response_mask: Bool[Tensor, "batch seq"],
    kept: Bool[Tensor, "batch _"] | None,
    rejected_tokens: str,
    empty_responses: str,
) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Return masks of the tokens that have a weight and of the tokens that count in a denominator."""
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
    weighted = response_mask & kept
    return weighted, response_mask if rejected_tokens == "count" else weighted


def _count_parts(tokens: Float[Tensor, " part"], empty: str) -> Float[Tensor, ""]:
    """Return the number of parts, at least 1; `empty` decides whether parts without tokens count."""
    parts = torch.ones_like(tokens) if empty == "count" else (tokens > 0).to(tokens)
    return parts.sum().clamp(min=1)


def _check_normalize_constant(normalize_constant: float | None, aggregation: str) -> float:
    if normalize_constant is None:
        meaning = (
            "the length limit of a response"
            if aggregation == "constant"
            else "the response tokens of the optimizer step"
        )
        raise ValueError(f"aggregation={aggregation!r} needs normalize_constant, {meaning}; got None")
    if not 0 < normalize_constant < math.inf:
        raise ValueError(f"normalize_constant={normalize_constant} must be positive and finite: it divides the loss")
    return normalize_constant
