"""The tokens that a sampler could draw: those that it kept, or all except those that it excluded."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo_core._checks import require

PADDING = -1


class TokenSets(NamedTuple):
    r"""For each row, the set $S$ of its softmax: `kept` without `excluded`; `kept` of None is the whole vocabulary.

    Both are token ids. Entries of -1 are padding.
    """

    kept: Int[Tensor, "*rows kept"] | None = None
    excluded: Int[Tensor, "*rows excluded"] | None = None

    @property
    def is_everything(self) -> bool:
        """Return whether no sets are given."""
        return self.kept is None and self.excluded is None

    def flatten(self) -> "TokenSets":
        """Return the sets with one row per distribution."""
        return TokenSets(*(None if ids is None else rearrange(ids, "... id -> (...) id").long() for ids in self))

    def select(self, rows: slice | Int[Tensor, " selected"] | None) -> "TokenSets":
        """Return the sets of these rows; all if None."""
        return self if rows is None else TokenSets(*(None if ids is None else ids[rows] for ids in self))

    def check(self, labels: Int[Tensor, " rows"] | None, vocab: int) -> None:
        """Raise ValueError if an id is no token, or a label is not in its set; on a GPU, do nothing, as for labels."""
        for name, ids in (("kept_ids", self.kept), ("excluded_ids", self.excluded)):
            if ids is None or ids.device.type != "cpu" or ids.numel() == 0:
                continue
            low, high = (int(end) for end in ids.aminmax())
            requirement = f"token ids in [0, {vocab}), or {PADDING} as padding"
            require(low >= PADDING and high < vocab, name, f"[{low} to {high}]", requirement)
        if labels is None or labels.device.type != "cpu" or self.is_everything:
            return
        outside = torch.zeros_like(labels, dtype=torch.bool)
        if self.kept is not None:
            outside |= (self.kept != labels[:, None]).all(dim=1)
        if self.excluded is not None:
            outside |= (self.excluded == labels[:, None]).any(dim=1)
        if outside.any():
            row = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"labels[{row}]={int(labels[row])} is outside of its token set (flat rows): the sampler could not "
                "have drawn it; pass the set of the same position"
            )

    def restrict_(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        r"""Overwrite the logits outside of the sets with $-\infty$. A row without tokens is $-\infty$ everywhere."""
        if self.kept is not None:
            # Padding writes to token 0 what changes nothing there: the least value under a maximum.
            ids = self.kept.clamp(min=0)
            values = logits.gather(1, ids).masked_fill_(self.kept < 0, -math.inf)
            logits.fill_(-math.inf).scatter_reduce_(1, ids, values, "amax")
        if self.excluded is not None:
            bounds = torch.zeros_like(self.excluded, dtype=logits.dtype).fill_(-math.inf)
            bounds.masked_fill_(self.excluded < 0, math.inf)
            logits.scatter_reduce_(1, self.excluded.clamp(min=0), bounds, "amin")
        return logits

    def contains(self, vocab: int) -> Bool[Tensor, "*rows vocab"]:
        """Return which tokens of the vocabulary are in each set, by expressions that torch.compile traces."""
        masks = []
        for ids in self:
            if ids is not None:
                # Padding goes to a column behind the vocabulary.
                places = torch.where(ids < 0, vocab, ids.long())
                mask = torch.zeros(*ids.shape[:-1], vocab + 1, dtype=torch.bool, device=ids.device)
                masks.append(mask.scatter(-1, places, True)[..., :vocab])
        if self.kept is None:
            return ~masks[0]
        return masks[0] if self.excluded is None else masks[0] & ~masks[1]


EVERYTHING = TokenSets()
