"""Share a GPU between the policy and vLLM."""

import torch

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.settings.groups import RolloutEngineSettings

LESS_MEMORY = "pass --lora-rank 16, train on several GPUs with torchrun, or choose a smaller model"
"""Advice where weights and optimizer do not fit on a device."""


def shares_gpu(config: RolloutEngineSettings, policy_device: torch.device, rollout_device: torch.device) -> bool:
    """Return whether policy and engine take turns on one GPU: the engine sleeps while the policy trains."""
    is_single_vllm = distributed.size() == 1 and config.engine == "vllm" and not config.rollout_url
    return is_single_vllm and policy_device.type == "cuda" and policy_device == rollout_device


def engine_memory_fraction(reserved_bytes: int, total_bytes: int) -> float:
    """Return the share of a GPU that is left for vLLM: a tenth is kept free for memory that is not counted."""
    share = 0.9 - reserved_bytes / total_bytes
    if share < 0.05:
        second = "use a second GPU for vLLM (--rollout-device), " if reserved_bytes < 0.9 * total_bytes else ""
        raise UsageError(
            f"training needs {reserved_bytes / 2**30:.1f} of the GPU's {total_bytes / 2**30:.1f} GiB, which leaves "
            f"no room for vLLM; {second}{LESS_MEMORY}"
        )
    return share
