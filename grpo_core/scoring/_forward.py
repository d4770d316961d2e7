"""The call of the model, which all scoring functions share."""

import inspect
from typing import Any

from torch import Tensor, nn


def compute_logits_at(model: nn.Module, input_ids: Tensor, columns: Tensor | None, **inputs: Tensor) -> Tensor:
    """Return the logits of `model` at these columns of the sequence, in the given order; None means all columns.

    A Hugging Face model applies its output layer at these columns only (`logits_to_keep`). Other models compute all
    columns, from which these are selected. Columns may repeat.
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
