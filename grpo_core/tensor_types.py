"""Types of tensors that the signatures of several functions share."""

from jaxtyping import Float
from torch import Tensor

Advantages = Float[Tensor, "batch #seq"]
"""One column, constant over the tokens of a response, or one value per token."""

Metadata = dict[str, Tensor]
"""Named, detached tensors returned beside a result; each function documents its keys."""
