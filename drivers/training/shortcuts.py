"""Faster forward passes. Each is used only if a trial shows that it gives the model's own logits."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy import fsdp
from grpo_core import mask_group_rows, pack_group_rows

_SHARING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shares_rows(policy: nn.Module) -> bool:
    """Return whether responses can share a prompt in one row: in a trial, each is scored as if it were alone.

    It is not possible with flash attention, which accepts no mask, or if the model has a recurrent state or a sliding
    window.
    """
    if packs_rows(policy):
        return False
    if policy not in _SHARING:
        _SHARING[policy] = shortcut_matches_model(_sharing_error, policy)
    return _SHARING[policy]


def _sharing_error(policy: Any) -> Tensor:
    config = policy.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None or not getattr(config, "num_attention_heads", None):
        raise NotImplementedError("a custom mask replaces the sliding window, or there is no attention")
    size = policy.get_input_embeddings().num_embeddings
    prompt, responses = [1 % size, 2 % size, 3 % size], [[4 % size, 5 % size], [3 % size, 1 % size, 2 % size]]
    device = policy.get_input_embeddings().weight.device
    logits = []
    for rows in ([responses], [[response] for response in responses]):
        packed = pack_group_rows([prompt] * len(rows), rows)
        inputs = model_inputs(policy, packed, shared=len(rows) == 1, device=device)
        logits.append(policy(**inputs).logits.flatten(0, 1)[packed["sources"].to(device)].float())
    return _relative_error(*logits)


class Head(NamedTuple):
    """A model in two parts: a body, and an output layer that is a matrix product."""

    body: nn.Module
    output: nn.Linear
    softcap: float | None


_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(policy: nn.Module) -> Head | None:
    """Return the body and the output layer if they give the model's own logits; None if the model does more."""
    if policy not in _HEADS:
        _HEADS[policy] = _split(policy) if shortcut_matches_model(_head_error, policy) else None
    return _HEADS[policy]


def _split(policy: Any) -> Head:
    output, body = policy.get_output_embeddings(), policy.base_model
    if not isinstance(output, nn.Linear) or body is policy:
        raise NotImplementedError("the model has no separate output layer")
    return Head(body, output, getattr(policy.config, "final_logit_softcapping", None))


def _head_error(policy: Any) -> Tensor:
    head = _split(policy)
    weight, bias = head.output.weight, head.output.bias
    ids = torch.arange(1, 6, device=weight.device)[None] % len(weight)
    expected = policy(input_ids=ids, use_cache=False).logits.float()
    found = nn.functional.linear(head.body(input_ids=ids, use_cache=False).last_hidden_state, weight, bias)
    if head.softcap is not None:
        found = torch.tanh(found / head.softcap) * head.softcap
    return _relative_error(found.float(), expected)


def _relative_error(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs().max() / expected.abs().max()


@torch.no_grad()
def shortcut_matches_model(error_of: Callable[[nn.Module], Tensor], policy: nn.Module) -> bool:
    """Return whether a shortcut gives the model's own values up to rounding; False if its trial fails.

    A model may lack a body, an output layer or a kind of mask, and fail with any exception. The plain forward pass
    works for every model, and reports any other problem with it.
    """
    rounding = 8 * torch.finfo(fsdp.computing_dtype(policy)).eps
    try:
        holds = bool(fsdp.with_unsharded_params(policy, lambda: error_of(policy)) <= rounding)
    except Exception:  # the docstring says why
        holds = False
    return all(distributed.gather(holds))  # a rank whose trial fails gathers too, because the others wait for it


def model_inputs(policy: Any, packed: dict[str, Tensor], *, shared: bool, device: torch.device) -> dict[str, Any]:
    """Return the arguments of the model's forward pass, on its device."""
    ids, positions, segments = (
        packed[name].to(device, non_blocking=True) for name in ("input_ids", "position_ids", "segments")
    )
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if packs_rows(policy):
        inputs["position_ids"] = positions
    elif shared:  # otherwise the causal mask is enough
        visible, dtype = mask_group_rows(segments)[:, None], policy.get_input_embeddings().weight.dtype
        hidden = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        inputs |= {"attention_mask": hidden, "position_ids": positions}
    return inputs


def without_padding(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `packed` with all rows in one, without padding."""
    real = packed["segments"].flatten() >= 0
    place = real.cumsum(0) - 1
    rows = {name: packed[name].flatten()[real][None] for name in ("input_ids", "position_ids", "segments")}
    return packed | rows | {"sources": place[packed["sources"]]}


def packs_rows(policy: Any) -> bool:
    """Return whether rows are concatenated into one sequence without padding.

    Flash attention separates them by their positions. It accepts no mask, so each response then has its own row.
    """
    return str(policy.config._attn_implementation).startswith("flash")
