"""Faster forward passes, for models that keep their own logits: those that are known to, or that pass a trial."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy import fsdp
from grpo_core import mask_group_rows, pack_group_rows

ARCHITECTURES_THAT_SHARE = frozenset({
    "apertus", "arcee", "cohere", "deepseek_v3", "ernie4_5", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_neox",
    "gptj", "granite", "helium", "hunyuan_v1_dense", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2",
    "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
})  # fmt: skip
"""`model_type` of the architectures for which tests/drivers/test_architectures.py compares shared rows with one long
forward pass per response. A trial at the start of a run could not see what acts only at some distance."""
WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
"""Names that configurations have for the longest distance of attention."""
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone. Others also depend on the length of the row."""
LARGE_LOGIT = 50.0
"""Largest logit in the trial of the head. A trained model has some of this size, a random one does not."""

_SHARING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shares_rows(policy: nn.Module) -> bool:
    """Return whether responses can share a prompt in one row, each scored as if it were alone."""
    if packs_rows(policy):
        return False
    if policy not in _SHARING:
        _SHARING[policy] = not sharing_obstacle(policy) and trial_holds(_sharing_holds, policy)
    return _SHARING[policy]


def sharing_obstacle(policy: Any) -> str:
    """Return what keeps responses from sharing a row, or an empty text. A shared row needs its own mask.

    The mask replaces a sliding window or a chunk, and hides nothing from a recurrent state. ALiBi counts columns, not
    positions.
    """
    config, attention = policy.config, policy.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        return f"{attention} attention takes no mask"
    if config.model_type not in ARCHITECTURES_THAT_SHARE:
        return f"the architecture {config.model_type} is not among those that were verified"
    windows = [name for name in WINDOWS if getattr(config, name, None)]  # None or 0: no window
    if windows:
        return f"its attention is limited by the {windows[0]} of {getattr(config, windows[0])} in its configuration"
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return "" if rotary in ROTARY_TYPES else f"its rotary embedding ({rotary}) depends on the length of a row"


def _sharing_holds(policy: Any) -> bool:
    """Return whether this model takes the mask: in a short row, each response has the logits that it has alone."""
    size = policy.get_input_embeddings().num_embeddings
    prompt, responses = [1 % size, 2 % size, 3 % size], [[4 % size, 5 % size], [3 % size, 1 % size, 2 % size]]
    device = policy.get_input_embeddings().weight.device
    logits = []
    for rows in ([responses], [[response] for response in responses]):
        packed = pack_group_rows([prompt] * len(rows), rows)
        inputs = model_inputs(policy, packed, shared=len(rows) == 1, device=device)
        logits.append(policy(**inputs).logits.flatten(0, 1)[packed["sources"].to(device)].float())
    return _are_equal(*logits, rounding=8 * torch.finfo(fsdp.computing_dtype(policy)).eps)


class Head(NamedTuple):
    """A model in two parts: a body, and an output layer that is a matrix product."""

    body: nn.Module
    output: nn.Linear
    softcap: float | None


_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(policy: nn.Module) -> Head | None:
    """Return the body and the output layer if they give the model's own logits; None if the model does more."""
    if policy not in _HEADS:
        _HEADS[policy] = _split(policy) if trial_holds(_head_holds, policy) else None
    return _HEADS[policy]


def _split(policy: Any) -> Head:
    output, body = policy.get_output_embeddings(), policy.base_model
    if not isinstance(output, nn.Linear) or body is policy:
        raise NotImplementedError("the model has no separate output layer")
    return Head(body, output, getattr(policy.config, "final_logit_softcapping", None))


def _head_holds(policy: Any) -> bool:
    """Return whether body, output layer and soft cap are all that the model does.

    In one forward pass of the model, its output layer must get exactly what the body returns. It returns float32
    logits of the size of a trained model's, in which the end of the pass would show any other scale or cap.
    """
    head = _split(policy)
    ids = torch.arange(1, 6, device=head.output.weight.device)[None] % len(head.output.weight)
    seen: dict[str, Tensor] = {}

    def keep_states(_: nn.Module, inputs: Any, output: Any) -> None:
        seen["body"] = output.last_hidden_state

    def enlarge(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen["input"], seen["product"] = inputs[0], output
        seen["large"] = output.float() * (LARGE_LOGIT / output.float().abs().max())
        return seen["large"]

    hooks = [head.body.register_forward_hook(keep_states), head.output.register_forward_hook(enlarge)]
    try:
        logits = policy(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    states, large = head.body(input_ids=ids, use_cache=False).last_hidden_state, seen["large"]
    if head.softcap is not None:
        large = torch.tanh(large / head.softcap) * head.softcap
    product = nn.functional.linear(seen["input"], head.output.weight, head.output.bias)
    rounding = 8 * torch.finfo(product.dtype).eps
    return (
        torch.equal(seen["input"], seen.get("body", states))  # OPT calls a part of its body, so no hook sees it
        and _are_equal(states, seen["input"], rounding=rounding)
        and _are_equal(product, seen["product"], rounding=rounding)
        and _are_equal(large, logits, rounding=8 * torch.finfo(torch.float32).eps)
    )


def _are_equal(found: Tensor, expected: Tensor, *, rounding: float) -> bool:
    """Return whether two tensors differ by at most `rounding`, relative to the largest entry."""
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= rounding * expected.abs().max())


@torch.no_grad()
def trial_holds(trial: Callable[[nn.Module], bool], policy: nn.Module) -> bool:
    """Return the result of a trial on all ranks; False if it fails.

    A model may lack a body, an output layer or a kind of mask, and fail with any exception. The plain forward pass
    works for every model, and reports any other problem with it.
    """
    try:
        holds = fsdp.with_unsharded_params(policy, lambda: trial(policy))
    except Exception:  # the docstring says why
        holds = False
    return all(distributed.gather(holds))  # a rank whose trial fails gathers too, because the others wait for it


def describe_shortcuts(policy: nn.Module) -> list[str]:
    """Return a line for each shortcut that this model does not take: its training is slower."""
    lines = []
    if not packs_rows(policy) and not shares_rows(policy):
        reason = sharing_obstacle(policy) or "a trial with a mask gives other logits"
        lines.append(f"note: each response gets a row to itself, because {reason}")
    if find_head(policy) is None:
        lines.append("note: all logits are computed, because the model does more than multiply by its output layer")
    return lines


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
