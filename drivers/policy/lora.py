"""LoRA: train low-rank updates of the linear layers and freeze the model's weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drivers.common.errors import UsageError
from drivers.policy import fsdp

ADAPTER = "default"


def add_lora(policy: Any, rank: int, alpha: int, *, seed: int, base: str) -> None:
    """Replace each linear layer but the output by `W + alpha / rank * B A`, in place; B starts at zero.

    A depends on `seed` alone, so that it is equal on every rank. The experts of a mixture are one tensor, not layers,
    and stay frozen. A UsageError is raised if peft adapts them nevertheless.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    output = policy.get_output_embeddings()  # it keeps its fast path
    linear = [name for name, module in policy.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    kinds = sorted({name.rpartition(".")[2] for name in linear if policy.get_submodule(name) is not output})
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=kinds,  # with peft's "all-linear" the experts and routers of most mixtures too
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy, ADAPTER)
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A") and not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            raise UsageError(
                f"--lora-rank {rank}: peft adapts {name} of {type(policy).__name__}, which is no layer, so that its "
                "update could not be pushed; pass --lora-rank 0"
            )
    policy.lora_settings = settings  # for `save_adapter`
    policy.eval()


@contextmanager
def without_lora(policy: nn.Module) -> Iterator[nn.Module]:
    """Yield `policy` with its adapters off: the frozen weights are the reference model, so no copy is needed.

    peft's `disable_adapter` is not used, because it also changes which parameters need a gradient.
    """
    layers: list[Any] = [module for module in policy.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield policy
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_weights(policy: nn.Module) -> dict[str, Tensor]:
    """Return A and B under the names of peft's files, gathered by all ranks; empty without LoRA."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": fsdp.full_tensor(parameter.detach())
        for name, parameter in policy.named_parameters()
        if ".lora_" in name
    }


def scaled_adapter(policy: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return A and `alpha / rank * B` in `dtype`, gathered by all ranks: an adapter whose own scale is 1.

    vLLM multiplies B by the scale when it loads an adapter. With a scale of 1 it keeps what was sent, bit for bit.
    """
    scale = policy.lora_settings.lora_alpha / policy.lora_settings.r
    weights = adapter_weights(fsdp.resharded(policy))
    return {
        name: (weight.float() * scale if ".lora_B." in name else weight).to(dtype) for name, weight in weights.items()
    }


def save_adapter(policy: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Save the adapter as peft loads it, beside the merged model."""
    folder.mkdir()
    policy.lora_settings.save_pretrained(folder)
    save_file(
        {name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors"
    )
