"""A soft clip: beyond 1 +- cliprange, the gradient fades with the distance instead of dropping to zero."""

import torch

SOFTNESS = 0.1


def soft_clip_loss(advantages, policy_log_probs, old_log_probs, response_mask, cliprange):
    """Return -A rho exp(-max(0, |rho - 1| - cliprange) / SOFTNESS) for each token."""
    log_ratio = torch.where(response_mask, policy_log_probs - old_log_probs.detach(), 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()
    distance = torch.relu((ratio.detach() - 1).abs() - cliprange)
    return torch.where(response_mask, -advantages.detach() * ratio * torch.exp(-distance / SOFTNESS), 0.0)
