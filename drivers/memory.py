"""What a run will need where the policy is, told before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivers.config import GrpoConfig
from drivers.optim import training_state_bytes

GIB = 2**30
VLLM_ON_CPU = (512 + 512) << 20
"""The cache of keys and values, and what the engine itself takes, beside its weights."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the policy's device, engine left out where it has a device of its own."""

    states: int
    """Weights, and in float32 masters, gradients and both moments of AdamW; and the reference, if there is one."""
    activations: int
    """What one micro-batch keeps for its backward pass."""
    logits: int
    engine: int
    available: int
    checkpointed: bool

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits + self.engine

    @property
    def fits(self) -> bool:
        """With a tenth to spare for what no plan knows of."""
        return self.available == 0 or self.total < 0.9 * self.available

    def __str__(self) -> str:
        parts = {
            "policy and optimizer": self.states,
            "activations" + (" (checkpointed)" if self.checkpointed else ""): self.activations,
            "logits": self.logits,
            "engine": self.engine,
        }
        listed = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        return f"about {self.total / GIB:.1f} GiB ({listed}) of {self.available / GIB:.0f} GiB"


def settle_memory(
    config: GrpoConfig, policy: Any, longest_prompt: int, reference_bytes: int, rollout_device: torch.device
) -> MemoryPlan:
    """The plan of this run, layers checkpointed where it is asked for or would not fit without."""
    shared = config.engine == "vllm" and rollout_device.type == "cpu"
    engine_bytes = weight_bytes(policy) + VLLM_ON_CPU if shared else 0
    sizes: dict[str, Any] = {"reference_bytes": reference_bytes, "engine_bytes": engine_bytes}
    plan = plan_memory(config, policy, longest_prompt, **sizes)
    if config.gradient_checkpointing == "on" or (config.gradient_checkpointing == "auto" and not plan.fits):
        enable_checkpointing(policy)
        plan = plan_memory(config, policy, longest_prompt, **sizes, checkpointed=True)
    return plan


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def plan_memory(
    config: GrpoConfig,
    policy: Any,
    longest_prompt: int,
    *,
    reference_bytes: int = 0,
    engine_bytes: int = 0,
    checkpointed: bool = False,
) -> MemoryPlan:
    """Of the largest micro-batch that can come, kept by all layers, or by one at a time where they are run again."""
    tokens = most_tokens(config, longest_prompt)
    longest_row = min(tokens, longest_prompt + config.group_size * config.sampling_max_tokens)
    layers = policy.config.get_text_config().num_hidden_layers
    per_layer = activation_bytes(policy, longest_row)
    hidden = policy.config.get_text_config().hidden_size * next(policy.parameters()).element_size()
    kept = (layers * hidden + per_layer) if checkpointed else layers * per_layer
    vocabulary = policy.get_output_embeddings().weight
    return MemoryPlan(
        states=training_state_bytes(policy) + reference_bytes,
        activations=tokens * kept,
        logits=min(tokens * len(vocabulary) * vocabulary.element_size(), 1 << 29),
        engine=engine_bytes,
        available=available_bytes(next(policy.parameters()).device),
        checkpointed=checkpointed,
    )


def most_tokens(config: GrpoConfig, longest_prompt: int) -> int:
    """Of one pass, padding counted."""
    longest = longest_prompt + config.sampling_max_tokens
    if config.micro_batch_tokens is not None:
        return max(config.micro_batch_tokens, longest)
    return config.micro_train_batch_size * longest


def activation_bytes(policy: Any, row: int) -> int:
    """What a layer of the Llama kind keeps of one token: the inputs of its products, norms in float32, rotations."""
    config, size = policy.config.get_text_config(), next(policy.parameters()).element_size()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    norms = 2 * (2 * 4 * width + size * width)
    attention = size * (3 * heads * head_dim + 4 * keys)
    if config._attn_implementation == "eager":  # the weights of each head, in float32 and as they are applied
        attention += heads * row * (4 + size) + size * 2 * heads * head_dim
    return int(norms + attention + size * (4 * inner + 2 * width))


def available_bytes(device: torch.device) -> int:
    """All of a GPU, or what the machine's memory limit leaves."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sizes = []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).exists() else ""
        sizes += [int(text)] if text.isdigit() else []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes.append(1024 * int(meminfo.read_text().split("MemTotal:")[1].split()[0]))
    return min(sizes, default=0)


def enable_checkpointing(policy: Any) -> None:
    """Layers are run again in the backward pass. Transformers does that in training mode alone, so dropout goes."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
