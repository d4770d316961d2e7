"""Push a LoRA adapter to a local vLLM, which adds it to weights that stay.

vLLM loads the adapter by its own `add_lora`, from a folder that exists during the push. Each push has a new number, so
that neither an old adapter nor keys and values of one are used again; vLLM keeps one adapter and drops the old one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.v1.engine.exceptions import EngineDeadError

from drivers.common.errors import UsageError, first_line
from drivers.policy.checksums import Checksum, checksums
from drivers.policy.weights import WeightGatherer

if TYPE_CHECKING:
    from peft import LoraConfig

MAX_RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
"""Sizes of vLLM's buffers. An adapter of lower rank is padded with zeros."""


def adapter_arguments(settings: "LoraConfig") -> dict[str, Any]:
    """Return the arguments of `LLM` that make room for one adapter, in the layers that are trained.

    In all layers, which is vLLM's default, the output head would multiply by an adapter of zeros for each token.
    """
    ranks = [rank for rank in MAX_RANKS if rank >= settings.r]
    if not ranks:
        raise UsageError(
            f"--lora-push adapter: vLLM takes ranks up to {MAX_RANKS[-1]}, not --lora-rank {settings.r}; pass "
            "--lora-push merged, or a lower rank"
        )
    return {
        "enable_lora": True,
        "max_lora_rank": ranks[0],
        "max_loras": 1,
        "max_cpu_loras": 1,
        "lora_target_modules": sorted(settings.target_modules or ()),
    }


class AdapterSender:
    """Sends the policy's adapter to the workers of a local vLLM."""

    def __init__(self, llm: LLM, weights: WeightGatherer) -> None:
        self._llm, self._weights = llm, weights
        self._names: list[str] = []
        self.request: LoRARequest | None = None
        """The adapter of the last push, for each request."""

    def send(self) -> dict[str, Checksum]:
        """Send the adapter and return the checksums of its tensors."""
        adapter = self._weights.adapter()
        number = 1 if self.request is None else self.request.lora_int_id + 1
        with TemporaryDirectory(prefix="grpo-adapter-") as folder:
            write_adapter(adapter, Path(folder))
            self.request = LoRARequest(f"push-{number}", number, folder)
            try:
                self._llm.llm_engine.add_lora(self.request)
            except EngineDeadError:
                raise
            except Exception as error:  # a layer that vLLM's model does not have
                raise UsageError(
                    f"--lora-push adapter: vLLM cannot load the adapter: {first_line(error)}; pass --lora-push merged"
                ) from error
        self._names = list(adapter)
        return checksums(adapter.items())

    def received(self) -> list[Any]:
        """Return the checksums of the adapter of the last push, as each worker holds it."""
        number = 0 if self.request is None else self.request.lora_int_id
        return list(self._llm.collective_rpc("adapter_checksums", args=(number, self._names)))


def write_adapter(adapter: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter whose scale is 1 as vLLM reads it."""
    rank = next(len(weight) for name, weight in adapter.items() if ".lora_A." in name)
    # vLLM reads the layers from the names of the tensors.
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {name: weight.cpu().contiguous() for name, weight in adapter.items()}, folder / "adapter_model.safetensors"
    )


def find_held(manager: Any, number: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the named tensors of an adapter from the buffers that a worker's kernels read.

    A tensor that no layer has taken is left out, and so are all of an adapter that is not active.
    """
    if number not in manager.lora_index_to_id:
        return {}
    slot, rank = manager.lora_index_to_id.index(number), manager.get_adapter(number).rank
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    places = {  # vLLM stacks layers that have the same input
        part: (layer, index)
        for name, layer in manager.modules.items()
        for index, part in enumerate(manager.packed_modules.get(name, [name])[: layer.n_slices])
    }
    held: dict[str, Tensor] = {}
    for name in names:
        part, is_a = parse_fine_tuned_lora_name(name, renames)
        if part in places:
            layer, index = places[part]
            buffer = (layer.lora_a_stacked if is_a else layer.lora_b_stacked)[index][slot, 0]
            held[name] = buffer[:rank] if is_a else buffer[:, :rank]
    return held
