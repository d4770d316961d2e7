"""Hypothesis strategies for the tensors of GRPO: float64, up to 4 responses of 8 tokens; drawn, so they shrink."""

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

# For laws that run once per loss type and aggregation: the battery as a whole sees twice the profile's examples.
fewer = settings(max_examples=min(settings.default.max_examples, max(10, settings.default.max_examples // 6)))

CLIPRANGES = st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])
BINARY = st.sampled_from([0.0, 1.0])
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8))
GARBAGE = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 0.0])


# Hypothesis validates each new strategy, which takes longer than to draw from it.
kept = lru_cache(maxsize=4096)


@kept
def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats of ordinary size: steps of 1/64 shrink to readable numbers, and two that differ, differ visibly."""
    return st.integers(round(low * 64), round(high * 64)).map(lambda n: n / 64)


@kept
def tensors(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Tensors of float64."""
    return hnp.arrays(np.float64, shape, elements=elements).map(torch.tensor)


@kept
def masks(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    """Any mask at all, the empty and the full one included."""
    return hnp.arrays(np.bool_, shape).map(torch.tensor)


@kept
def response_masks(shape: tuple[int, int]) -> st.SearchStrategy[Tensor]:
    """One run of True per row, as prompt, response and padding leave it; now and then an empty one."""
    rows, seq = shape
    places = torch.arange(seq)

    def fill(runs: list[tuple[int, int]]) -> Tensor:
        bounds = torch.tensor([sorted(run) for run in runs])
        return (places >= bounds[:, :1]) & (places < bounds[:, 1:])

    return st.lists(st.tuples(st.integers(0, seq), st.integers(0, seq)), min_size=rows, max_size=rows).map(fill)


@st.composite
def masked_tensors(draw) -> tuple[Tensor, Tensor]:
    shape = draw(SHAPES)
    return draw(tensors(shape, floats(-8, 8))), draw(masks(shape))


@st.composite
def logits_and_labels(draw, unreachable: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of 2 to 6 tokens; with `unreachable`, some are -inf, at least one of each row is not."""
    rows, vocab = draw(st.tuples(st.integers(1, 4), st.integers(2, 6)))
    logits = draw(tensors((rows, vocab), floats(-8, 8)))
    labels = torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)))
    if unreachable:
        hidden = draw(masks((rows, vocab)))
        hidden[torch.arange(rows), labels] = False
        logits = logits.masked_fill(hidden, -float("inf"))
    return logits, labels


@st.composite
def token_sets(draw, labels: Tensor, vocab: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Kept ids, excluded ids, either absent now and then, and which tokens are left; the label always is."""
    kept, excluded = (draw(masks((*labels.shape, vocab))) for _ in range(2))
    kept.scatter_(-1, labels[..., None], True)
    excluded.scatter_(-1, labels[..., None], False)
    with_kept, with_excluded = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    members = (kept if with_kept else torch.ones_like(kept)) & ~(excluded & torch.tensor(with_excluded))
    return _ids_of(draw, kept) if with_kept else None, _ids_of(draw, excluded) if with_excluded else None, members


def _ids_of(draw, members: Tensor) -> Tensor:
    """The ids of each row in any order, with padding anywhere."""
    width = max(1, int(members.sum(dim=-1).max()) + draw(st.integers(0, 1)))
    rows = [draw(st.permutations(row.nonzero()[:, 0].tolist())) for row in members.flatten(0, -2)]
    padded = [[*([-1] * (width - len(row))), *row] if draw(st.booleans()) else [*row] for row in rows]
    padded = [[*row, *([-1] * (width - len(row)))] for row in padded]
    return torch.tensor(padded).view(*members.shape[:-1], width)


@st.composite
def grouped_rewards(draw) -> tuple[Tensor, int]:
    """Up to 4 groups of 2 to 6 rewards, and the size of a group; constant groups are not rare."""
    groups, members = draw(st.tuples(st.integers(1, 4), st.integers(2, 6)))
    reward = BINARY if draw(st.booleans()) else floats(-4, 4)
    return draw(tensors((groups * members,), reward)), members


@dataclass(frozen=True)
class Batch:
    """One call's worth of responses."""

    policy_log_probs: Tensor
    response_mask: Tensor
    raw_rewards: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    cliprange: float

    def rows(self, index: Tensor | slice) -> "Batch":
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: part[index] if isinstance(part, Tensor) else part for name, part in parts.items()})


@st.composite
def batches(draw) -> Batch:
    """Responses sampled from an old policy, whose log-probabilities have moved since by up to 1 nat either way."""
    rows, seq = shape = draw(SHAPES)
    old = draw(tensors(shape, floats(-4, 0)))
    return Batch(
        policy_log_probs=old + draw(tensors(shape, floats(-1, 1))),
        response_mask=draw(response_masks((rows, seq))),
        raw_rewards=draw(tensors((rows, 1), floats(0, 1))),
        advantages=draw(tensors((rows, 1), floats(-2, 2))),
        old_log_probs=old,
        cliprange=draw(CLIPRANGES),
    )
