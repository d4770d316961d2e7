"""A reference model that follows the policy."""

import torch
from torch import nn

from drivers.policy import fsdp


@torch.no_grad()
def mix_into_reference(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """Move each weight of the reference by `share` of its distance to the policy's; 1 makes it the policy's."""
    pairs = zip(fsdp.resharded(reference).parameters(), fsdp.resharded(policy).parameters(), strict=True)
    for old, new in pairs:
        old.lerp_(new.detach().to(old.dtype), share)
