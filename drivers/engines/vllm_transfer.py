"""Transfer weights from the trainer to vLLM workers."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from drivers.policy.weights import Checksum, checksum, on_host

PACKED_BUFFER_BYTES = 256 << 20
"""Weights go over NCCL in buffers of this size, two on each side."""


# --- what arrives is checked -----------------------------------------------------------------------------------------
class ChecksummingModel:
    """The model of a worker while it takes weights over: each is summed up where it arrives, then loaded."""

    def __init__(self, model: Any) -> None:
        self._model, self._sums = model, dict[str, Tensor]()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return self._model.load_weights(self._watch(weights))

    def _watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            self._sums[name] = checksum(weight)
            yield name, weight

    def checksums(self) -> dict[str, Checksum]:
        return on_host(self._sums)


class CheckedNCCLEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's own, with a sum of each tensor that it receives."""

    model: Any
    received: ChecksummingModel | None = None

    def receive_weights(self, update_info: Any) -> None:
        model = self.model
        self.model = self.received = ChecksummingModel(model)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model


# --- the `host` backend: trainer and engine on one machine, without a GPU between them -------------------------------
@dataclass
class HostInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The policy's parameters: by reference in one process, as a safetensors file for another."""

    tensors: Any = None
    path: str | None = None


class HostWorkerEngine(WeightTransferEngine[HostInit, HostUpdate]):  # type: ignore[misc]
    """The engine's side: load what the trainer hands over."""

    init_info_cls, update_info_cls = HostInit, HostUpdate
    received: ChecksummingModel | None = None

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: HostUpdate) -> None:
        self.received = ChecksummingModel(self.model)
        if update_info.path is None:
            self.received.load_weights(update_info.tensors)
            return
        with safe_open(update_info.path, "pt") as file:
            names = file.keys()  # of a mapping that cannot be iterated
            self.received.load_weights((name, file.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # On CPU a head tied to the embedding holds a packed copy of its own, which the reload above does not refresh.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


@dataclass
class HostTrainerInit(TrainerInitInfo):  # type: ignore[misc]
    """The trainer is one process: rank 0."""

    backend: ClassVar[str] = "host"
    by_file: bool = False
    """For an engine in a process of its own."""


class HostTrainerEngine(TrainerWeightTransferEngine[HostTrainerInit]):  # type: ignore[misc]
    """The trainer's side: one call per push."""

    init_info_cls = HostTrainerInit
    file: BinaryIO | None = None

    @classmethod
    def trainer_init(cls, init_info: HostTrainerInit, *, client: Any, source: Any = None) -> "HostTrainerEngine":
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        client.init_weight_transfer_engine({})
        # Anonymous memory with a name under /proc: it ends with this process, however that ends.
        engine.file = open(os.memfd_create("weights"), "wb") if init_info.by_file else None  # noqa: SIM115
        return engine

    @torch.no_grad()
    def send_weights(self) -> None:
        update: dict[str, Any] = {"tensors": self.source}
        file = self.file
        if file is not None:  # an object, not a number: that may be another file's when this was shut down meanwhile
            file.write(save({name: tensor.detach().contiguous() for name, tensor in self.source}))
            file.flush()
            update = {"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"}
        self.client.start_weight_update()
        self.client.update_weights(update)
        self.client.finish_weight_update()
        if file is not None:
            file.seek(0)
            file.truncate()

    def shutdown(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


class WorkerExtension:
    """vLLM mixes this class into each worker; importing this module is what registers the backends there."""

    def received_checksums(self) -> dict[str, Checksum]:
        """Of the last push."""
        received = self.weight_transfer_engine.received  # type: ignore[attr-defined]
        return {} if received is None else received.checksums()


if "host" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("host", HostWorkerEngine)
    WeightTransferEngineFactory.register_engine("checked_nccl", CheckedNCCLEngine)
    WeightTransferTrainerFactory.register_engine("host", HostTrainerEngine)


class LocalClient:
    """The four calls that a trainer-side transfer engine makes, answered by an `LLM` object of this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def synchronize_before_send(device: torch.device) -> None:
    """Before the policy's weights on `device` are sent: all that is still to change them there is done.

    NCCL's sender packs on streams of its own, which wait for nobody's, and a new thread's device is the first one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)


def version_of(spans: Sequence[str]) -> int | None:
    """The push that all parts of a response were sampled from; None where they are of several, or of none of ours."""
    versions = set(spans)
    return int(versions.pop()) if len(versions) == 1 and spans[0].isdigit() else None


def read_checksums(workers: Sequence[Mapping[str, Sequence[int]]]) -> list[dict[str, Checksum]]:
    """As they come from another process, pairs are lists."""
    return [{name: (first, second) for name, (first, second) in sums.items()} for sums in workers]
