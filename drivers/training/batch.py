"""The rollouts of one step as tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.protocol import Completion
from drivers.tasks.demonstrations import Demonstration

Scores = list[dict[str, float | None]]
"""The scores of each response by name; the reward is None if the response could not be scored."""


class StepRollouts(NamedTuple):
    """The rollouts that a step trains on, and metrics of everything that was sampled for it."""

    completions: list[Completion]
    scores: Scores
    rewards: Tensor
    greedy_rewards: Tensor | None
    """The reward of one greedy response to each question, if it is the baseline of the advantages."""
    metrics: dict[str, float]
    """Metrics of everything that was sampled, for the log line of the step."""
    logged_rows: Sequence[dict[str, Any]] = ()
    """Rows of completions.jsonl for the first completions."""

    @property
    def logged_completions(self) -> list[Completion]:
        return self.completions[: len(self.logged_rows)]

    def to_json(self) -> dict[str, Any]:
        """Return values that JSON represents exactly; a missing reward is null."""
        return {
            "completions": [asdict(completion) for completion in self.completions],
            "scores": self.scores,
            "raw_rewards": _to_json(self.rewards),
            "greedy_rewards": None if self.greedy_rewards is None else _to_json(self.greedy_rewards),
            "facts": self.metrics,
            "shown": self.logged_rows,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "StepRollouts":
        """Return the rollouts that `to_json` wrote."""
        ids = ("prompt_token_ids", "token_ids", "log_probs", "sampled")
        kept: list[dict[str, Any]] = [
            {k: tuple(v) if k in ids else v for k, v in completion.items()}
            | {
                "kept": KeptTokens.from_json(completion.get("kept")),
                "excluded": tuple(map(tuple, completion.get("excluded", ()))),
            }
            for completion in values["completions"]
        ]
        return StepRollouts(
            [Completion(**completion) for completion in kept],
            values["scores"],
            _from_json(values["raw_rewards"]),
            None if values["greedy_rewards"] is None else _from_json(values["greedy_rewards"]),
            values["facts"],
            values.get("shown", ()),  # older checkpoints have none
        )


def _to_json(rewards: Tensor) -> list[float | None]:
    return [None if math.isnan(reward) else reward for reward in rewards.tolist()]


def _from_json(rewards: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if reward is None else reward for reward in rewards])


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts as tensors in host memory; row i of each field is response i.

    A field has one column per token of the longest response, or one column if each response has a single value. Token
    ids stay in `completions`: `forward` packs them.

    Two responses to one prompt, with token ids (4, 5) and (6,):

    >>> first = Completion("a", (1, 2), (4, 5), (-0.5, -0.25), "stop")
    >>> second = Completion("b", (1, 2), (6,), (-2.0,), "stop")
    >>> batch = make_rollout_batch([first, second], torch.tensor([1.0, 0.0]), group_size=2)
    >>> batch.response_mask
    tensor([[ True,  True],
            [ True, False]])
    >>> batch.rewards.tolist(), batch.group_ids.tolist()
    ([[1.0], [0.0]], [[0], [0]])
    >>> batch.sampler_log_probs.tolist()
    [[-0.5, -0.25], [-2.0, 0.0]]
    """

    completions: tuple[Completion, ...]
    response_mask: Bool[Tensor, "batch seq"]
    """True on the sampled tokens, including the end token; column 0 is the first token of a response. False on the
    tokens that a conversation inserts."""
    rewards: Float[Tensor, "batch 1"]
    """Reward of each response; NaN if it could not be scored."""
    group_ids: Int[Tensor, "batch 1"]
    """Number of the question. The prompt does not identify it, because a data set may contain a text twice."""
    sampler_log_probs: Float[Tensor, "batch seq"]
    """Log-probs under the distribution that the engine sampled from; 0 after the end of a response."""

    def __len__(self) -> int:
        return len(self.completions)

    @classmethod
    def extending(cls, batch: "RolloutBatch", **values: Any) -> Self:
        """Return a batch of this class with `values`, and the other fields of `batch`."""
        shared = {field.name: getattr(batch, field.name) for field in fields(cls) if field.name not in values}
        return cls(**shared, **values)

    @property
    def n_response_tokens(self) -> int:
        """Return the number of sampled tokens."""
        return sum(self.lengths.tolist())

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Return the number of sampled tokens of each response."""
        return torch.tensor([completion.n_sampled for completion in self.completions])

    @property
    def truncated(self) -> Bool[Tensor, " batch"]:
        """Return whether each response ran into the length limit."""
        return torch.tensor([completion.finish_reason == "length" for completion in self.completions])

    @property
    def unscored(self) -> Bool[Tensor, " batch"]:
        """Return whether each response lacks a reward."""
        return self.rewards[:, 0].isnan()

    @property
    def group_sizes(self) -> list[int]:
        """Return the number of consecutive rows of each question."""
        return [len(list(rows)) for _, rows in groupby(self.group_ids[:, 0].tolist())]

    def select(self, rows: Sequence[int]) -> Self:
        """Return these rows, with as many columns as the longest response among them has tokens."""
        index, full_width = torch.tensor(rows), self.response_mask.shape[1]
        width = max(1, *(len(self.completions[row].token_ids) for row in rows))

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index, :width] if tensor.shape[1] == full_width else tensor[index]

        return self._map(cut, completions=tuple(self.completions[row] for row in rows))

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on `device`, without waiting for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor], **others: Any) -> Self:
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **(tensors | others))

    def split(self, size: int) -> Iterator[Self]:
        """Yield consecutive parts of `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def shuffled(self, generator: torch.Generator) -> Self:
        """Return the groups in random order, each in one piece, because its responses can share a forward pass."""
        ids = self.group_ids[:, 0].tolist()
        groups = [list(rows) for _, rows in groupby(range(len(self)), key=lambda row: ids[row])]
        order = torch.randperm(len(groups), generator=generator).tolist()
        return self.select([row for group in order for row in groups[group]])


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PreparedBatch(RolloutBatch):
    """Rollouts with what is computed once per rollout batch, before the first update."""

    advantages: Float[Tensor, "batch _"]
    """Advantage of each response, or of each token: by `otb`, or with a KL penalty in the reward or a teacher."""
    old_log_probs: Float[Tensor, "batch seq"]
    """Log-probs under the policy before the first update; NaN if no setting needs them."""
    old_entropy: Float[Tensor, "batch seq"]
    """Entropy of the policy before the first update; NaN if no setting needs it."""
    reference_log_probs: Float[Tensor, "batch seq"]
    """Log-probs under the policy that the KL penalty refers to; the sampler's unless the reference is a model."""
    teacher_log_probs: Float[Tensor, "batch seq"]
    """Log-probs under the teacher; NaN if there is none."""

    @classmethod
    def from_rollouts(cls, rollouts: RolloutBatch, advantages: Tensor, **log_probs: Tensor) -> Self:
        """Return `rollouts` with `advantages`, and a default for each other field that is not given."""
        unknown = torch.full(rollouts.response_mask.shape, torch.nan)
        defaults = {
            "old_log_probs": unknown,
            "old_entropy": unknown,
            "reference_log_probs": rollouts.sampler_log_probs,
            "teacher_log_probs": unknown,
        }
        return cls.extending(rollouts, advantages=advantages, **(defaults | log_probs))


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class WeightedBatch(RolloutBatch):
    """Rollouts of one optimizer step with the weights of their losses, ready to be split into micro-batches.

    A missing reward is 0 here, and its weight is 0.
    """

    advantages: Float[Tensor, "batch _"]
    old_log_probs: Float[Tensor, "batch seq"] | None
    """Log-probs that the ratio refers to; None if they are those of the loss's own forward pass, without gradient."""
    reference_log_probs: Float[Tensor, "batch seq"]
    objective_weights: Float[Tensor, "batch _"]
    """Weight of each policy loss; 0 for excluded tokens and responses."""
    token_weights: Float[Tensor, "batch seq"]
    """Weight of each token's KL penalty and entropy bonus."""
    importance_weights: Float[Tensor, "batch _"] | None
    """Weights that correct for the sampler; None if there are none, or if the loss's forward pass computes them."""
    penalized: Bool[Tensor, "batch seq"]
    """The tokens that `kl_cov` penalizes."""
    imitation_weights: Float[Tensor, "batch seq"]
    """Weight of each token's negative log-likelihood; 0 unless `--positive-nll-coef` imitates the response."""

    @classmethod
    def from_prepared(cls, batch: PreparedBatch, **weights: Tensor | None) -> Self:
        """Return `batch` with the weights of its step. Missing rewards become 0, because 0 times NaN is NaN."""
        return cls.extending(batch, rewards=batch.rewards.masked_fill(batch.rewards.isnan(), 0.0), **weights)


def make_rollout_batch(completions: Sequence[Completion], rewards: Tensor, group_size: int = 1) -> RolloutBatch:
    """Make a batch from the sampled token ids, without tokenizing text again. The rows of a group are consecutive."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    has_token = torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]
    is_sampled = torch.tensor([flag for completion in completions for flag in completion.is_sampled], dtype=torch.bool)
    log_probs = torch.tensor(
        [value for completion in completions for value in completion.log_probs], dtype=torch.float32
    )
    return RolloutBatch(
        completions=tuple(completions),
        response_mask=torch.zeros_like(has_token).masked_scatter(has_token, is_sampled),
        rewards=rewards[:, None],
        group_ids=torch.arange(len(completions))[:, None] // group_size,
        sampler_log_probs=torch.zeros(has_token.shape).masked_scatter(has_token, log_probs),
    )


def demonstration_batch(demonstrations: Sequence[Demonstration]) -> PreparedBatch:
    """Return a batch of demonstrations to imitate. No engine sampled them, so their log-probs are a placeholder."""
    completions = [
        Completion("", one.prompt_token_ids, one.response_token_ids, (0.0,) * len(one.response_token_ids), "stop")
        for one in demonstrations
    ]
    return imitation_batch(completions)


def imitation_batch(completions: Sequence[Completion]) -> PreparedBatch:
    """Return a batch of responses to imitate, with reward and advantage 1.

    Consecutive responses to one prompt form a group of any size, which is shuffled and scored together.
    """
    batch = make_rollout_batch(completions, torch.ones(len(completions)))
    groups = enumerate(groupby(completions, key=lambda completion: completion.prompt_token_ids))
    group_ids = torch.tensor([number for number, (_, members) in groups for _ in members])[:, None]
    return PreparedBatch.from_rollouts(replace(batch, group_ids=group_ids), batch.rewards)
