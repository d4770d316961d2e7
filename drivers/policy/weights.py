"""The policy's weights as an engine loads them: whole, merged, in one precision, under the names of its files."""

import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError
from drivers.policy import fsdp

Checksum = tuple[int, int]


_WORDS_PER_ROW = 256


class WeightShape(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class PolicyWeights:
    """Pairs of name and tensor, anew at each iteration. Where the weights are sharded, all ranks iterate together.

    What LoRA adds is merged into a copy: weights that are merged in place and unmerged again drift.
    """

    _last: ClassVar[Generator[tuple[str, Tensor], None, None] | None] = None

    def __init__(self, policy: nn.Module, dtype: torch.dtype) -> None:
        self._policy, self._dtype = policy, dtype
        self._sums: dict[str, Tensor] = {}

    def metadata(self) -> list[WeightShape]:
        """What an iteration yields, without gathering anything. So is it named where vLLM's trainer side asks."""
        return [WeightShape(name, self._dtype, tuple(parameter.shape)) for name, parameter, _ in self._entries()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if distributed.size() == 1:
            return self._gathered()
        if PolicyWeights._last is not None:
            PolicyWeights._last.close()
        PolicyWeights._last = self._gathered()
        return PolicyWeights._last

    @torch.no_grad()
    def _gathered(self) -> Generator[tuple[str, Tensor], None, None]:
        distributed.request_weight_gather()
        self._sums = {}
        entries = self._entries()
        try:
            for name, parameter, adapted in entries:
                weight, update = fsdp.full_tensor(parameter), None if adapted is None else _lora_update(adapted)
                if distributed.is_first():  # the others help to gather, and do nothing with what comes of it
                    weight = self._as_pushed(name, weight, update)
                    self._sums[name] = checksum(weight)
                yield name, weight
        finally:  # where an engine died of it, the other ranks gather on: so does this one, to its end
            for _, parameter, adapted in entries if distributed.size() > 1 else ():
                fsdp.full_tensor(parameter)
                if adapted is not None:
                    _lora_update(adapted)

    def _as_pushed(self, name: str, weight: Tensor, update: Tensor | None) -> Tensor:
        if update is None:
            return weight.to(self._dtype)
        merged = weight.float() + update
        return stochastic_round(merged, name) if self._dtype == torch.bfloat16 else merged.to(self._dtype)

    def checksums(self) -> dict[str, Checksum]:
        """Of all of them, as they are now; on the first rank, with which the others gather."""
        for _ in self:
            pass
        return self.take_checksums()

    def take_checksums(self) -> dict[str, Checksum]:
        """Of what the last iteration has given, taken on the way; once, so that a push without one has none."""
        sums, self._sums = self._sums, {}
        return on_host(sums)

    def _entries(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Name, parameter, and the LoRA layer that changes it, if one does."""
        modules = dict(self._policy.named_modules())
        for name, parameter in fsdp.resharded(self._policy).named_parameters():
            module_name, _, last = name.rpartition(".")
            parent_name, _, child = module_name.rpartition(".")
            if ".lora_" in name:
                continue
            if child == "base_layer":
                yield f"{parent_name}.{last}", parameter, modules[parent_name] if last == "weight" else None
            else:
                yield name, parameter, None


def _lora_update(layer: Any) -> Tensor:
    """`scaling * B A`, of every adapter that is on."""
    update = torch.zeros((), device=layer.base_layer.weight.device)
    for name in layer.active_adapters:
        down, up = (fsdp.full_tensor(part[name].weight).float() for part in (layer.lora_A, layer.lora_B))
        product = layer.scaling[name] * (up @ down)
        update = update + (product.T if getattr(layer, "fan_in_fan_out", False) else product)
    return update


def stochastic_round(weight: Tensor, name: str) -> Tensor:
    """Float32 to bfloat16, up or down by a chance that makes the mean exact; the same chance each time for a `name`.

    Rounding to the nearest takes most of a small update away (LoRA's, from a model in bfloat16): what stays below half
    a unit in the last place of a weight would reach no engine. What bfloat16 holds exactly stays as it is.
    """
    draw = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    noise = torch.randint(1 << 16, weight.shape, generator=draw, device=weight.device, dtype=torch.int32)
    bits = weight.contiguous().view(torch.int32)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def checksum(tensor: Tensor) -> Tensor:
    """Int64 "2": the sum of its bytes as 64-bit words, and that of their rows by position, modulo 2^64.

    One pass at the speed of memory. A word that changes, or moves to another row of words, changes it.
    """
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if octets.data_ptr() % 8:
        octets = octets.clone()
    row = 8 * _WORDS_PER_ROW
    whole = len(octets) // row * row
    rows = octets[:whole].view(torch.int64).view(-1, _WORDS_PER_ROW).sum(dim=1) if whole else octets[:0].long()
    # What does not fill a row is one more, octet by octet.
    rest = octets[whole:].to(torch.int64)
    places = torch.arange(1, len(rest) + 1, device=rest.device)
    rows = torch.cat([rows, (rest * places).sum()[None]])
    return torch.stack([rows.sum(), (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()])


def checksums(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
    """Of each tensor by its name."""
    return on_host({name: checksum(tensor) for name, tensor in weights})


def on_host(sums: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """As numbers; the host waits once."""
    host = torch.stack(list(sums.values())).tolist() if sums else []
    return {name: (first, second) for name, (first, second) in zip(sums, host, strict=True)}


def differing(expected: Mapping[str, Checksum], received: Mapping[str, Checksum]) -> list[str]:
    """Names that are not on both sides with the same checksum."""
    return sorted(name for name in expected.keys() | received.keys() if expected.get(name) != received.get(name))


def check_arrived(expected: Mapping[str, Checksum], received: Sequence[Mapping[str, Checksum]], version: int) -> None:
    """Stop the run unless each worker has received the tensors of this push, bit for bit."""
    for worker, sums in enumerate(received):
        wrong = differing(expected, sums)
        if wrong:
            raise TrainingAbortedError(
                f"self-check: of the {len(expected)} tensors of push {version}, worker {worker} of the engine has "
                f"{len(wrong)} others than the policy: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}. A "
                "push was skipped, cut short or is of other weights"
            )
