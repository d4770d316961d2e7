"""The names that signatures share."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float
from torch import Tensor

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]
"""Which per-token objective `compute_policy_gradient_loss` computes."""

Aggregation = Literal["sequence_mean", "token_mean", "prompt_mean", "sequence_sum", "constant"]
"""How `compute_token_weights` and `aggregate_token_losses` turn per-token values into one scalar."""

Counting = Literal["count", "drop"]
"""Whether what adds nothing to a loss still counts in the denominator of its mean."""

KLEstimator = Literal["k1", "k2", "k3", "abs", "ratio_k3"]
"""Which estimate of a divergence `estimate_kl` gives."""

ImportanceLevel = Literal["token", "sequence", "geometric"]
"""Over what `compute_importance_ratios` takes a ratio."""

GroupSizes = int | Sequence[int]
"""The number of responses to each question: one number for all of them, or one for each."""

Advantages = Float[Tensor, "batch #seq"]
"""One column, constant over the tokens of a response, or one value for each token."""

Metadata = dict[str, Tensor]
"""Named tensors beside a result, detached; each function documents its keys."""

GroundTruth = str | int | float | list[str | int | float] | list[str] | list[int] | list[float]
"""A reference answer, or a list of alternatives of which any one counts."""

RewardFn = Callable[..., dict[str, float] | dict[str, float | None]]
"""`reward_fn(response, ground_truth) -> {"reward", "format_reward", "answer_reward"}`; None: could not be scored."""

# mypy holds a caller to the names; at run time any string comes in, so that a wrong one meets our own one-line error.
if TYPE_CHECKING:
    LossTypeName: TypeAlias = LossType
    AggregationName: TypeAlias = Aggregation
    CountingName: TypeAlias = Counting
    KLEstimatorName: TypeAlias = KLEstimator
    ImportanceLevelName: TypeAlias = ImportanceLevel
else:
    LossTypeName = AggregationName = CountingName = KLEstimatorName = ImportanceLevelName = str


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the library calls."""

    pad_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...
