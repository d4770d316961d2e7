"""Inputs for both sides of a comparison: random ragged batches in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Responses to a few questions; only `policy` requires a gradient."""

    group_sizes: list[int]
    rewards: Tensor  # rollout
    components: Tensor  # rollout reward
    greedy_rewards: Tensor  # group
    token_rewards: Tensor  # rollout seq
    policy: Tensor  # rollout seq, in nats, like the next three
    old: Tensor
    sampler: Tensor
    reference: Tensor
    mask: Tensor  # rollout seq, bool
    advantages: Tensor  # rollout 1
    logits: Tensor  # rollout seq vocab

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)

    @property
    def groups(self) -> Tensor:
        """Return the group index of each response."""
        return torch.repeat_interleave(torch.tensor(self.group_sizes))


def draw(seed: int, ragged: bool = True) -> Case:
    """Draw a random case: prefix masks with holes, like those of tool output, and ragged groups.

    With `ragged` False, all groups have one size, as TRL requires. The policy is up to 1 nat from the old policy, and
    in every third response up to 2.5 nats, beyond every clip. Rewards are multiples of 1/8, which float32 represents
    exactly.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=random, dtype=torch.float64)

    def integer(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random)

    groups, seq, vocab = 3, 9, 5
    group_sizes = integer(2, 5, groups).tolist() if ragged else [int(integer(2, 5, 1))] * groups
    rows = sum(group_sizes)
    places = torch.arange(seq)
    lengths = integer(1, seq, rows, 1)
    lengths[0] = seq
    mask = (places < lengths) & (uniform(0, 1, rows, seq) > 0.15) | (places == lengths - 1)
    reach = torch.where(torch.arange(rows) % 3 == 0, 2.5, 1.0).double()[:, None]
    old = uniform(-3.2, -0.1, rows, seq)
    # A sum above 0 is not a log-probability: it is mirrored, so that no two tokens tie.
    policy, sampler, reference = (
        -(old + span * uniform(-1, 1, rows, seq)).abs() - 0.01 for span in (reach, torch.tensor(0.6), reach)
    )
    rewards, components = integer(0, 8, rows) / 8, integer(0, 8, rows, 3) / 8
    return Case(
        group_sizes=group_sizes,
        rewards=rewards.double(),
        components=components.double(),
        greedy_rewards=(integer(0, 8, groups) / 8).double(),
        token_rewards=torch.where(mask, uniform(-1, 1, rows, seq), 0.0),
        policy=policy.requires_grad_(),
        old=old,
        sampler=sampler,
        reference=reference,
        mask=mask,
        advantages=uniform(-2, 2, rows, 1),
        logits=uniform(-3, 3, rows, seq, vocab),
    )


def place(log_ratios: list[list[float]], advantages: list[float], level: float = -5.0, **fields) -> Case:
    """Return one group of full-length responses with the given log ratios; `fields` replace other fields."""
    log_ratio = torch.tensor(log_ratios, dtype=torch.float64)
    rows, seq = log_ratio.shape
    base = torch.full_like(log_ratio, level)
    defaults = {
        "group_sizes": [rows],
        "rewards": torch.zeros(rows, dtype=torch.float64),
        "components": torch.zeros(rows, 2, dtype=torch.float64),
        "greedy_rewards": torch.zeros(1, dtype=torch.float64),
        "token_rewards": torch.zeros_like(base),
        "policy": (base + log_ratio).requires_grad_(),
        "old": base,
        "sampler": base,
        "reference": base,
        "mask": torch.ones(rows, seq, dtype=torch.bool),
        "advantages": torch.tensor(advantages, dtype=torch.float64).reshape(rows, -1),
        "logits": torch.zeros(rows, seq, 5, dtype=torch.float64),
    }
    return Case(**defaults | fields)
