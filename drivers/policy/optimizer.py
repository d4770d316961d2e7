"""AdamW on float32 master weights, in whichever dtype the policy computes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy import fsdp
from drivers.settings.groups import OptimizerSettings

LOSS_SCALE_GROWTH_INTERVAL = 400
"""Optimizer steps without overflow after which the loss scale doubles, as in verl. torch's 2000 are more than most
runs have, so that one early overflow would cost a bit of the small gradients for the rest of the run."""


def training_state_bytes(policy: nn.Module) -> int:
    """Return the bytes per rank of the weights and, if trained, their masters, gradients and AdamW moments."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    trained = sum(p.numel() * (16 if p.dtype != torch.float32 else 12) for p in policy.parameters() if p.requires_grad)
    return (weights + trained) // distributed.size()


class PolicyOptimizer:
    """AdamW for `policy`. Each step gets its learning rate, so a schedule has no state.

    A float32 policy is updated in place. A bfloat16 policy would lose most updates to rounding: at a rate of 1e-5 they
    are below half a unit in the last place of nearly every weight. Its gradients would lose small terms in the sum
    over micro-batches. So masters and gradients are kept in float32, and each update is copied to the policy.

    In float16 the backward pass would lose gradients below 6e-8. With `scales_loss`, torch's GradScaler multiplies the
    loss, and halves its scale when a gradient overflows, which `clip_gradient` shows on all ranks.
    """

    def __init__(self, policy: nn.Module, settings: OptimizerSettings, *, scales_loss: bool = False) -> None:
        named = {name: p for name, p in fsdp.resharded(policy).named_parameters() if p.requires_grad}
        self._names, self._parameters = list(named), list(named.values())
        self.n_updates = 0
        self._masters = [self._make_master(p) for p in self._parameters]
        self._adamw = torch.optim.AdamW(
            self._masters,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        device = self._masters[0].device
        self._scaler = torch.amp.GradScaler(
            device.type, growth_interval=LOSS_SCALE_GROWTH_INTERVAL, enabled=scales_loss
        )
        self._scaler.scale(torch.zeros((), device=device))  # makes the scale, on this device

    def _make_master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(parameter.detach().float())

        def move_gradient(p: Tensor) -> None:
            assert master.grad is not None  # the constructor made it
            assert p.grad is not None  # torch calls this hook after it has set the gradient
            master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(move_gradient)  # type: ignore[no-untyped-call]
        return master

    @property
    def scales_loss(self) -> bool:
        """Return whether the loss is scaled."""
        return self._scaler.is_enabled()

    @property
    def loss_scale(self) -> float:
        """Factor of the losses whose gradients are accumulated; 1 if they are not scaled."""
        return self._scaler.get_scale()

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale and the number of steps since it changed; empty if the loss is not scaled."""
        return self._scaler.state_dict()

    def clip_gradient(self, max_grad_norm: float) -> Tensor:
        """Undo the loss scale, reduce the gradient to a norm of at most `max_grad_norm`, and return the norm before.

        It must be called once before `step` or `skip` if the loss is scaled.
        """
        self._scaler.unscale_(self._adamw)
        return fsdp.full_tensor(nn.utils.clip_grad_norm_(self._masters, max_grad_norm))

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the weights and set the gradient to zero."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.n_updates += 1
        self._copy_to_policy()
        self.skip()

    def skip(self) -> None:
        """Set the gradient to zero without an update; it is not None, because a batch may have no gradient."""
        self._adamw.zero_grad(set_to_none=False)
        if self.scales_loss:
            self._scaler.update()

    @torch.no_grad()
    def _copy_to_policy(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        """Return the master weights and both moments, in float32; before the first update the moments are zero."""
        tensors = {}
        for name, master in zip(self._names, self._masters, strict=True):
            moments = self._adamw.state[master]
            if not moments:
                moments |= {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                moments["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            tensors[f"weight.{name}"] = master.detach()
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors

    def finish_loading(self, n_updates: int, scaler_state: Mapping[str, float]) -> None:
        """Refresh derived state after `tensors()` was overwritten from a checkpoint with `n_updates` updates.

        An empty `scaler_state`, of a run in another dtype, keeps the loss scale of a new run.
        """
        self.n_updates = n_updates
        if scaler_state:
            self._scaler.load_state_dict(dict(scaler_state))
        for master in self._masters:
            self._adamw.state[master]["step"].fill_(n_updates)
        self._copy_to_policy()
