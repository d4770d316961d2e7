"""A stand-in for NCCL's wire between a trainer and vLLM's process, over torch's TCPStore on a CPU.

Everything else is vLLM's and ours: handshake, packing, chunks, checksums and reload. As NCCL does, it holds the sender
until the receiver has its chunk, and lets go of it when the communicator is destroyed.
"""

import os
import signal
import time
from pathlib import Path

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from drivers.engines.supervision import TRAINER
from drivers.engines.vllm_transfer import WorkerExtension

KILL = "NCCL_STAND_IN_KILL"
"""Environment variable with a file. It holds the number of the broadcast in which the receiver kills itself, once."""
sent_sizes: list[int] = []
"""Bytes of each chunk that this process has sent."""


class Wire:
    """The part of a PyNcclCommunicator that vLLM calls."""

    def __init__(self, address, port, rank, world_size, device):
        self._group = StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=world_size)
        self._rank, self._n_broadcasts, self._is_destroyed = rank, 0, False
        self._group.barrier()

    def broadcast(self, tensor, src, stream=None):
        if self._is_destroyed:
            raise RuntimeError("the communicator is destroyed")
        self._n_broadcasts += 1
        arrived = f"arrived {self._n_broadcasts}"
        if self._rank == src:
            sent_sizes.append(tensor.numel())
            self._group.broadcast(tensor, src)
            while not self._is_destroyed and not self._group.store.check([arrived]):
                time.sleep(0.002)
        else:
            die_if_told(self._n_broadcasts)
            tensor.copy_(self._group.broadcast(None, src))
            self._group.store.set(arrived, b"1")

    def destroy(self):
        self._is_destroyed = True


def die_if_told(n_broadcasts):
    """Kill this process in the broadcast that the file names, and remove the file first."""
    file = Path(os.environ.get(KILL, "/nonexistent"))
    if file.exists() and n_broadcasts == int(file.read_text()):
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class Stream:
    """A stream without a device: all work is done when it is queued."""

    def synchronize(self):
        pass


def finish_on_cpu(engine):
    """End a push, and pack a tied head again, which only a CPU packs and which vLLM's reload leaves as it was."""
    finish_weight_update(engine)
    for module in engine.model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


finish_weight_update = NCCLWeightTransferEngine.finish_weight_update


def install(set_attribute=setattr):
    """Replace the wire and the streams in this process."""
    set_attribute(NCCLWeightTransferEngine, "finish_weight_update", finish_on_cpu)
    set_attribute(nccl_common, "stateless_init_process_group", Wire)
    set_attribute(packed_tensor, "_get_streams", lambda _, n_buffers: (Stream(),) * n_buffers)
    set_attribute(torch.accelerator, "current_device_index", lambda: 0)
    set_attribute(torch.accelerator, "synchronize", lambda *_: None)


class StandInExtension(WorkerExtension):
    """The extension of a worker, whose import brings the stand-in into vLLM's process."""


if os.environ.get(TRAINER, str(os.getpid())) != str(os.getpid()):
    install()
