"""The policy's weights as an engine loads them: unsharded, merged, in one dtype, under the names of its files."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError
from drivers.policy import fsdp
from drivers.policy.file_names import WeightGroup, group_weights, to_files

Checksum = tuple[int, int]
_WORDS_PER_ROW = 256


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


def checksum(tensor: Tensor) -> Tensor:
    """Return int64 "2": the sum of the tensor's 64-bit words, and that of its rows times their position, modulo 2^64.

    It takes one pass at the speed of memory. A word that changes, or moves to another row of 256 words, changes it.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if octets.data_ptr() % 8:
        octets = octets.clone()
    row = 8 * _WORDS_PER_ROW
    whole = len(octets) // row * row
    rows = octets[:whole].view(torch.int64).view(-1, _WORDS_PER_ROW).sum(dim=1) if whole else octets[:0].long()
    # The octets that do not fill a row make one more row.
    rest = octets[whole:].to(torch.int64)
    places = torch.arange(1, len(rest) + 1, device=rest.device)
    rows = torch.cat([rows, (rest * places).sum()[None]])
    return torch.stack([rows.sum(), (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()])


def checksums(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
    """Return the checksum of each tensor by its name."""
    return copy_to_host({name: checksum(tensor) for name, tensor in weights})


def record_checksums(weights: Iterable[tuple[str, Tensor]], sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights`, and store the checksum of each tensor in `sums` before it is passed on."""
    for name, weight in weights:
        sums[name] = checksum(weight)
        yield name, weight


def copy_to_host(sums: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Return checksums as Python numbers; the host waits for the device once."""
    host = torch.stack(list(sums.values())).tolist() if sums else []
    return {name: (first, second) for name, (first, second) in zip(sums, host, strict=True)}


def find_differing(expected: Mapping[str, Checksum], received: Mapping[str, Checksum]) -> list[str]:
    """Return the names whose checksums differ or that one side lacks."""
    return sorted(name for name in expected.keys() | received.keys() if expected.get(name) != received.get(name))


def check_arrived(expected: Mapping[str, Checksum], received: Sequence[Mapping[str, Checksum]], version: int) -> None:
    """Raise TrainingAbortedError unless each worker has received the tensors of this push, bit for bit."""
    for worker, sums in enumerate(received):
        wrong = find_differing(expected, sums)
        if wrong:
            raise TrainingAbortedError(
                f"self-check: of the {len(expected)} tensors of push {version}, {len(wrong)} differ between the "
                f"policy and worker {worker} of the engine: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}. "
                "A push was skipped, incomplete or of other weights"
            )


def check_loaded(unloaded: Sequence[str], version: int) -> None:
    """Raise TrainingAbortedError if a worker reports that a push did not reach all of its model's parameters."""
    for worker, problem in enumerate(unloaded):
        if problem:
            raise TrainingAbortedError(
                f"self-check: push {version} did not load into worker {worker} of the engine: {problem}. vLLM expects "
                "other weights than transformers writes for this architecture; pass --engine hf"
            )
