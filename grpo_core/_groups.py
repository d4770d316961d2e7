"""Rewards as one row per question: groups may differ in size, and what could not be scored is not there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core.types import GroupSizes

# Rewards whose range is within this share of the largest of them are taken for equal: float32 rounds at 6e-8.
RELATIVE_NOISE = 1e-6


class Groups(NamedTuple):
    """Float64 rewards, padded on the right."""

    rewards: Float[Tensor, "group member"]
    """0 where nothing was scored."""
    scored: Bool[Tensor, "group member"]
    """True where a response has a finite reward."""
    present: Bool[Tensor, "group member"]
    """True where there is a response at all."""
    dtype: torch.dtype
    """What results are given back in: at least float32."""

    @property
    def n_scored(self) -> Float[Tensor, "group 1"]:
        """Scored responses of each group."""
        return self.scored.sum(dim=1, keepdim=True).to(torch.float64)

    @property
    def mean(self) -> Float[Tensor, "group 1"]:
        """Of the scored rewards; 0 where there are none."""
        return self.rewards.sum(dim=1, keepdim=True) / self.n_scored.clamp(min=1)

    def std(self, correction: int) -> Float[Tensor, "group 1"]:
        """Two passes, over the scored rewards; 0 where there are too few."""
        squares = torch.where(self.scored, self.rewards - self.mean, 0.0).square().sum(dim=1, keepdim=True)
        return (squares / (self.n_scored - correction).clamp(min=1)).sqrt()

    @property
    def has_signal(self) -> Bool[Tensor, "group 1"]:
        """False where the scored rewards are taken for equal: the range decides, for a std need not be 0."""
        high = torch.where(self.scored, self.rewards, -torch.inf).amax(dim=1, keepdim=True)
        low = torch.where(self.scored, self.rewards, torch.inf).amin(dim=1, keepdim=True)
        return high - low > RELATIVE_NOISE * self.rewards.abs().amax(dim=1, keepdim=True)

    def as_rollouts(self, values: Float[Tensor, "group member"]) -> Float[Tensor, " rollout"]:
        """`values` of the scored responses in the order they came in; exactly 0 for the others."""
        return torch.where(self.scored, values, 0.0)[self.present].to(self.dtype)

    def signal_as_rollouts(self, values: Float[Tensor, "group member"]) -> Float[Tensor, " rollout"]:
        """Likewise, and exactly 0 for groups without signal."""
        return self.as_rollouts(torch.where(self.has_signal, values, 0.0))


def list_sizes(rollouts: int, group_sizes: GroupSizes, name: str = "group_sizes") -> list[int]:
    """One size per group; a ValueError unless they add up to `rollouts`."""
    if isinstance(group_sizes, Sequence):
        sizes = list(group_sizes)
        if min(sizes, default=1) < 1 or sum(sizes) != rollouts:
            raise ValueError(
                f"{rollouts} rollouts do not fill groups of group_sizes={_shorten(sizes)}: give sizes of at least 1"
                f" that add up to {rollouts}"
            )
        return sizes
    if group_sizes < 1 or rollouts % group_sizes:
        raise ValueError(f"{rollouts} rollouts do not fill groups of {name}={group_sizes}: give whole groups")
    return [group_sizes] * (rollouts // group_sizes)


def split_groups(rewards: Float[Tensor, " rollout"], group_sizes: GroupSizes) -> Groups:
    """One row per question, detached. A reward that is NaN or infinite could not be scored."""
    sizes = list_sizes(len(rewards), group_sizes)
    wide = rewards.detach().to(torch.float64)
    if isinstance(group_sizes, int):
        padded = wide.view(len(sizes), group_sizes)
        present = torch.ones_like(padded, dtype=torch.bool)
    else:
        lengths = torch.tensor(sizes, device=rewards.device)
        present = torch.arange(max(sizes, default=1), device=rewards.device) < lengths[:, None]
        padded = torch.full(present.shape, torch.nan, dtype=torch.float64, device=rewards.device)
        padded[present] = wide
    scored = padded.isfinite()
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return Groups(torch.where(scored, padded, 0.0), scored, present, dtype)


def _shorten(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 8 else f"[{', '.join(map(str, sizes[:8]))}, ...]"
