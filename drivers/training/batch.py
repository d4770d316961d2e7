"""The rollouts of one step as tensors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor

from drivers.engines.protocol import Completion
from drivers.tasks.demonstrations import Demonstration

Scores = list[dict[str, float | None]]
"""Of each response; a reward of None where it could not be scored."""


class StepRollouts(NamedTuple):
    """What a step trains on, and what all that was sampled for it was like."""

    completions: list[Completion]
    scores: Scores
    raw_rewards: Tensor
    greedy_rewards: Tensor | None
    """Of one greedy response to each question, where advantages are taken against it."""
    metrics: dict[str, float]
    shown: Sequence[dict[str, Any]] = ()
    """The first of the completions, as rows of completions.jsonl."""

    @property
    def logged_completions(self) -> list[Completion]:
        return self.completions[: len(self.shown)]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, to the last bit; null for a reward that is not known."""
        return {
            "completions": [asdict(completion) for completion in self.completions],
            "scores": self.scores,
            "raw_rewards": _to_json(self.raw_rewards),
            "greedy_rewards": None if self.greedy_rewards is None else _to_json(self.greedy_rewards),
            "facts": self.metrics,
            "shown": self.shown,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "StepRollouts":
        """The same again."""
        ids = ("prompt_token_ids", "token_ids", "log_probs")
        kept: list[dict[str, Any]] = [
            {k: tuple(v) if k in ids else v for k, v in completion.items()} for completion in values["completions"]
        ]
        greedy = values["greedy_rewards"]
        return StepRollouts(
            [Completion(**fields) for fields in kept],
            values["scores"],
            _from_json(values["raw_rewards"]),
            None if greedy is None else _from_json(greedy),
            values["facts"],
            values.get("shown", ()),  # a checkpoint from before there were any
        )


def _to_json(rewards: Tensor) -> list[float | None]:
    return [None if math.isnan(reward) else reward for reward in rewards.tolist()]


def _from_json(rewards: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if reward is None else reward for reward in rewards])


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RolloutBatch:
    """Responses with what training needs of them, in host memory; row i of each field is response i.

    What is None was not asked for. A field has a column for each token of the longest response, or one column: a value
    for the response as a whole.
    """

    completions: tuple[Completion, ...]
    response_mask: Bool[Tensor, "batch seq"]
    """True on the sampled tokens, the end token included; column 0 is a response's first token."""
    raw_rewards: Float[Tensor, "batch 1"]
    """NaN where a response could not be scored."""
    group_ids: Int[Tensor, "batch 1"]
    """Rows of one question share a number: the text of the prompt would not do, for data may hold it twice."""
    sampler_log_probs: Float[Tensor, "batch seq"]
    """Under the distribution that the engine sampled from; 0 past the end."""
    advantages: Float[Tensor, "batch _"] | None = None
    old_log_probs: Float[Tensor, "batch seq"] | None = None
    """What a ratio is taken to, where it is not the policy of the pass itself."""
    old_entropy: Float[Tensor, "batch seq"] | None = None
    """Of the policy before the first update on these responses."""
    reference_log_probs: Float[Tensor, "batch seq"] | None = None
    policy_weights: Float[Tensor, "batch _"] | None = None
    """Of the objective: 0 where a token or response was left out."""
    token_weights: Float[Tensor, "batch seq"] | None = None
    """Of divergence and entropy."""
    importance_weights: Float[Tensor, "batch _"] | None = None
    penalized: Bool[Tensor, "batch seq"] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def n_response_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        return torch.tensor([len(completion.token_ids) for completion in self.completions])

    @property
    def truncated(self) -> Bool[Tensor, " batch"]:
        return torch.tensor([completion.finish_reason == "length" for completion in self.completions])

    @property
    def unscored(self) -> Bool[Tensor, " batch"]:
        return self.raw_rewards[:, 0].isnan()

    @property
    def group_sizes(self) -> list[int]:
        """Of runs of rows with the same question."""
        return [len(list(rows)) for _, rows in groupby(self.group_ids[:, 0].tolist())]

    def select(self, rows: Sequence[int]) -> "RolloutBatch":
        """These rows, cut to the longest response among them."""
        index, whole = torch.tensor(rows), self.response_mask.shape[1]
        width = max(1, *(len(self.completions[row].token_ids) for row in rows))

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index, :width] if tensor.shape[1] == whole else tensor[index]

        parts = {name: cut(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, completions=tuple(self.completions[row] for row in rows), **parts)

    def to(self, device: torch.device) -> "RolloutBatch":
        """The same with its tensors on `device`; the host does not wait for the copies."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
        return replace(self, **moved)

    def split(self, size: int) -> Iterator["RolloutBatch"]:
        """Consecutive parts of `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def shuffled(self, generator: torch.Generator) -> "RolloutBatch":
        """The groups in random order, each kept together: responses to one prompt are scored in one row."""
        ids = self.group_ids[:, 0].tolist()
        groups = [list(rows) for _, rows in groupby(range(len(self)), key=lambda row: ids[row])]
        order = torch.randperm(len(groups), generator=generator).tolist()
        return self.select([row for group in order for row in groups[group]])


def make_rollout_batch(completions: Sequence[Completion], raw_rewards: Tensor, group_size: int = 1) -> RolloutBatch:
    """From the token ids that were sampled; text is never tokenized again. Groups stand one after the other."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    response_mask = torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]
    sampled = torch.tensor(
        [value for completion in completions for value in completion.log_probs], dtype=torch.float32
    )
    return RolloutBatch(
        completions=tuple(completions),
        response_mask=response_mask,
        raw_rewards=raw_rewards[:, None],
        group_ids=torch.arange(len(completions))[:, None] // group_size,
        sampler_log_probs=torch.zeros(response_mask.shape).masked_scatter(response_mask, sampled),
    )


def as_right(demonstrations: Sequence[Demonstration]) -> RolloutBatch:
    """As responses with a reward of 1. Nobody sampled them: 0 stands for log-probs that nothing reads."""
    shown = [
        Completion("", one.prompt_token_ids, one.response_token_ids, (0.0,) * len(one.response_token_ids), "stop")
        for one in demonstrations
    ]
    return imitation_batch(shown)


def imitation_batch(completions: Sequence[Completion]) -> RolloutBatch:
    """A batch of responses that are imitated: reward and advantage are 1.

    Those to one prompt that stand together are a group, of any size: they are shuffled, and scored, side by side.
    """
    batch = make_rollout_batch(completions, torch.ones(len(completions)))
    groups = enumerate(groupby(completions, key=lambda completion: completion.prompt_token_ids))
    group_ids = torch.tensor([number for number, (_, members) in groups for _ in members])[:, None]
    return replace(batch, advantages=batch.raw_rewards, group_ids=group_ids)
