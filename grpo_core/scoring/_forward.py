"""The one place that calls a model."""

import inspect
from typing import Any

from torch import Tensor, nn


def logits_at(model: nn.Module, input_ids: Tensor, columns: Tensor | None, **inputs: Tensor) -> Tensor:
    """Logits of `model` at `columns` of the sequence (all where None), in that order, repeats included.

    A Hugging Face model skips its output layer at all other columns (`logits_to_keep`); any other model computes every
    column, and those that were asked for are selected.
    """
    keywords: dict[str, Any] = dict(inputs)
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        keywords["use_cache"] = False
    skips_columns = columns is not None and "logits_to_keep" in parameters
    if skips_columns:
        keywords["logits_to_keep"] = columns
    logits: Tensor = model(input_ids, **keywords).logits
    return logits if columns is None or skips_columns else logits[:, columns]
