"""Rewards as one row per question, for groups that differ in size and rewards that could not be scored."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core.types import GroupSizes

# Rewards count as equal if their range is within this share of the largest absolute reward. float32 rounds at 6e-8.
RELATIVE_NOISE = 1e-6


class Groups(NamedTuple):
    """Float64 rewards of each group, padded on the right."""

    rewards: Float[Tensor, "group member"]
    """Rewards; 0 where a response was not scored."""
    scored: Bool[Tensor, "group member"]
    """True where a response has a finite reward."""
    present: Bool[Tensor, "group member"]
    """True where there is a response, False on padding."""
    dtype: torch.dtype
    """Type of results: at least float32."""

    @property
    def n_scored(self) -> Float[Tensor, "group 1"]:
        """Number of scored responses in each group."""
        return self.scored.sum(dim=1, keepdim=True).to(torch.float64)

    @property
    def mean(self) -> Float[Tensor, "group 1"]:
        """Mean of the scored rewards; 0 for a group without any."""
        return self.rewards.sum(dim=1, keepdim=True) / self.n_scored.clamp(min=1)

    def std(self, correction: int) -> Float[Tensor, "group 1"]:
        """Return the standard deviation of the scored rewards, computed in two passes; 0 if there are too few."""
        squares = torch.where(self.scored, self.rewards - self.mean, 0.0).square().sum(dim=1, keepdim=True)
        return (squares / (self.n_scored - correction).clamp(min=1)).sqrt()

    @property
    def has_signal(self) -> Bool[Tensor, "group 1"]:
        """False where all scored rewards count as equal; tested by their range, because rounding can make s > 0."""
        high = torch.where(self.scored, self.rewards, -torch.inf).amax(dim=1, keepdim=True)
        low = torch.where(self.scored, self.rewards, torch.inf).amin(dim=1, keepdim=True)
        return high - low > RELATIVE_NOISE * self.rewards.abs().amax(dim=1, keepdim=True)

    def flatten_scored(self, values: Float[Tensor, "group member"]) -> Float[Tensor, " rollout"]:
        """Return `values` in the order of the rollouts, exactly 0 for responses that were not scored."""
        return torch.where(self.scored, values, 0.0)[self.present].to(self.dtype)

    def flatten_with_signal(self, values: Float[Tensor, "group member"]) -> Float[Tensor, " rollout"]:
        """Return `flatten_scored(values)`, also exactly 0 for every response of a group without signal."""
        return self.flatten_scored(torch.where(self.has_signal, values, 0.0))


def list_group_sizes(rollouts: int, group_sizes: GroupSizes, name: str = "group_sizes") -> list[int]:
    """Return one size per group; raise ValueError unless they add up to `rollouts`."""
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
    """Return the detached rewards with one row per group; a NaN or infinite reward counts as not scored."""
    sizes = list_group_sizes(len(rewards), group_sizes)
    wide = rewards.detach().to(torch.float64)
    if isinstance(group_sizes, int):
        padded = rearrange(wide, "(group member) -> group member", member=group_sizes)
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
