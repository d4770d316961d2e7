"""Types that the signatures of several functions share; those of tensors are in tensor_types.py."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]
"""Per-token objectives of `compute_policy_gradient_loss`."""

Aggregation = Literal["sequence_mean", "token_mean", "prompt_mean", "sequence_sum", "constant"]
"""Ways in which `compute_token_weights` and `aggregate_token_losses` reduce token losses to a scalar."""

Counting = Literal["count", "drop"]
"""Treatment of tokens or responses that add nothing to a loss: in the denominator of its mean, or not."""

KLEstimator = Literal["k1", "k2", "k3", "abs", "ratio_k3"]
"""Estimators of the KL divergence in `estimate_kl`."""

ImportanceLevel = Literal["token", "sequence", "geometric"]
"""Unit over which `compute_importance_ratios` takes a ratio."""

Divergence = Literal["binary_kl", "total_variation", "k2", "k3"]
"""Measures of `compute_importance_divergences`; all are at least 0."""

GroupSizes = int | Sequence[int]
"""Number of responses to each question: one number for all groups, or one number per group."""

GroundTruth = str | int | float | list[str | int | float] | list[str] | list[int] | list[float]
"""A reference answer, or a list of alternatives, each of which is accepted."""

RewardFn = Callable[..., dict[str, float] | dict[str, float | None]]
"""`reward_fn(response, ground_truth) -> {"reward", "format_reward", "answer_reward"}`; a reward of None means that the
response could not be scored."""

# mypy checks that callers pass a listed name. At run time any string passes the shape check, so that a wrong name gets
# this library's one-line error instead of a long type error.
if TYPE_CHECKING:
    LossTypeName: TypeAlias = LossType
    AggregationName: TypeAlias = Aggregation
    CountingName: TypeAlias = Counting
    KLEstimatorName: TypeAlias = KLEstimator
    ImportanceLevelName: TypeAlias = ImportanceLevel
    DivergenceName: TypeAlias = Divergence
else:
    LossTypeName = AggregationName = CountingName = KLEstimatorName = ImportanceLevelName = DivergenceName = str


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that this library calls."""

    pad_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`."""
        ...
