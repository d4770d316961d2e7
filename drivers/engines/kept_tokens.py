"""The sets of tokens that a truncated sampler kept."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptTokens:
    """For each token of a response, the ids of the tokens that it was drawn from.

    Two tokens, which were drawn from two and from one:

    >>> KeptTokens.pack([[5, 7], [2]]).unpack()
    [[5, 7], [2]]
    """

    counts: tuple[int, ...]
    """Number of ids of each token."""
    ids: str
    """All ids as int32, little-endian, in base64: a list would take ten times the memory, and JSON has no bytes."""

    @staticmethod
    def pack(sets: Sequence[Sequence[int]]) -> "KeptTokens":
        """Return the sets, packed."""
        ids = np.array([token for kept in sets for token in kept], dtype="<i4")
        return KeptTokens(tuple(map(len, sets)), base64.b64encode(ids.tobytes()).decode())

    @staticmethod
    def from_json(values: dict[str, Any] | None) -> "KeptTokens | None":
        """Return the sets of a JSON object with the fields of this class."""
        return None if values is None else KeptTokens(tuple(values["counts"]), values["ids"])

    def unpack(self) -> list[list[int]]:
        """Return the sets."""
        rows = np.split(self._flat_ids(), np.cumsum(self.counts)[:-1]) if self.counts else []
        return [row.tolist() for row in rows]

    def to_tensor(self, width: int) -> Tensor:
        """Return a row of ids per token, padded with -1 to `width`."""
        padded = np.full((len(self.counts), width), -1, dtype=np.int32)
        padded[np.arange(width)[None] < np.array(self.counts, dtype=np.int64)[:, None]] = self._flat_ids()
        return torch.from_numpy(padded)

    def _flat_ids(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        return np.frombuffer(base64.b64decode(self.ids), dtype="<i4")
