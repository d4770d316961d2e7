"""The rollouts of one step as tensors, and the policy's log-probs of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor, nn

from drivers.config import GrpoConfig
from drivers.rollout import Completion
from grpo_core import get_group_log_probs, get_response_log_probs


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
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
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


def score(
    policy: nn.Module,
    rollouts: RolloutBatch,
    temperature: float,
    *,
    with_entropy: bool = False,
    detach_entropy: bool = True,
) -> dict[str, Tensor]:
    """`log_probs` of each response token under `policy`, and on request their `token_entropy`.

    Both are Float "batch seq", 0 past the end of a response.
    """
    options = {"return_token_entropy": with_entropy, "temperature": temperature, "detach_entropy": detach_entropy}
    parts = [
        _score_group(policy, prompt, [completion.token_ids for completion in group], options)
        for prompt, group in groupby(rollouts.completions, key=lambda completion: completion.prompt_token_ids)
    ]
    width = rollouts.response_mask.shape[1]
    return {
        name: torch.cat([nn.functional.pad(part[name], (0, width - part[name].shape[1])) for part in parts])
        for name in parts[0]
    }


def _score_group(
    policy: nn.Module, prompt: tuple[int, ...], responses: list[tuple[int, ...]], options: dict[str, Any]
) -> dict[str, Tensor]:
    """One row for the group where the shared prompt is the larger part of it, else one padded row per response."""
    if len(prompt) >= max(map(len, responses)) > 0:
        return get_group_log_probs(policy, prompt, responses, **options)
    return score_padded_rows(policy, prompt, responses, options)


def score_padded_rows(
    policy: nn.Module, prompt: tuple[int, ...], responses: list[tuple[int, ...]], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The same from one row per response, cut to the columns of the responses."""
    device = next(policy.parameters()).device
    width = max(1, *map(len, responses))
    # Right padding under a causal mask is seen by no real token, so any id will do.
    rows = torch.tensor([(*prompt, *r, *(prompt[0],) * (width - len(r))) for r in responses], device=device)
    lengths = torch.tensor([[len(response)] for response in responses], device=device)
    columns = torch.arange(rows.shape[1] - 1, device=device) - (len(prompt) - 1)
    response_mask = (columns >= 0) & (columns < lengths)
    scored = get_response_log_probs(policy, rows[:, :-1], rows[:, 1:], response_mask=response_mask, **options)
    return {name: values[:, len(prompt) - 1 :] for name, values in scored.items()}


@torch.no_grad()
def score_all(
    policy: nn.Module, rollouts: RolloutBatch, config: GrpoConfig, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """`score` of a whole rollout batch in parts, in the precision and the mode of training; in host memory."""
    width, device = rollouts.response_mask.shape[1], next(policy.parameters()).device
    parts = [
        score(policy, part.to(device), config.sampling_temperature, with_entropy=with_entropy)
        for part in rollouts.split(config.micro_train_batch_size)
    ]
    return {
        name: torch.cat([nn.functional.pad(part[name], (0, width - part[name].shape[1])) for part in parts]).cpu()
        for name in parts[0]
    }
