"""Plan the memory of the policy's device before a run starts."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.engines.placement import LESS_MEMORY, engine_memory_fraction, shares_gpu
from drivers.policy import fsdp
from drivers.policy.optimizer import training_state_bytes
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.grpo import GrpoConfig
from drivers.training.shortcuts import find_head

GIB = 2**30
LOGITS_BYTES = 1 << 29
"""Largest logits that the head surely keeps; on CUDA it keeps more where more memory is free."""
VLLM_ON_CPU = (512 + 512) << 20
"""Bytes that vLLM takes on a CPU beside its weights: its cache of keys and values, and the engine itself."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the policy's device; the engine counts only if it shares that device."""

    states: int
    """Weights, float32 master weights, gradients, both moments of AdamW, and any reference and teacher."""
    activations: int
    """Activations that one micro-batch keeps for its backward pass."""
    logits: int
    engine: int
    available: int
    checkpointed: bool
    share: float | None = None
    """Share of the GPU that the engine gets while it samples, if both take turns on one GPU; else None."""
    checkpoint: int = 0
    """Copy of the state that is written while the next step runs."""

    @property
    def total(self) -> int:
        """Return the bytes that are needed in all."""
        return self.states + self.activations + self.logits + self.engine + self.checkpoint

    @property
    def fits(self) -> bool:
        """Return whether the plan fits, with a tenth of the memory in reserve."""
        return self.available == 0 or self.total < 0.9 * self.available

    def __str__(self) -> str:
        parts = {
            "policy and optimizer": self.states,
            "activations" + (" (checkpointed)" if self.checkpointed else ""): self.activations,
            "logits": self.logits,
            "engine": self.engine,
            "checkpoint": self.checkpoint,
        }
        listed = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
        limit = f"{self.available / GIB:.0f} GiB" if self.available else "an amount that this system does not report"
        plan = f"about {self.total / GIB:.1f} GiB ({listed}) of {limit}"
        if self.share is None:
            return plan
        return (
            f"{plan} while it trains, the engine asleep; while it samples, policy and optimizer "
            f"{self.states / GIB:.1f} + engine {self.share * self.available / GIB:.1f} ({self.share:.2f} of the GPU)"
        )


def configure_memory(
    config: GrpoConfig, policy: Any, longest_prompt: int, frozen_bytes: int, rollout_device: torch.device
) -> MemoryPlan:
    """Return the memory plan of this run, and enable gradient checkpointing if it is requested or needed to fit."""
    here = config.engine == "vllm" and rollout_device.type == "cpu" and not config.rollout_url
    # The engine's weights. To push to another process takes two more copies: the file, and the weights to write to it.
    copies = 3 if config.rollout_process == "own" or distributed.size() > 1 else 1
    size = sum(p.numel() for p in policy.parameters()) * fsdp.computing_dtype(policy).itemsize
    engine_bytes = copies * size + VLLM_ON_CPU if here else 0
    make_plan = partial(
        plan_memory, config, policy, longest_prompt, frozen_bytes=frozen_bytes, engine_bytes=engine_bytes
    )
    plan, share = make_plan(), None
    if max(distributed.gather(plan.states > plan.available > 0)):
        raise UsageError(
            f"--model-path {config.model_path}: weights and optimizer take {plan.states / GIB:.1f} of the device's "
            f"{plan.available / GIB:.1f} GiB; {LESS_MEMORY}"
        )
    all_fit = all(distributed.gather(plan.fits))  # all ranks must decide alike, even on different machines
    if shares_gpu(config, next(policy.parameters()).device, rollout_device):
        left = engine_memory_fraction(training_state_bytes(policy) + frozen_bytes, plan.available)
        share = min(config.gpu_memory_utilization, left)
    if config.gradient_checkpointing == "on" or (config.gradient_checkpointing == "auto" and not all_fit):
        enable_checkpointing(policy)
        plan = make_plan(checkpointed=True)
    return replace(plan, share=share)


def gathered_bytes(policy: Any) -> int:
    """Return the bytes that a rank gathers for a while: unsharded weights and gradients of two layers and of the rest.

    The sum over ranks adds one float32 buffer, of a layer or of the rest, whichever is larger.
    """
    if distributed.size() == 1:
        return 0
    layers = policy.config.get_text_config().num_hidden_layers
    inside = sum(p.numel() for name, p in policy.named_parameters() if ".layers." in name or ".h." in name)
    outside = sum(p.numel() for p in policy.parameters()) - inside
    kept = 2 * (outside + 2 * inside // layers) * fsdp.computing_dtype(policy).itemsize
    return int(kept + 4 * max(outside, inside // layers))


def plan_memory(
    config: GrpoConfig,
    policy: Any,
    longest_prompt: int,
    *,
    frozen_bytes: int = 0,
    engine_bytes: int = 0,
    checkpointed: bool = False,
) -> MemoryPlan:
    """Return the memory plan for the largest possible micro-batch.

    All layers keep activations; with checkpointing, one layer does at a time, and the others keep their inputs.
    """
    tokens = max_micro_batch_tokens(config, longest_prompt)
    longest_row = min(tokens, longest_prompt + config.group_size * config.sampling_max_tokens)
    layers = policy.config.get_text_config().num_hidden_layers
    per_layer = activation_bytes(policy, longest_row)
    hidden = policy.config.get_text_config().hidden_size * fsdp.computing_dtype(policy).itemsize
    kept = (layers * hidden + per_layer) if checkpointed else layers * per_layer
    return MemoryPlan(
        states=training_state_bytes(policy) + frozen_bytes + gathered_bytes(policy),
        activations=tokens * kept,
        logits=head_bytes(policy, tokens),
        engine=engine_bytes,
        available=available_bytes(next(policy.parameters()).device),
        checkpointed=checkpointed,
        checkpoint=checkpoint_copy_bytes(policy),
    )


def checkpoint_copy_bytes(policy: nn.Module) -> int:
    """Return the bytes of the copy of a CPU policy that a checkpoint is written from; a GPU holds none.

    Each rank copies its masters and moments, and rank 0 the whole model, unless the masters are the model.
    """
    parameters, size = list(policy.parameters()), fsdp.computing_dtype(policy).itemsize
    if parameters[0].device.type != "cpu":
        return 0
    is_master = [p.requires_grad and p.dtype == torch.float32 and distributed.size() == 1 for p in parameters]
    model = sum(p.numel() * size for p, is_shared in zip(parameters, is_master, strict=True) if not is_shared)
    state = 12 * sum(p.numel() for p in parameters if p.requires_grad) // distributed.size()
    return state + (model if distributed.is_rank_zero() else 0)


def max_micro_batch_tokens(config: AlgorithmSettings, longest_prompt: int) -> int:
    """Return the largest number of tokens in one forward pass, with padding and without shared prompts."""
    longest = longest_prompt + config.sampling_max_tokens
    if config.micro_batch_tokens is not None:
        return max(config.micro_batch_tokens, longest)
    return config.micro_train_batch_size * longest


def head_bytes(policy: Any, tokens: int) -> int:
    """Return the bytes of the logits of `tokens` tokens, and of the buffers that turn them into a gradient."""
    weight = policy.get_output_embeddings().weight
    vocab, size = int(weight.shape[0]), fsdp.computing_dtype(policy).itemsize
    if find_head(policy) is None:  # all logits, their gradient, and the tiles
        return 2 * tokens * vocab * size + _tile_bytes(weight, tokens)
    # On CUDA, logits are float32, so a narrower gradient cannot overwrite them.
    wide = 4 if weight.is_cuda else size
    logits = min(tokens * vocab * wide, LOGITS_BYTES)
    gradient = logits // wide * size if wide > size else 0
    # The weight's gradient is summed over blocks in float32, and in float16 it is rescaled in float32.
    is_summed = tokens * vocab * wide > LOGITS_BYTES or fsdp.computing_dtype(policy) == torch.float16
    return logits + gradient + _tile_bytes(weight, tokens) + int(weight.numel()) * (size + (4 if is_summed else 0))


def _tile_bytes(weight: Tensor, tokens: int) -> int:
    """Return the bytes of the two float32 buffers that the fused head works in."""
    return 2 * min(256 << 20 if weight.is_cuda else 3 << 20, 4 * tokens * int(weight.shape[0]))


def activation_bytes(policy: Any, row: int) -> int:
    """Return the bytes that a Llama layer keeps per token: inputs of its products, float32 norms, rotary values."""
    config, size = policy.config.get_text_config(), fsdp.computing_dtype(policy).itemsize
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = getattr(config, "num_attention_heads", None) or max(1, width // 64)
    head_dim = getattr(config, "head_dim", None) or width // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    norms = 2 * (2 * 4 * width + size * width)
    attention = size * (3 * heads * head_dim + 4 * keys)
    if config._attn_implementation == "eager":  # attention weights of each head, in float32 and in the model's type
        attention += heads * row * (4 + size) + size * 2 * heads * head_dim
    return int(norms + attention + size * (4 * inner + 2 * width))


def available_bytes(device: torch.device) -> int:
    """Return the memory of the GPU, or this rank's share of the machine's memory limit; 0 if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sizes = []
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).exists() else ""
        sizes += [int(text)] if text.isdigit() else []
    if hasattr(os, "sysconf"):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(sizes, default=0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks of one machine share it


def pop_peak_memory() -> dict[str, float]:
    """Return the peak memory of the fullest GPU since the last call, in GiB; empty without a GPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    devices = range(torch.cuda.device_count())
    peak = max(torch.cuda.max_memory_allocated(device) for device in devices)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    return {"peak_memory_gib": peak / GIB}


def enable_checkpointing(policy: Any) -> None:
    """Recompute activations in the backward pass, without dropout: transformers does so only in training mode."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    expected = _probe(policy)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    if not torch.equal(_probe(policy), expected):
        raise UsageError(
            "--gradient-checkpointing: this model has dropout that cannot be turned off, so it gives other values in "
            "training mode, which checkpointing requires; pass off, and lower --micro-batch-tokens instead"
        )


@torch.no_grad()
def _probe(policy: Any) -> Tensor:
    ids = torch.arange(1, 9, device=policy.device)[None] % policy.get_input_embeddings().num_embeddings
    logits: Tensor = fsdp.with_unsharded_params(policy, lambda: policy(input_ids=ids, use_cache=False).logits)
    return logits
