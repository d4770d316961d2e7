"""Choose devices and data types."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from timeit import repeat
from typing import NamedTuple

import torch

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.settings.grpo import GrpoConfig


class Devices(NamedTuple):
    """Where the policy of this process and the engine run."""

    policy: torch.device
    rollout: torch.device


def count_gpus() -> int:
    """Return the number of CUDA devices; raise a UsageError if there are some and torch cannot use them."""
    count = torch.cuda.device_count()
    if count and not torch.cuda.is_available():
        raise UsageError(
            f"the machine has {count} CUDA devices, and torch {torch.__version__} cannot use them; update the NVIDIA "
            "driver to 580 or newer, or pass --policy-device cpu (evaluate.py: --device cpu)"
        )
    return count


def choose_device(flag: str, name: str, default: Callable[[], torch.device]) -> torch.device:
    """Return the device that a flag names, or `default()` for `auto`; raise UsageError if this machine lacks it."""
    if name == "auto":
        return default()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{flag} {name}: not a device; pass auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{flag} {name}: not supported; pass auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count_gpus():
        raise UsageError(f"{flag} {name}: this machine has {count_gpus()} CUDA devices; pass cpu or auto")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def default_policy_device() -> torch.device:
    """Return the first GPU, or the CPU without one."""
    return torch.device("cuda", 0) if count_gpus() else torch.device("cpu")


def choose_devices(config: GrpoConfig) -> Devices:
    """Return the devices that the flags ask for; raise UsageError if they cannot work.

    Without a local engine in this process, both are the policy's.
    """
    policy = choose_device("--policy-device", config.policy_device, default_policy_device)
    is_one_of_several = distributed.size() > 1
    if is_one_of_several and policy.type == "cuda":
        policy = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if config.rollout_url or not distributed.is_rank_zero():
        devices = Devices(policy, policy)
    else:
        if config.engine == "hf":
            default = policy
        elif is_one_of_several and policy.type == "cuda":
            default = torch.device("cuda", _n_local_ranks())  # the first GPU that no rank uses
        else:  # the first GPU that the policy does not use, or the device of the policy
            gpus = range(torch.cuda.device_count()) if policy.type == "cuda" else ()
            default = next((torch.device("cuda", gpu) for gpu in gpus if gpu != policy.index), policy)
        devices = Devices(policy, choose_device("--rollout-device", config.rollout_device, lambda: default))
    for conflict in _find_conflicts(config, *devices):
        raise UsageError(conflict)
    return devices


def _find_conflicts(config: GrpoConfig, policy: torch.device, rollout: torch.device) -> Iterator[str]:
    """Yield what is wrong with the flags for devices and processes."""
    is_one_of_several, on_gpu, is_same_device = distributed.size() > 1, policy.type == "cuda", policy == rollout
    if is_one_of_several and on_gpu and config.policy_device != "auto":
        yield (
            f"--policy-device {config.policy_device}: each rank takes the GPU with its number; pass auto, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    if not distributed.is_rank_zero():
        return  # the engine is on rank 0
    if config.rollout_url:
        if config.engine == "hf" or config.rollout_process != "auto" or config.rollout_device != "auto":
            yield (
                f"--rollout-url {' '.join(config.rollout_url)}: the servers are the engine; pass --engine vllm and "
                "leave out --rollout-device and --rollout-process"
            )
        return
    if rollout.type != policy.type:
        yield f"--rollout-device {rollout}: the policy is on {policy}; put both on the CPU or both on GPUs"
    if config.engine == "hf" and not is_same_device:
        yield f"--rollout-device {rollout}: --engine hf samples on the policy's {policy}; pass auto"
    if config.engine == "hf" and config.rollout_process == "own":
        yield "--rollout-process own: --engine hf shares the policy's weights; pass auto, or --engine vllm"
    if is_one_of_several:
        n_ranks = _n_local_ranks()
        if config.rollout_process == "shared":
            yield "--rollout-process shared: several ranks need vLLM in a separate process; pass auto"
        is_free = rollout.index in range(n_ranks, torch.cuda.device_count())
        if config.engine == "vllm" and rollout.type == "cuda" and not is_free:
            yield (
                f"--rollout-device {rollout}: the {n_ranks} ranks use GPUs 0 to {n_ranks - 1}, and vLLM needs "
                "another; lower --nproc-per-node, or pass --rollout-url"
            )
        return
    if config.rollout_process == "own" and is_same_device and on_gpu:
        yield (
            f"--rollout-process own: policy and vLLM take turns on {policy} in one process; pass auto, or use a "
            "second GPU (--rollout-device)"
        )
    if config.rollout_process == "shared" and not is_same_device:
        yield (f"--rollout-process shared: vLLM on {rollout} and the policy on {policy} need two processes; pass auto")
    if is_same_device and config.rollout_process != "own" and config.is_changed("engine_deadline_s"):
        yield (
            f"--engine-deadline-s {config.engine_deadline_s:g}: has no effect on an engine in the trainer's process; "
            f"pass --rollout-process own, or leave it at {type(config).engine_deadline_s:g}"
        )
    if config.async_steps and is_same_device and on_gpu:
        yield (
            f"--async-steps {config.async_steps}: policy and vLLM take turns on {policy}; pass 0, or use a second "
            "GPU (--rollout-device)"
        )


def _n_local_ranks() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"])


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `--dtype` names; `auto` is bfloat16 where it is fast, which is measured on a CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    # Older GPUs emulate bfloat16, which is slow, and vLLM refuses it there.
    is_native = partial(torch.cuda.is_bf16_supported, including_emulation=False)
    is_fast = is_native() if device.type == "cuda" else cpu_bfloat16_is_fast()
    return torch.bfloat16 if is_fast else torch.float32


def cpu_bfloat16_is_fast() -> bool:
    """Measure whether a matrix product of a small model's size is 1.5 times as fast in bfloat16."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = min(repeat(partial(torch.matmul, left, right), repeat=5, number=1))
    return seconds[torch.float32] >= 1.5 * seconds[torch.bfloat16]
