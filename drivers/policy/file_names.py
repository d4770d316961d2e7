"""Names and shapes that weights have in a model's files.

transformers may store them differently in memory: all experts of a layer in one tensor, for example.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from drivers.common.errors import UsageError, first_line


class WeightGroup(NamedTuple):
    """Weights of a module that become weights of its files together."""

    names: tuple[str, ...]
    """Names in the module."""
    files: dict[str, Tensor]
    """Meta tensors under their names in the files."""


def group_weights(policy: nn.Module, weights: Mapping[str, Tensor]) -> list[WeightGroup]:
    """Return small groups, in the order of `weights`, that can be converted one after the other.

    `weights` are tensors on the meta device. One that is only renamed is its own group; all other
    weights of a layer form one group. A UsageError is raised if the groups do not give what all weights give together.
    """
    whole = to_files(policy, dict(weights))
    unchanged = {id(weight) for weight in whole.values()}
    groups: dict[str, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(name if id(weight) in unchanged else _layer_of(name), []).append(name)
    converted = [
        WeightGroup(tuple(names), to_files(policy, {name: weights[name] for name in names}))
        for names in groups.values()
    ]
    found = {name: weight.shape for group in converted for name, weight in group.files.items()}
    if found != {name: weight.shape for name, weight in whole.items()}:
        raise UsageError(
            f"--engine vllm: the weights of {type(policy).__name__} cannot be converted to those of its files one "
            "layer after the other; pass --engine hf"
        )
    return converted


def _layer_of(name: str) -> str:
    """Return the part of a name up to the number of the layer.

    >>> _layer_of("model.layers.3.mlp.experts.down_proj")
    'model.layers.3.'
    """
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1]) + "."


def to_files(policy: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of `policy` as `save_pretrained` writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(policy, weights))  # type: ignore[arg-type]
    except Exception as error:  # a conversion fails in its own way
        raise UsageError(
            f"--engine vllm: the weights of {type(policy).__name__} cannot be converted to those of its files "
            f"({type(error).__name__}: {first_line(error)}); pass --engine hf"
        ) from error
