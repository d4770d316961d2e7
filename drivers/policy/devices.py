"""Choose devices and data types."""

import os
import time

import torch

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.settings.grpo import GrpoConfig


def choose_device(flag: str, name: str, default: torch.device) -> torch.device:
    """The device that a flag names; `auto` is `default`."""
    if name == "auto":
        return default
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{flag} {name}: is no device; cpu, cuda or cuda:N is required") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{flag} {name}: cpu, cuda or cuda:N is required")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{flag} {name}: this machine has {torch.cuda.device_count()} CUDA devices; pass cpu or auto")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def default_policy_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")


def default_rollout_device(policy_device: torch.device) -> torch.device:
    """The first GPU that the policy is not on, else where the policy is."""
    if policy_device.type == "cpu":
        return policy_device
    others = [torch.device("cuda", k) for k in range(torch.cuda.device_count()) if k != policy_device.index]
    return others[0] if others else policy_device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The computing precision that `--dtype` names; `auto` measures on a CPU."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_bfloat16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def cpu_bfloat16_is_fast(gain: float = 1.5) -> bool:
    """Whether a matrix product of a small model's size is at least `gain` times as fast in bfloat16 as in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.float32] >= gain * seconds[torch.bfloat16]


def choose_devices(config: GrpoConfig) -> tuple[torch.device, torch.device]:
    """Where the policy of this process and the engine run."""
    policy_device = choose_device("--policy-device", config.policy_device, default_policy_device())
    if distributed.size() > 1:
        policy_device = device_of_rank(config, policy_device)
        if not distributed.is_first():  # the engine is the first one's, on its machine
            return policy_device, policy_device
    if config.rollout_url:
        if config.engine == "hf" or config.rollout_process != "auto" or config.rollout_device != "auto":
            raise UsageError(
                f"--rollout-url {' '.join(config.rollout_url)}: the servers are the engine; --engine vllm is "
                "required, and neither --rollout-device nor --rollout-process"
            )
        return policy_device, policy_device
    if config.engine == "hf":
        elsewhere = policy_device
    elif distributed.size() > 1 and policy_device.type == "cuda":
        elsewhere = torch.device("cuda", int(os.environ["LOCAL_WORLD_SIZE"]))  # the first one after theirs
    else:
        elsewhere = default_rollout_device(policy_device)
    rollout_device = choose_device("--rollout-device", config.rollout_device, elsewhere)
    if rollout_device.type != policy_device.type or (config.engine == "hf" and rollout_device != policy_device):
        raise UsageError(
            f"--rollout-device {rollout_device}: the policy is on {policy_device}; both on the CPU or both on CUDA is "
            "required, and with --engine hf the same device"
        )
    together = rollout_device == policy_device
    if config.rollout_process == "own" and config.engine == "hf":
        raise UsageError("--rollout-process own: --engine hf shares the policy's weights; pass --rollout-process auto")
    if distributed.size() > 1:
        check_device_beside_ranks(config, rollout_device)
        return policy_device, rollout_device
    if config.rollout_process == "own" and together and policy_device.type == "cuda":
        raise UsageError(
            f"--rollout-process own: policy and engine take turns on {policy_device}, in one process: a second GPU is "
            "required (--rollout-device), or pass --rollout-process auto"
        )
    if config.rollout_process == "shared" and not together:
        raise UsageError(
            f"--rollout-process shared: vLLM on {rollout_device} and the policy on {policy_device} are two processes; "
            "pass --rollout-process auto"
        )
    default = type(config).__dataclass_fields__["engine_deadline_s"].default
    if together and config.rollout_process != "own" and config.engine_deadline_s != default:
        raise UsageError(
            f"--engine-deadline-s {config.engine_deadline_s:g}: has no effect on an engine in the trainer's own "
            f"process, which nobody waits for: pass --rollout-process own, or leave it at {default:g}"
        )
    if config.async_steps and together and policy_device.type == "cuda":
        raise UsageError(
            f"--async-steps {config.async_steps}: policy and engine take turns on {policy_device}: a second GPU is "
            "required (--rollout-device), or pass --async-steps 0"
        )
    return policy_device, rollout_device


def device_of_rank(config: GrpoConfig, policy_device: torch.device) -> torch.device:
    """Each rank has the GPU of its number on its machine."""
    if policy_device.type == "cpu":
        return policy_device
    if config.policy_device != "auto":
        raise UsageError(
            f"--policy-device {config.policy_device}: each rank takes the GPU of its number; pass auto, and choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def check_device_beside_ranks(config: GrpoConfig, rollout_device: torch.device) -> None:
    """VLLM has a process of its own there, and a GPU of its own if any."""
    if config.rollout_process == "shared":
        raise UsageError("--rollout-process shared: several ranks need vLLM in a process of its own; pass auto")
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    free = range(n_local, torch.cuda.device_count())
    if config.engine == "vllm" and rollout_device.type == "cuda" and rollout_device.index not in free:
        raise UsageError(
            f"--rollout-device {rollout_device}: the {n_local} ranks have the GPUs 0 to {n_local - 1}; one more is "
            "required for vLLM: lower --nproc-per-node, or pass --rollout-url"
        )
