"""Choose devices and data types."""

import os
import time
from typing import NamedTuple

import torch

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.settings.groups import PolicySettings, RolloutEngineSettings
from drivers.settings.grpo import GrpoConfig


class Devices(NamedTuple):
    """Where the policy of this process and the engine run."""

    policy: torch.device
    rollout: torch.device


def choose_device(flag: str, name: str, default: torch.device) -> torch.device:
    """Return the device that a flag names, or `default` for `auto`; raise UsageError if this machine lacks it."""
    if name == "auto":
        return default
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{flag} {name}: not a device; pass auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{flag} {name}: not supported; pass auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{flag} {name}: this machine has {torch.cuda.device_count()} CUDA devices; pass cpu or auto")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def default_policy_device() -> torch.device:
    """Return the first GPU, or the CPU without one."""
    return torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")


def default_rollout_device(policy_device: torch.device) -> torch.device:
    """Return the first GPU that the policy does not use, or the policy's device without one."""
    if policy_device.type == "cpu":
        return policy_device
    others = [torch.device("cuda", k) for k in range(torch.cuda.device_count()) if k != policy_device.index]
    return others[0] if others else policy_device


def choose_devices(config: GrpoConfig) -> Devices:
    """Return the devices that the flags ask for; raise UsageError if they cannot work."""
    devices = pick_devices(config)
    check_devices(config, devices)
    return devices


def pick_devices(config: GrpoConfig) -> Devices:
    """Return the devices that the flags ask for. Without a local engine in this process, both are the policy's."""
    policy = choose_device("--policy-device", config.policy_device, default_policy_device())
    is_one_of_several = distributed.size() > 1
    if is_one_of_several and policy.type == "cuda":
        policy = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if config.rollout_url or not distributed.is_rank_zero():
        return Devices(policy, policy)
    if config.engine == "hf":
        default = policy
    elif is_one_of_several and policy.type == "cuda":
        default = torch.device("cuda", _n_local_ranks())  # the first GPU that no rank uses
    else:
        default = default_rollout_device(policy)
    return Devices(policy, choose_device("--rollout-device", config.rollout_device, default))


def check_devices(config: GrpoConfig, devices: Devices) -> None:
    """Raise UsageError if the flags for devices and processes contradict each other."""
    checks = _policy_checks(config, devices)
    if not distributed.is_rank_zero():
        pass  # the engine is on rank 0
    elif config.rollout_url:
        checks += _server_checks(config)
    else:
        checks += _engine_checks(config, devices)
        checks += _ranks_checks(config, devices) if distributed.size() > 1 else _single_process_checks(config, devices)
    for is_wrong, message in checks:
        if is_wrong:
            raise UsageError(message)


Check = tuple[bool, str]
"""A condition that must not hold, and the message if it does."""


def _policy_checks(config: PolicySettings, devices: Devices) -> list[Check]:
    return [
        (
            distributed.size() > 1 and devices.policy.type == "cuda" and config.policy_device != "auto",
            f"--policy-device {config.policy_device}: each rank takes the GPU with its number; pass auto, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES",
        )
    ]


def _server_checks(config: RolloutEngineSettings) -> list[Check]:
    return [
        (
            config.engine == "hf" or config.rollout_process != "auto" or config.rollout_device != "auto",
            f"--rollout-url {' '.join(config.rollout_url)}: the servers are the engine; pass --engine vllm and leave "
            "out --rollout-device and --rollout-process",
        )
    ]


def _engine_checks(config: RolloutEngineSettings, devices: Devices) -> list[Check]:
    return [
        (
            devices.rollout.type != devices.policy.type,
            f"--rollout-device {devices.rollout}: the policy is on {devices.policy}; put both on the CPU or both on "
            "GPUs",
        ),
        (
            config.engine == "hf" and devices.rollout != devices.policy,
            f"--rollout-device {devices.rollout}: --engine hf samples on the policy's {devices.policy}; pass auto",
        ),
        (
            config.engine == "hf" and config.rollout_process == "own",
            "--rollout-process own: --engine hf shares the policy's weights; pass auto, or --engine vllm",
        ),
    ]


def _ranks_checks(config: RolloutEngineSettings, devices: Devices) -> list[Check]:
    n_ranks, rollout = _n_local_ranks(), devices.rollout
    free = range(n_ranks, torch.cuda.device_count())
    return [
        (
            config.rollout_process == "shared",
            "--rollout-process shared: several ranks need vLLM in a separate process; pass auto",
        ),
        (
            config.engine == "vllm" and rollout.type == "cuda" and rollout.index not in free,
            f"--rollout-device {rollout}: the {n_ranks} ranks use GPUs 0 to {n_ranks - 1}, and vLLM needs another; "
            "lower --nproc-per-node, or pass --rollout-url",
        ),
    ]


def _single_process_checks(config: GrpoConfig, devices: Devices) -> list[Check]:
    is_same_device = devices.rollout == devices.policy
    is_same_gpu = is_same_device and devices.policy.type == "cuda"
    default_deadline_s = type(config).engine_deadline_s
    return [
        (
            config.rollout_process == "own" and is_same_gpu,
            f"--rollout-process own: policy and vLLM take turns on {devices.policy} in one process; pass auto, or use "
            "a second GPU (--rollout-device)",
        ),
        (
            config.rollout_process == "shared" and not is_same_device,
            f"--rollout-process shared: vLLM on {devices.rollout} and the policy on {devices.policy} need two "
            "processes; pass auto",
        ),
        (
            is_same_device and config.rollout_process != "own" and config.engine_deadline_s != default_deadline_s,
            f"--engine-deadline-s {config.engine_deadline_s:g}: has no effect on an engine in the trainer's process; "
            f"pass --rollout-process own, or leave it at {default_deadline_s:g}",
        ),
        (
            bool(config.async_steps) and is_same_gpu,
            f"--async-steps {config.async_steps}: policy and vLLM take turns on {devices.policy}; pass 0, or use a "
            "second GPU (--rollout-device)",
        ),
    ]


def _n_local_ranks() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"])


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `--dtype` names; `auto` is bfloat16 where it is fast, which is measured on a CPU."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    is_fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_bfloat16_is_fast()
    return torch.bfloat16 if is_fast else torch.float32


def cpu_bfloat16_is_fast(min_speedup: float = 1.5) -> bool:
    """Measure whether a matrix product of a small model's size is `min_speedup` times as fast in bfloat16."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.float32] >= min_speedup * seconds[torch.bfloat16]
