"""Shard a policy over ranks with FSDP2."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_map_only

from drivers.common.distributed import T, size


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered on every rank, or any other tensor unchanged."""
    if not isinstance(tensor, torch.distributed.tensor.DTensor):
        return tensor
    return _gather_on_default_stream(tensor) if tensor.device.type == "cuda" else tensor.full_tensor()


def _gather_on_default_stream(tensor: Any) -> Tensor:
    """Gather on the stream that all ranks gather on, and finish before the caller goes on.

    vLLM's sender reads weights on its own streams, between broadcasts of another communicator. Gathers there and
    broadcasts could wait for each other, because ranks other than 0 gather on their default stream.
    """
    caller, default = torch.cuda.current_stream(tensor.device), torch.cuda.default_stream(tensor.device)
    default.wait_stream(caller)
    with torch.cuda.stream(default):
        full: Tensor = tensor.full_tensor()
    default.synchronize()
    full.record_stream(caller)  # or its memory would go to the next gather while the sender packs it
    return full


def local_shard(tensor: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Return this rank's part of a tensor, and where it begins in each dimension."""
    if not isinstance(tensor, torch.distributed.tensor.DTensor):
        return tensor, [0] * tensor.ndim
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offsets


def shard(policy: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Keep this rank's shard of the weights, in float32 on `device`; forward passes gather the layers in `dtype`."""
    if size() == 1:
        return policy
    mesh = init_device_mesh(device.type, (size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layers = set(getattr(policy, "_no_split_modules", None) or ())
    for module in [module for module in policy.modules() if type(module).__name__ in layers]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.float()  # after sharding: no rank ever holds the whole model in float32
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    policy.call_within = lambda call: call()  # type: ignore[assignment]
    register_fsdp_forward_method(policy, "call_within")
    return policy


def with_unsharded_params(policy: Any, call: Callable[[], T]) -> T:
    """Return `call()`, run with the FSDP root parameters unsharded, as in the module's own forward."""
    if not isinstance(policy, FSDPModule):
        return call()
    call_unsharded: Callable[[Callable[[], T]], T] = policy.call_within  # type: ignore[attr-defined]
    # FSDP hooks the outputs to gather the weights again for the backward pass, and warns about views.
    result = call_unsharded(lambda: tree_map_only(Tensor, lambda out: out.clone() if out._is_view() else out, call()))
    if not torch.is_grad_enabled():  # the backward pass would reshard
        policy.reshard()
    return result


def resharded(policy: nn.Module) -> nn.Module:
    """Return `policy` after making its parameters the shards again, whichever pass ran last."""
    if isinstance(policy, FSDPModule):
        policy.reshard()
    return policy


def computing_dtype(policy: Any) -> torch.dtype:
    """Return the dtype of the forward pass; sharded weights are kept in float32."""
    with torch.no_grad():
        dtype: torch.dtype = with_unsharded_params(
            policy, lambda: next(policy.get_input_embeddings().parameters()).dtype
        )
    return dtype
