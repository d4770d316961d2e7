"""Checksums that show whether an engine received the weights of a push."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from drivers.common.errors import TrainingAbortedError

Checksum = tuple[int, int]
_WORDS_PER_ROW = 256


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
