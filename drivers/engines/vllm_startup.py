"""Start vLLM's `LLM` on its device and within a deadline."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from vllm import LLM
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.transformers.base import Base
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.options import EngineOptions
from drivers.engines.placement import engine_memory_fraction
from drivers.engines.supervision import TRAINER
from drivers.engines.vllm_adapter import adapter_arguments

T = TypeVar("T")
KV_CACHE_BYTES_ON_CPU = 512 << 20
CPU_BLOCK_SIZE = 32
"""Prefixes are shared in whole blocks. vLLM's default on a CPU, 128, would share nothing of a short prompt."""
_KILL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Placement:
    """Where vLLM runs relative to the policy."""

    has_own_gpu: bool
    shares_gpu: bool
    """vLLM and the policy take turns on one GPU: vLLM sleeps while the policy trains."""
    has_own_process: bool


def place(options: EngineOptions, policy_device: torch.device) -> Placement:
    """Return where vLLM runs relative to a policy on `policy_device`."""
    on_gpu, same_device = options.device.type == "cuda", options.device == policy_device
    has_own_gpu = on_gpu and not same_device
    return Placement(has_own_gpu, on_gpu and same_device, has_own_gpu or options.own_process)


def start_llm(
    options: EngineOptions, placement: Placement, policy_device: torch.device
) -> tuple[LLM, set[BaseProcess]]:
    """Return a vLLM with dummy weights and the processes that it has started.

    In a separate process, raise EngineDiedError if the start exceeds the deadline.
    """
    _check_build(options.device)
    if options.device.type == "cpu":
        _check_head_size(options)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(placement.has_own_process)), TRAINER: str(os.getpid())}
    if placement.has_own_process:  # trainer and engine take turns: each may use all cores
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    start = partial(LLM, **_llm_arguments(options, placement))
    earlier = set(multiprocessing.active_children())
    with _preserved_torch_state(policy_device), nullcontext() if placement.has_own_process else _preserved_classes():
        llm = start_before_deadline(start, options.deadline_s) if placement.has_own_process else start()
    return llm, set(multiprocessing.active_children()) - earlier


def _check_build(device: torch.device) -> None:
    if (device.type == "cpu") != current_platform.is_cpu():
        raise UsageError(
            f"--rollout-device {device}: the installed vLLM is built for {current_platform.device_name} only; install "
            "the other build, or pass --engine hf"
        )


def _check_head_size(options: EngineOptions) -> None:
    """Refuse a model with attention heads for which vLLM has no CPU kernel; vLLM itself fails at the first request."""
    config = EngineArgs(model=options.model_path).create_model_config()
    size, supported = config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if not config.use_mla and size and size not in supported:
        raise UsageError(
            f"--engine vllm: {options.model_path} has attention heads of size {size}, but vLLM's CPU attention takes "
            f"only {', '.join(map(str, supported))}; pass --engine hf"
        )


@contextmanager
def _preserved_torch_state(policy_device: torch.device) -> Iterator[None]:
    """Undo what `LLM()` changes: the current GPU, from which NCCL sends, and the number of threads.

    vLLM's CPU worker replaces `torch.set_num_threads` by a no-op and may lower the number.
    """
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    if policy_device.type == "cuda":
        torch.cuda.set_device(policy_device)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if policy_device.type == "cuda":
            torch.cuda.set_device(policy_device)


@contextmanager
def _preserved_classes() -> Iterator[None]:
    """Keep vLLM from changing classes of transformers, which the policy in this process has too.

    For an architecture without its own model, vLLM takes that of transformers and makes its class one that
    compiles itself and needs vLLM's configuration. Without that, this model is not compiled.
    """
    change = Base._decorate_cls_for_torch_compile
    Base._decorate_cls_for_torch_compile = lambda *args, **kwargs: None
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = change


def _llm_arguments(options: EngineOptions, placement: Placement) -> dict[str, Any]:
    utilization = options.gpu_memory_utilization
    if placement.shares_gpu:  # vLLM gets at most what training leaves
        total_bytes = torch.cuda.get_device_properties(options.device).total_memory
        utilization = min(utilization, engine_memory_fraction(options.reserved_bytes, total_bytes))
    return {
        "model": options.model_path,
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_model_len": options.max_model_len,
        "seed": options.seed % 2**31,
        "load_format": "dummy",  # the first push brings the weights: the policy is their only source
        "max_logprobs": -1,  # no limit: the sets of a truncated sampler are read from log-probs
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from, temperature included
        "weight_transfer_config": WeightTransferConfig(backend="checked_nccl" if placement.has_own_gpu else "host"),
        "worker_extension_cls": "drivers.engines.vllm_transfer.WorkerExtension",
        # On CUDA the policy keeps the float32 sums of its logits. vLLM would round them to bfloat16, which moves a
        # log-prob by up to 0.06 nats, in the self-check and in every ratio to the sampler.
        **({"hf_overrides": {"head_dtype": "float32"}} if options.device.type == "cuda" else {}),
        **({} if options.adapter is None else adapter_arguments(options.adapter)),
        **device_arguments(
            options.device,
            sleeps=placement.shares_gpu and options.may_sleep,
            gpu_memory_utilization=utilization,
        ),
    }


def device_arguments(device: torch.device, *, sleeps: bool, gpu_memory_utilization: float) -> dict[str, Any]:
    """Return the arguments of `LLM` that say where it runs and how much memory it takes there."""
    if device.type == "cpu":
        return {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": KV_CACHE_BYTES_ON_CPU,
            # Seeded sampling needs a prompt in one prefill: CPU generators have no offset to set.
            "enable_chunked_prefill": False,
            # Use the engine's process as its worker. vLLM would start another one to bind threads to cores, which is
            # not wanted here; without it the start takes half of the time.
            "distributed_executor_backend": UniProcExecutor,
        }
    return {
        "device_ids": [device.index or 0],
        "gpu_memory_utilization": gpu_memory_utilization,
        "enable_sleep_mode": sleeps,
        "sleep_mode_offload_cudagraph": sleeps,  # the memory plan of a training step has no place for graphs
    }


def start_before_deadline(start: Callable[[], T], deadline_s: float) -> T:
    """Return `start()`, or raise EngineDiedError if its child processes had to be killed after `deadline_s`.

    vLLM waits for a child process for as long as it lives, so only killing it ends the wait.
    """
    earlier = set(multiprocessing.active_children())
    has_ended, is_late = threading.Event(), threading.Event()

    def kill_late_children() -> None:
        wait_s = deadline_s
        while not has_ended.wait(wait_s):
            is_late.set()
            for process in set(multiprocessing.active_children()) - earlier:
                process.kill()
            wait_s = _KILL_INTERVAL_S  # vLLM may start more of them

    killer = threading.Thread(target=kill_late_children, daemon=True)
    failure: Exception | None = None
    with _sigint_blocked():
        killer.start()
        try:
            result = start()
        except Exception as error:
            if not is_late.is_set():
                raise
            failure = error
        finally:
            has_ended.set()
            killer.join()
    if is_late.is_set():
        raise EngineDiedError(
            f"vLLM did not start within {deadline_s:g} s (--engine-deadline-s) and was killed"
        ) from failure
    return result


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start child processes that ignore Ctrl-C: the trainer ends them, after its update and its push."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
