"""Share a GPU between the policy and vLLM."""

import torch

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.settings.grpo import GrpoConfig


def shares_gpu(config: GrpoConfig, policy_device: torch.device, rollout_device: torch.device) -> bool:
    """Whether policy and engine share a GPU: the engine sleeps while the policy trains."""
    alone = distributed.size() == 1 and config.engine == "vllm" and not config.rollout_url
    return alone and policy_device.type == "cuda" and policy_device == rollout_device


def engine_memory_fraction(reserved_bytes: int, total_bytes: int) -> float:
    """The part of a GPU left for vLLM beside what else must stay there, less a tenth for all that is not counted."""
    share = 0.9 - reserved_bytes / total_bytes
    if share < 0.05:
        raise UsageError(
            f"rollout_device: {reserved_bytes / 2**30:.1f} of the GPU's {total_bytes / 2**30:.1f} GiB are needed "
            "beside vLLM, which leaves it no room; name a second GPU"
        )
    return share
