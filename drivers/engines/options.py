"""Settings of a vLLM engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where a vLLM engine runs, and how much it may use there."""

    model_path: str
    """Folder of the model's configuration and tokenizer; the weights come with the first push."""
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    seed: int
    gpu_memory_utilization: float
    """Share of the GPU's memory that vLLM may take; less where the policy needs more."""
    reserved_bytes: int = 0
    """Memory that training needs on a GPU which vLLM shares with the policy."""
    may_sleep: bool = False
    """Let vLLM free its memory on a GPU which it shares with the policy, while the policy trains."""
    own_process: bool = False
    """On a CPU, run vLLM in a separate process. On a GPU other than the policy's, it always is separate."""
    deadline_s: float = 3600.0
    """Longest wait for an answer of a separate process."""
    urls: Sequence[str] = ()
    """vLLM servers to use instead of a local engine."""
    adapter: "LoraConfig | None" = None
    """The policy's LoRA settings, for an engine that gets the adapter itself. Default: pushes bring merged weights."""
