"""Gather the sharded weights of a policy on all ranks when rank 0 needs them for a push."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy.lora import scaled_adapter
from drivers.policy.weights import Checksum, PolicyWeights, WeightShape, copy_to_host, record_checksums

T = TypeVar("T")


@dataclass(frozen=True)
class _Gather:
    """Message of rank 0: gather all weights now, or the adapter."""

    is_adapter: bool = False


@dataclass(frozen=True)
class _Done:
    """Message of rank 0: the call has returned `result`."""

    result: Any


class WeightGatherer:
    """The policy's weights as rank 0 pushes them to the engine, gathered with the help of the other ranks.

    All ranks must take part when a sharded tensor is gathered. But only rank 0 has an engine, and only rank 0 knows
    when the engine needs weights: at a push, or because it died while it sampled and was started again. So rank 0
    calls the engine inside `run_on_rank_zero`, and the other ranks serve its requests until the call has returned:

        rank 0: run_on_rank_zero(call)            other ranks: run_on_rank_zero(call)
        ------------------------------            -----------------------------------
        call() starts                             wait for a message
        iter(gatherer)  ------ _Gather ---------> start to gather
            tensor 1   <----- all-gather ------>  tensor 1
              ...                                   ...
            tensor n   <----- all-gather ------>  tensor n
                                                  wait for a message
        call() returns r ----- _Done(r) --------> return r
        return r

    If the engine dies while tensors are being sent, the other ranks still wait in the all-gather of the next tensor.
    `complete_gather` gathers the rest on rank 0. It runs before each new message.

    With one process there are no messages, and iterating yields the weights.
    """

    def __init__(
        self, policy: nn.Module, dtype: torch.dtype, *, as_files: bool = True, merges_lora: bool = True
    ) -> None:
        self.policy, self.dtype = policy, dtype
        self._weights = PolicyWeights(policy, dtype, as_files=as_files, merges_lora=merges_lora)
        self._current: Iterator[tuple[str, Tensor]] = iter(())
        self._checksums: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the policy."""
        return next(self.policy.parameters()).device

    def run_on_rank_zero(self, call: Callable[[], T]) -> T:
        """Return the result of `call()` on rank 0, on every rank; `call` may push weights."""
        if distributed.size() == 1:
            return call()
        if not distributed.is_rank_zero():
            return cast(T, self._serve_until_done())
        result = call()
        self._send(_Done(result))
        return result

    def _serve_until_done(self) -> Any:
        while True:
            message: _Gather | _Done = distributed.broadcast_object(None)
            if isinstance(message, _Done):
                return message.result
            if message.is_adapter:
                scaled_adapter(self.policy, self.dtype)
            else:
                for _ in self._weights:
                    pass

    def _send(self, message: _Gather | _Done) -> None:
        if distributed.size() > 1:
            self.complete_gather()
            distributed.broadcast_object(message)

    def complete_gather(self) -> None:
        """Gather what an engine that died has not taken, so that the other ranks leave their gather."""
        for _ in self._current:
            pass

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) pairs, on rank 0 inside `run_on_rank_zero`."""
        self._send(_Gather())
        self._current = iter(self._weights)
        self._checksums = {}
        return record_checksums(self._current, self._checksums)

    def adapter(self) -> dict[str, Tensor]:
        """Return the LoRA updates as an engine loads them, on rank 0 inside `run_on_rank_zero`."""
        self._send(_Gather(is_adapter=True))
        return scaled_adapter(self.policy, self.dtype)

    def metadata(self) -> list[WeightShape]:
        """Return what an iteration yields, without gathering. vLLM's sender calls this method by its name."""
        return self._weights.metadata()

    def take_checksums(self) -> dict[str, Checksum]:
        """Return the checksums of what the last iteration yielded, once: a push that never iterates has none."""
        sums, self._checksums = self._checksums, {}
        return copy_to_host(sums)
