"""The names that signatures share."""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip"]
"""Which per-token objective `compute_policy_gradient_loss` computes."""

Aggregation = Literal["sequence_mean", "token_mean", "constant"]
"""How `aggregate_token_losses` turns per-token values into one scalar."""

Metadata = dict[str, Tensor]
"""Named tensors beside a result, detached; each function documents its keys."""

GroundTruth = str | int | float | list[str | int | float] | list[str] | list[int] | list[float]
"""A reference answer, or a list of alternatives of which any one counts."""

RewardFn = Callable[..., dict[str, float]]
"""`reward_fn(response, ground_truth) -> {"reward", "format_reward", "answer_reward"}`."""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the library calls."""

    pad_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...
