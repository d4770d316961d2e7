"""Transfer weights from the trainer to vLLM workers. vLLM imports this module in each of its processes."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
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
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine
from vllm.utils.network_utils import get_open_port

from drivers.common.errors import first_line
from drivers.engines.supervision import exit_when_trainer_exits
from drivers.engines.vllm_adapter import find_held
from drivers.policy.checksums import Checksum, checksums, copy_to_host, record_checksums
from drivers.policy.weights import WeightGatherer

MIN_BUFFER_BYTES = 256 << 20
"""Smallest size of each of NCCL's two send buffers."""


exit_when_trainer_exits()


# --- what arrives, and what of it is loaded --------------------------------------------------------------------------
class ReceivingModel:
    """A worker's model during a push: it takes the checksum of each tensor that arrives, then loads it."""

    def __init__(self, model: Any) -> None:
        self._model, self._sums = model, dict[str, Tensor]()
        self._failure = ""
        self._untouched: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load some weights. A failure does not abort the push, or the sender would wait; the check reports it."""
        arriving = record_checksums(weights, self._sums)
        try:
            self._model.load_weights(arriving)
        except Exception as error:  # models reject unknown names and shapes each in their own way
            reason = f"{type(self._model).__name__}.load_weights raises {type(error).__name__}: {first_line(error)}"
            self._failure = self._failure or reason
        for _ in arriving:  # drain what the model did not consume, so that the sender can finish
            pass

    def checksums(self) -> dict[str, Checksum]:
        return copy_to_host(self._sums)

    def finish(self, *, is_tied: bool) -> None:
        """Note which parameters got no weight; at the end of the push, vLLM gives those their old values."""
        self._untouched = sorted(find_untouched(self._model, is_tied=is_tied))

    def describe_unloaded(self) -> str:
        """Return what the push has not loaded, or an empty text."""
        if self._failure or not self._untouched:
            return self._failure
        more = " ..." if len(self._untouched) > 3 else ""
        return (
            f"{len(self._untouched)} of the model's parameters got no weight: {', '.join(self._untouched[:3])}{more}"
        )


def find_untouched(model: Any, *, is_tied: bool) -> list[str]:
    """Return the parameters of a worker's model that the current push has not reached.

    vLLM buffers what `load_weights` gives to the parameters of a layer and forgets a layer once all of them are there.
    A head that `is_tied` to the embedding gets no weight.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

    untouched = []
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or (is_tied and isinstance(layer, ParallelLMHead)):
            continue
        reached = {name for name, _ in info.loaded_weights} | SKIP_LOAD_TENSORS  # vLLM does not follow the latter
        names = [name for name, parameter in layer.named_parameters(recurse=False) if parameter.numel()]
        untouched += [f"{prefix}.{name}" for name in names if name not in reached]
    return untouched


def _is_tied(model_config: Any) -> bool:
    return any(
        getattr(config, "tie_word_embeddings", False)
        for config in (model_config.hf_config, model_config.hf_text_config)
    )


class CheckedNCCLReceiver(NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL receiver, with a checksum of each tensor that it receives."""

    model: Any
    received: ReceivingModel | None = None

    def receive_weights(self, update_info: Any) -> None:
        model = self.model
        self.model = self.received = ReceivingModel(model)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        if self.received is not None:
            self.received.finish(is_tied=_is_tied(self.model_config))
        super().finish_weight_update()


# --- the `host` backend: trainer and engine on one machine, and no transfer from one GPU to another ------------------
@dataclass
class HostInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Empty: the two sides need not agree on anything beforehand."""


@dataclass
class HostUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The policy's weights: by reference in one process, as a safetensors file for another."""

    weights: Any = None
    """The WeightGatherer itself; the worker iterates it while it loads."""
    path: str | None = None


class HostReceiver(WeightTransferEngine[HostInit, HostUpdate]):  # type: ignore[misc]
    """The receiver: vLLM calls it in each worker, with what the sender hands over."""

    init_info_cls, update_info_cls = HostInit, HostUpdate
    received: ReceivingModel | None = None
    _kernels: Sequence[tuple[Any, Any]] = ()

    def init_transfer_engine(self, init_info: HostInit) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.platforms import current_platform

        # On a CPU, experts are packed only when their kernel is built, which a reload skips if there is one.
        methods = [getattr(module, "quant_method", None) for module in self.model.modules()]
        kernels = [(method, getattr(method, "moe_kernel", None)) for method in methods]
        self._kernels = [pair for pair in kernels if pair[1] is not None] if current_platform.is_cpu() else []
        for method, _ in self._kernels:
            method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    @torch.no_grad()
    def receive_weights(self, update_info: HostUpdate) -> None:
        self.received = ReceivingModel(self.model)
        if update_info.path is None:
            self.received.load_weights(update_info.weights)
            return
        with safe_open(update_info.path, "pt") as file:
            names = file.keys()  # the file itself cannot be iterated
            self.received.load_weights((name, file.get_tensor(name)) for name in names)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self.received is not None:
            self.received.finish(is_tied=_is_tied(self.model_config))
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels:
            method.moe_kernel = method.moe_kernel or kernel  # the old one where no experts were loaded
        # On a CPU, a head that is tied to the embedding keeps a packed copy, which the reload does not refresh.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


@dataclass
class HostSenderInit(TrainerInitInfo):  # type: ignore[misc]
    """Settings of the sender."""

    backend: ClassVar[str] = "host"
    by_file: bool = False
    """Send through a file in memory, to an engine in a separate process."""


class HostSender(TrainerWeightTransferEngine[HostSenderInit]):  # type: ignore[misc]
    """The sender. During its update, vLLM calls `HostReceiver.receive_weights` in each worker."""

    init_info_cls = HostSenderInit
    file: BinaryIO | None = None

    @classmethod
    def trainer_init(cls, init_info: HostSenderInit, *, client: Any, source: Any = None) -> "HostSender":
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        client.init_weight_transfer_engine({})
        # Anonymous memory with a name under /proc: the kernel frees it when this process exits, even by a kill.
        sender.file = open(os.memfd_create("weights"), "wb") if init_info.by_file else None  # noqa: SIM115
        return sender

    @torch.no_grad()
    def send_weights(self) -> None:
        update: dict[str, Any] = {"weights": self.source}
        file = self.file
        if file is not None:  # not a file number: after a shutdown in another thread it could be another file's
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
    """Methods that vLLM adds to each worker. A worker that finds this class has imported the backends above."""

    def received_checksums(self) -> dict[str, Checksum]:
        """Return the checksums of the last push."""
        received = self.weight_transfer_engine.received  # type: ignore[attr-defined]
        return {} if received is None else received.checksums()

    def unloaded_weights(self) -> str:
        """Return which of the model's parameters the last push has not loaded, or an empty text."""
        received = self.weight_transfer_engine.received  # type: ignore[attr-defined]
        return "" if received is None else str(received.describe_unloaded())

    def adapter_checksums(self, number: int, names: Sequence[str]) -> dict[str, Checksum]:
        """Return the checksums of the named tensors of the adapter with this number, as the kernels read them."""
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        return checksums(find_held(manager, number, names).items())

    def release_model(self) -> None:
        """Drop the references that would keep the model in memory after the engine has shut down.

        vLLM's record of a reload refers to the layers that are its weak keys, so nothing else ever frees them.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        self.weight_transfer_engine = None
        layerwise.LAYERWISE_INFO.clear()


if "host" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("host", HostReceiver)
    WeightTransferEngineFactory.register_engine("checked_nccl", CheckedNCCLReceiver)
    WeightTransferTrainerFactory.register_engine("host", HostSender)


class LocalClient:
    """The four calls of a sender, answered by an `LLM` object in this process."""

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


def nccl_init(address: str, n_workers: int, weights: WeightGatherer) -> NCCLTrainerInitInfo:
    """Return the settings of a sender to GPUs, which listens at `address` of this machine.

    A buffer holds the largest tensor: vLLM would warn about one that is larger.
    """
    largest = max(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights.metadata())
    return NCCLTrainerInitInfo(
        master_address=address,
        master_port=get_open_port(),
        world_size=1 + n_workers,
        rank=0,
        packed_buffer_size_bytes=max(MIN_BUFFER_BYTES, largest),
    )


class WeightSender:
    """Sends the policy's weights to vLLM workers, over the backend that `init` names."""

    def __init__(self, weights: WeightGatherer, init: TrainerInitInfo, client: Any) -> None:
        synchronize_device(weights.device)
        self._weights = weights
        self.transfer: TrainerWeightTransferEngine[Any] = WeightTransferTrainerFactory.trainer_init(
            init, client=client, source=weights
        )

    def send(self) -> dict[str, Checksum]:
        """Send all tensors and return the checksums of those that were sent."""
        self._weights.take_checksums()  # discard those of an earlier iteration
        self.transfer.send_weights()
        synchronize_device(self._weights.device)  # the checksums too are computed on the sender's streams
        return self._weights.take_checksums()

    def shutdown(self) -> None:
        self.transfer.shutdown()


def synchronize_device(device: torch.device) -> None:
    """Wait for pending work on the weights on `device`, and make it the current device of this thread.

    NCCL's sender packs on separate streams, which do not wait for others, and a new thread starts on the first GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)


def version_of(spans: Sequence[str]) -> int | None:
    """Return the push that all parts of a response were sampled from; None if there are several, or an unknown one."""
    versions = set(spans)
    return int(versions.pop()) if len(versions) == 1 and spans[0].isdigit() else None


def read_checksums(workers: Sequence[Mapping[str, Sequence[int]]]) -> list[dict[str, Checksum]]:
    """Return workers' checksums as tuples: another process sends them as lists."""
    return [{name: (first, second) for name, (first, second) in sums.items()} for sums in workers]
