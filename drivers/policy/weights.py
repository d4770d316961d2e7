"""The policy's weights as an engine loads them: unsharded, merged, in one dtype, under the names of its files."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy import fsdp
from drivers.policy.checksums import Checksum, checksum, copy_to_host, record_checksums
from drivers.policy.file_names import WeightGroup, group_weights, to_files
from drivers.policy.lora import scaled_adapter

T = TypeVar("T")


class WeightShape(NamedTuple):
    """Name, dtype and shape of a tensor that is pushed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Entry(NamedTuple):
    """A weight of the module."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    """Type in which it is pushed."""
    lora_layer: Any = None
    """Layer whose update is added to it."""


class PolicyWeights:
    """(name, tensor) pairs of the policy's current weights. If they are sharded, all ranks iterate together.

    Names and shapes are those of the model's files, or with `as_files=False` those of the module's parameters. LoRA
    updates are merged into a copy: weights that are merged in place and unmerged again drift. With
    `merges_lora=False` they are left out.
    """

    def __init__(
        self, policy: nn.Module, dtype: torch.dtype, *, as_files: bool = True, merges_lora: bool = True
    ) -> None:
        self._policy, self._dtype, self._as_files = policy, dtype, as_files
        self._merges_lora = merges_lora

    def metadata(self) -> list[WeightShape]:
        """Return what an iteration yields, without gathering."""
        weights = [item for group in self._groups for item in group.files.items()]
        return [WeightShape(name, weight.dtype, tuple(weight.shape)) for name, weight in weights]

    @cached_property
    def _groups(self) -> list[WeightGroup]:
        shapes = {
            entry.name: torch.empty(entry.tensor.shape, dtype=entry.dtype, device="meta") for entry in self._entries()
        }
        if self._as_files:
            return group_weights(self._policy, shapes)
        return [WeightGroup((name,), {name: shape}) for name, shape in shapes.items()]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) pairs. Ranks other than 0 only help to gather: their tensors are not converted."""
        entries = {entry.name: entry for entry in self._entries()}
        for group in self._groups:
            weights = {name: self._gather(entries[name]) for name in group.names}
            is_converted = self._as_files and distributed.is_rank_zero()
            yield from (to_files(self._policy, weights) if is_converted else weights).items()

    def _gather(self, entry: _Entry) -> Tensor:
        weight = fsdp.full_tensor(entry.tensor)
        update = None if entry.lora_layer is None else _lora_update(entry.lora_layer)
        if not distributed.is_rank_zero():
            return weight
        if update is None:
            return weight.to(entry.dtype)
        merged = weight.float() + update
        return stochastic_round(merged, entry.name, entry.dtype)

    def checksums(self) -> dict[str, Checksum]:
        """Return the checksum of each tensor on rank 0; the other ranks help to gather and return none."""
        return copy_to_host({name: checksum(weight) for name, weight in self if distributed.is_rank_zero()})

    def _entries(self) -> Iterator[_Entry]:
        """Yield the parameters under their names without LoRA and, for files, the buffers that belong to them."""
        modules = dict(self._policy.named_modules())
        for name, parameter in fsdp.resharded(self._policy).named_parameters():
            module_name, _, last = name.rpartition(".")
            parent_name, _, child = module_name.rpartition(".")
            if ".lora_" in name:
                continue
            if child == "base_layer":
                layer = modules[parent_name] if self._merges_lora and last == "weight" else None
                yield _Entry(f"{parent_name}.{last}", parameter, self._dtype, layer)
            else:
                yield _Entry(name, parameter, self._dtype)
        if self._as_files:
            for name, buffer in persistent_buffers(self._policy).items():
                yield _Entry(name, buffer, torch.float32 if buffer.is_floating_point() else buffer.dtype)


def persistent_buffers(policy: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the model's files, such as the balance of a router's experts."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, module in policy.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _lora_update(layer: Any) -> Tensor:
    """Return `scaling * B A`, summed over the active adapters."""
    update = torch.zeros((), device=layer.base_layer.weight.device)
    for name in layer.active_adapters:
        down, up = (fsdp.full_tensor(part[name].weight).float() for part in (layer.lora_A, layer.lora_B))
        product = layer.scaling[name] * (up @ down)
        update = update + (product.T if getattr(layer, "fan_in_fan_out", False) else product)
    return update


_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 mantissa that a narrower type has no place for."""


def stochastic_round(weight: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round float32 up or down at random, so that the mean is exact. The seed depends on `name` alone.

    Rounding to nearest loses most of a small update, such as LoRA's to a bfloat16 model: the engine would never get an
    update below half a unit in the last place. A value that `dtype` represents exactly is kept. float16 has fewer bits
    below 6e-5, where the rest is rounded to nearest.
    """
    if dtype not in _DROPPED_BITS:
        return weight.to(dtype)
    unit = 1 << _DROPPED_BITS[dtype]
    generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randint(unit, weight.shape, generator=generator, device=weight.device, dtype=torch.int32)
    bits = weight.contiguous().view(torch.int32)
    return ((bits + noise) & -unit).view(torch.float32).to(dtype)


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
