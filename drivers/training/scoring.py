"""Log-probs of rollouts: how responses become rows of a forward pass, and the head that scores them.

A *row* is a prompt with the responses that share it. What is cheaper by the count of operations is chosen: one row for
a group, or one for each response.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from drivers.common import distributed
from drivers.policy import fsdp
from drivers.settings.algorithm import AlgorithmSettings
from drivers.training.batch import RolloutBatch
from drivers.training.micro_batches import Row, plan_micro_batches, plan_rows
from drivers.training.shortcuts import Head, find_head, model_inputs, packs_rows, without_padding
from grpo_core import compute_entropy, fused_linear_log_probs, pack_group_rows, select_log_probs

MAX_LOGITS_BYTES = 1 << 29
"""Of one pass, kept for its gradient; where there are more, the head makes them a block at a time."""


def score(
    policy: nn.Module,
    rollouts: RolloutBatch,
    temperature: float,
    rows: list[Row] | None = None,
    *,
    with_entropy: bool = False,
    detach_entropy: bool = True,
) -> dict[str, Tensor]:
    """`log_probs` of each response token under `policy`, and on request their `token_entropy`, from one forward pass.

    Both are Float "batch seq", 0 past the end of a response. `rows` are those of a `MicroBatch`; None plans them here.
    """
    if rows is None:
        rows = plan_rows(policy, rollouts, range(len(rollouts)))
    options = {"temperature": temperature, "with_entropy": with_entropy, "detach_entropy": detach_entropy}
    width, device = rollouts.response_mask.shape[1], next(policy.parameters()).device
    if not rows:
        names = ("log_probs", "token_entropy") if with_entropy else ("log_probs",)
        return {name: torch.zeros(len(rollouts), width, device=device) for name in names}
    places = [
        i * width + t for row in rows for i in row.members for t in range(len(rollouts.completions[i].token_ids))
    ]
    head = find_head(policy)  # its trial is a pass of its own
    scored = fsdp.with_unsharded_params(policy, lambda: _score_rows(policy, head, rollouts, rows, options))
    index = torch.tensor(places, dtype=torch.long).to(device, non_blocking=True)
    return {
        name: values.new_zeros(len(rollouts) * width).index_copy(0, index, values).view(len(rollouts), width)
        for name, values in scored.items()
    }


def _score_rows(
    policy: Any, head: Head | None, rollouts: RolloutBatch, rows: list[Row], options: dict[str, Any]
) -> dict[str, Tensor]:
    """Of the response tokens, row after row. All that is planned on the host goes to the device, and nothing back."""
    responses = [[rollouts.completions[i].token_ids for i in row.members] for row in rows]
    packed = pack_group_rows([row.prompt for row in rows], responses)
    if packs_rows(policy):
        packed = without_padding(packed)
    device = next(policy.parameters()).device
    inputs = model_inputs(policy, packed, shared=any(len(row.members) > 1 for row in rows), device=device)
    sources, labels = packed["sources"], packed["labels"].to(device, non_blocking=True)
    if head is None:
        logits = _logits(policy, inputs, sources)
        scored = {"log_probs": select_log_probs(logits, labels, temperature=options["temperature"])}
        if options["with_entropy"]:
            watched = logits.detach() if options["detach_entropy"] else logits
            scored["token_entropy"] = compute_entropy(watched, temperature=options["temperature"])
        return scored
    states = head.body(**inputs).last_hidden_state.flatten(0, 1)
    scored = fused_linear_log_probs(
        states.index_select(0, sources.to(device, non_blocking=True)),
        head.output.weight,
        labels,
        bias=head.output.bias,
        temperature=options["temperature"],
        logit_softcap=head.softcap,
        return_entropy=options["with_entropy"],
        max_logits_bytes=MAX_LOGITS_BYTES,
    )
    return {
        name: value.detach() if name == "token_entropy" and options["detach_entropy"] else value
        for name, value in scored.items()
    }


def _logits(policy: nn.Module, inputs: dict[str, Any], sources: Tensor) -> Tensor:
    """Those at `sources`, where the output layer is more than a product: of no column that none of them needs."""
    device, width = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    rows, columns = sources // width, sources % width
    if "logits_to_keep" in inspect.signature(policy.forward).parameters:
        needed, columns = columns.unique(return_inverse=True)
        inputs, width = inputs | {"logits_to_keep": needed.to(device, non_blocking=True)}, len(needed)
    places = (rows * width + columns).to(device, non_blocking=True)
    logits: Tensor = policy(**inputs).logits.flatten(0, 1)
    return logits.index_select(0, places)


@torch.no_grad()
def score_all(
    policy: nn.Module, rollouts: RolloutBatch, config: AlgorithmSettings, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """`score` of a whole rollout batch in parts, in the precision and the mode of training; in host memory."""
    names = ("log_probs", "token_entropy") if with_entropy else ("log_probs",)
    whole = {name: torch.zeros(rollouts.response_mask.shape) for name in names}
    parts = list(plan_micro_batches(config, policy, rollouts, range(len(rollouts))))
    for (members, rows), counts in distributed.shard_across_ranks(parts):
        part = score(policy, rollouts.select(members), config.sampling_temperature, rows, with_entropy=with_entropy)
        for name, values in part.items() if counts else ():
            whole[name][members, : values.shape[1]] = values.to("cpu", torch.float32)
    return {name: distributed.all_reduce_sum_(values) for name, values in whole.items()}
