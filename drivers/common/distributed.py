"""Several processes that train one policy: torchrun starts them, FSDP2 gives each its shard of the weights.

All of them run the same loop on the same rollouts. The first rank samples, grades and writes; its micro-batches are
those of one process, dealt out. A gradient is a sum over ranks, never a mean: the loss's denominators are global.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from drivers.common.errors import UsageError

T = TypeVar("T")


def start(deadline_s: float, *, on_gpus: bool = True) -> None:
    """Join the others, if torchrun started this process. Every wait for one of them ends after `deadline_s`.

    `on_gpus`: each takes the GPU of its number on its machine, where there are any.
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
    # Before the group: what is registered later, by whom it may be, comes first at the exit.
    atexit.register(_leave_at_once)
    # What is said between hosts goes by gloo, what is computed by nccl.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=timedelta(seconds=deadline_s))


_has_ended = False


def end() -> None:
    """Leave the others, all at once: who is still talking to one that has left would fail."""
    global _has_ended
    if size() > 1:
        dist.barrier()
        dist.destroy_process_group()
        _has_ended = True


def _leave_at_once() -> None:
    """At the exit of a rank that has done all it had to: without the interpreter's own end.

    Threads of the group outlive it where a sharded model holds it, and one that lets go of a tensor in that end aborts
    the process (pytorch/pytorch#179291): torchrun would call a finished run failed.
    """
    if _has_ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0; known before `start` too."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def is_first() -> bool:
    return rank() == 0


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether it says that another rank does not answer."""
    return size() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


# --- what the first rank does, and the others follow -----------------------------------------------------------------
_is_leading = False


_followed: Iterable[Any] = ()
"""What this rank iterates when the first one gathers weights in the middle of `lead`."""


def run_on_rank_zero(act: Callable[[], T]) -> T:
    """What `act` gives on the first rank, on all of them. If it fails there, torchrun ends the others.

    Weights that it gathers in the meantime (for an engine that is started again) the others help to gather.
    """
    global _is_leading
    if size() == 1 or _is_leading:
        return act()
    if is_first():
        _is_leading = True
        try:
            result = act()
        finally:
            _is_leading = False
        _broadcast_object(("done", result))
        return result
    while True:
        what, value = _broadcast_object(None)
        if what == "done":
            return value  # type: ignore[no-any-return]
        for _ in _followed:
            pass


def register_weight_gather(weights: Iterable[Any]) -> None:
    """On the other ranks: iterate `weights` when the first rank summons them."""
    global _followed
    _followed = weights


def request_weight_gather() -> None:
    """On the first rank: in the middle of `lead`, the others iterate what they follow."""
    if _is_leading:
        _broadcast_object(("iterate", None))


def _broadcast_object(message: Any) -> Any:
    """From the first rank to all."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# --- what all of them do ---------------------------------------------------------------------------------------------
def shard_across_ranks(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """This rank's items, and whether each counts. All ranks get equally many, for their passes must meet.

    Where that does not come out even, the last item is worked on by several and counts once.
    """
    for first in range(0, len(items), size()):
        place = first + rank()
        yield (items[place], True) if place < len(items) else (items[-1], False)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """The sum over ranks, in its place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values
