"""Several processes that train one policy: torchrun starts them, and FSDP2 gives each a shard of the weights.

All ranks run the same loop on the same rollouts. Rank 0 also samples, grades and writes files. The micro-batches of a
step are sharded across the ranks. A gradient is a sum over ranks, never a mean: the loss divides by global counts.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from drivers.common.errors import UsageError

T = TypeVar("T")


def start(timeout_s: float, *, on_gpus: bool = True) -> None:
    """Join the process group if torchrun started this process; every wait for another rank fails after `timeout_s`.

    With `on_gpus`, each rank takes the GPU with its local number, if the machine has GPUs.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    on_gpus = on_gpus and torch.cuda.is_available()
    if on_gpus:
        n_ranks, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if n_ranks > n_gpus:
            raise UsageError(
                f"--nproc-per-node {n_ranks}: this machine has {n_gpus} GPUs, and each rank takes one; lower it, or "
                "pass --policy-device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Register before creating the group: atexit handlers run in reverse order.
    atexit.register(_exit_immediately)
    # gloo carries the messages between hosts, nccl the tensors.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=timeout_s))


_has_ended = False


def end() -> None:
    """Leave the process group on all ranks together: a rank that still waits for one that has left would fail."""
    global _has_ended
    if size() > 1:
        dist.barrier()
        dist.destroy_process_group()
        _has_ended = True


def _exit_immediately() -> None:
    """Exit without the interpreter's shutdown, if this rank has finished its work.

    A sharded model keeps threads of the process group alive. A thread that frees a tensor during the shutdown aborts
    the process (pytorch/pytorch#179291), and torchrun would report a finished run as failed.
    """
    if _has_ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, from 0; it is known before `start` too."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def is_rank_zero() -> bool:
    """Return whether this is rank 0."""
    return rank() == 0


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether the error says that another rank does not respond."""
    return size() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def run_on_rank_zero(call: Callable[[], T]) -> T:
    """Return the result of `call()` on rank 0, on every rank. If it fails there, torchrun ends the other ranks.

    A call that uses the engine goes through `drivers.engines.rank_zero.run_with_engine` instead.
    """
    if size() == 1:
        return call()
    return broadcast_object(call() if is_rank_zero() else None)


def broadcast_object(value: T | None) -> T:
    """Return rank 0's `value` on every rank; the other ranks pass None."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def shard_across_ranks(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """Yield the items of this rank, each with whether it counts.

    All ranks get the same number of items, because their forward passes are collective. Where that does not come out
    even, several ranks get the last item and it counts once.
    """
    for first in range(0, len(items), size()):
        place = first + rank()
        yield (items[place], True) if place < len(items) else (items[-1], False)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum the tensor over ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """Return the value of every rank, on every rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values
