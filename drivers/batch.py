"""The rollouts of one step as tensors, and the policy's log-probs of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor, nn

from drivers.config import GrpoConfig
from drivers.rollout import Completion
from grpo_core import LossType, get_group_log_probs, get_response_log_probs


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class RolloutBatch:
    """Responses with what training needs of them, in host memory; row i of each field is response i."""

    completions: tuple[Completion, ...]
    response_mask: Bool[Tensor, "batch seq"]
    """True on the sampled tokens, the end token included; column 0 is a response's first token."""
    raw_rewards: Float[Tensor, "batch 1"]
    advantages: Float[Tensor, "batch 1"]
    sampler_log_probs: Float[Tensor, "batch seq"]
    """Under the distribution that the engine sampled from; 0 past the end."""
    old_log_probs: Float[Tensor, "batch seq"] | None = None
    """Under the policy as it was before the first update on these responses."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def n_response_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)

    def select(self, rows: Sequence[int]) -> "RolloutBatch":
        """These rows, cut to the longest response among them."""
        index = torch.tensor(rows)
        width = max(1, *(len(self.completions[row].token_ids) for row in rows))
        return RolloutBatch(
            completions=tuple(self.completions[row] for row in rows),
            response_mask=self.response_mask[index, :width],
            raw_rewards=self.raw_rewards[index],
            advantages=self.advantages[index],
            sampler_log_probs=self.sampler_log_probs[index, :width],
            old_log_probs=None if self.old_log_probs is None else self.old_log_probs[index, :width],
        )

    def to(self, device: torch.device) -> "RolloutBatch":
        """The same with its tensors on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def has_signal(self, loss_type: LossType) -> bool:
        """Whether any response has a gradient; where every advantage is 0, the loss of each token is too."""
        return bool((self.raw_rewards if loss_type == "no_baseline" else self.advantages).any())

    def split(self, size: int) -> Iterator["RolloutBatch"]:
        """Consecutive parts of `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    def shuffled(self, generator: torch.Generator) -> "RolloutBatch":
        """The groups in random order, each kept together: responses to one prompt are scored in one row."""
        groups = [
            list(rows) for _, rows in groupby(range(len(self)), key=lambda row: self.completions[row].prompt_token_ids)
        ]
        order = torch.randperm(len(groups), generator=generator).tolist()
        return self.select([row for group in order for row in groups[group]])


def make_rollout_batch(completions: Sequence[Completion], advantages: Tensor, raw_rewards: Tensor) -> RolloutBatch:
    """From the token ids that were sampled; text is never tokenized again."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    response_mask = torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None]
    sampled = torch.tensor(
        [value for completion in completions for value in completion.log_probs], dtype=torch.float32
    )
    return RolloutBatch(
        completions=tuple(completions),
        response_mask=response_mask,
        raw_rewards=raw_rewards[:, None],
        advantages=advantages[:, None],
        sampler_log_probs=torch.zeros(response_mask.shape).masked_scatter(response_mask, sampled),
    )


def score(
    policy: nn.Module, rollouts: RolloutBatch, temperature: float, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """`log_probs` of each response token under `policy`, and on request their `token_entropy`, without a gradient.

    Both are Float "batch seq", 0 past the end of a response.
    """
    options = {"return_token_entropy": with_entropy, "temperature": temperature, "detach_entropy": True}
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
def with_old_log_probs(policy: nn.Module, rollouts: RolloutBatch, config: GrpoConfig) -> RolloutBatch:
    """Log-probs before the first update, once, in the precision and the mode of training."""
    width = rollouts.response_mask.shape[1]
    device = next(policy.parameters()).device
    parts = [
        score(policy, part.to(device), config.sampling_temperature)["log_probs"]
        for part in rollouts.split(config.micro_train_batch_size)
    ]
    padded = [nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    return replace(rollouts, old_log_probs=torch.cat(padded).cpu())
