"""From one loss per token to the one number that is differentiated."""

import math
from typing import TYPE_CHECKING, TypeAlias, assert_never, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._check import shape_checked
from grpo_core.masking import masked_sum
from grpo_core.types import Aggregation

if TYPE_CHECKING:
    AggregationName: TypeAlias = Aggregation
else:
    # mypy holds a caller to the names; at run time any string comes in, so that a wrong one meets our own error.
    AggregationName = str

_AGGREGATIONS = get_args(Aggregation)


@shape_checked
def aggregate_token_losses(
    token_losses: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    aggregation: AggregationName,
    *,
    normalize_constant: float | None = None,
) -> Float[Tensor, ""]:
    r"""$L = \sum_{it} w_{it} m_{it} \ell_{it}$ over $N$ responses; the choice is that of the weights $w$.

    | aggregation | $w_{it}$ | $C$ |
    |---|---|---|
    | sequence_mean | $1 / (N \sum_t m_{it})$ | not used |
    | token_mean | $1 / C$ | response tokens of the whole optimizer batch |
    | constant | $1 / (N C)$ | longest possible response, in tokens |

    Differentiable in `token_losses`; a token outside the mask is never read and gets gradient exactly 0. A response
    without tokens adds 0 and still counts in $N$.

    Args:
        token_losses: $\ell$, the loss of each token.
        response_mask: $m$, True where a token belongs to the response.
        aggregation: "sequence_mean" (GRPO), "token_mean" (DAPO) or "constant" (Dr. GRPO).
        normalize_constant: $C > 0$, in tokens; required by "token_mean" and "constant".

    Returns:
        The loss of the batch.

    Raises:
        ValueError: if `aggregation` is none of the three, or needs a `normalize_constant` that is None, not positive
            or not finite.

    Example:
        >>> import torch
        >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate_token_losses(losses, mask, "sequence_mean")
        tensor(3.5000)
        >>> aggregate_token_losses(losses, mask, "token_mean", normalize_constant=3.0)
        tensor(3.)

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3 (sequence_mean); Yu et al. 2025, arXiv:2503.14476, eq. 8
        (token_mean); Liu et al. 2025, arXiv:2503.20783, section 3.1 (constant).
    """
    if aggregation not in _AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is unknown: choose one of {', '.join(_AGGREGATIONS)}")
    row_sums = masked_sum(token_losses, response_mask, dim=1)
    match aggregation:
        case "sequence_mean":
            # An empty row has sum 0: any positive count makes its mean 0.
            return (row_sums / response_mask.sum(dim=1).clamp(min=1)).mean()
        case "token_mean":
            return row_sums.sum() / _required_constant(normalize_constant, aggregation)
        case "constant":
            return row_sums.mean() / _required_constant(normalize_constant, aggregation)
        case _:  # pragma: no cover - mypy shows that nothing is left
            assert_never(aggregation)


def _required_constant(normalize_constant: float | None, aggregation: str) -> float:
    if normalize_constant is None:
        raise ValueError(f"aggregation={aggregation!r} needs normalize_constant; got None")
    if not 0 < normalize_constant < math.inf:
        raise ValueError(f"normalize_constant={normalize_constant} must be positive and finite: it divides the loss")
    return normalize_constant
