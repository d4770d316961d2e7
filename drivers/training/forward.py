"""Compute log-probs and entropies of response tokens in forward passes of the policy."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from drivers.common import distributed
from drivers.engines.protocol import Completion
from drivers.policy import fsdp
from drivers.settings.algorithm import AlgorithmSettings
from drivers.training.batch import RolloutBatch
from drivers.training.micro_batches import Row, plan_micro_batches, plan_rows
from drivers.training.shortcuts import Head, find_head, model_inputs, packs_rows, without_padding
from grpo_core import (
    compute_collision_probs,
    compute_entropy,
    fused_linear_log_probs,
    pack_group_rows,
    select_log_probs,
)


def forward(
    policy: nn.Module,
    rollouts: RolloutBatch,
    temperature: float,
    rows: list[Row] | None = None,
    *,
    with_entropy: bool = False,
    detach_entropy: bool = True,
    with_collisions: bool = False,
) -> dict[str, Tensor]:
    """Return `log_probs` of each sampled token under `policy`, and on request more, from one forward pass.

    That is `token_entropy`, and the detached `collision_probs` of each token's distribution. All are Float "batch seq"
    and 0 where no token was sampled: after the end of a response, and at what a conversation inserts. `rows` are those
    of a `MicroBatch`; by default they are planned here.
    """
    if rows is None:
        rows = plan_rows(policy, rollouts, range(len(rollouts)))
    shape, device = rollouts.response_mask.shape, next(policy.parameters()).device
    if not rows:
        names = _list_outputs(with_entropy, with_collisions)
        return {name: torch.zeros(shape, device=device) for name in names}
    head = find_head(policy)  # before the pass, because its trial is a forward pass too
    outputs = fsdp.with_unsharded_params(
        policy,
        lambda: _forward_rows(
            policy, head, rollouts, rows, temperature, with_entropy, detach_entropy, with_collisions
        ),
    )
    places = flat_token_index(rows, rollouts.completions, shape[1])
    index = torch.tensor(places, dtype=torch.long).to(device, non_blocking=True)
    flat = {name: values.new_zeros(shape.numel()).index_copy(0, index, values) for name, values in outputs.items()}
    return {name: rearrange(x, "(response token) -> response token", token=shape[1]) for name, x in flat.items()}


def _list_outputs(with_entropy: bool, with_collisions: bool) -> list[str]:
    return ["log_probs", *["token_entropy"] * with_entropy, *["collision_probs"] * with_collisions]


def flat_token_index(rows: Sequence[Row], completions: Sequence[Completion], width: int) -> list[int]:
    """Return the place of each sampled token of `rows`, row after row, in a flattened batch of `width` columns."""
    return [
        member * width + token
        for row in rows
        for member in row.members
        for token, is_sampled in enumerate(completions[member].is_sampled)
        if is_sampled
    ]


def _forward_rows(
    policy: Any,
    head: Head | None,
    rollouts: RolloutBatch,
    rows: list[Row],
    temperature: float,
    with_entropy: bool,
    detach_entropy: bool,
    with_collisions: bool,
) -> dict[str, Tensor]:
    """Run the forward pass for the sampled tokens, row after row. Nothing is copied back to the host."""
    responses = [[rollouts.completions[member].token_ids for member in row.members] for row in rows]
    packed = pack_group_rows([row.prompt for row in rows], responses)
    if packs_rows(policy):
        packed = without_padding(packed)
    device = next(policy.parameters()).device
    completions = [rollouts.completions[member] for row in rows for member in row.members]
    packed, drawn_from = only_sampled(packed, token_sets(completions), completions)
    sets: dict[str, Any] = {name: ids.to(device, non_blocking=True) for name, ids in drawn_from.items()}
    inputs = model_inputs(policy, packed, shared=any(len(row.members) > 1 for row in rows), device=device)
    labels = packed["labels"].to(device, non_blocking=True)
    if head is None:  # the architecture gives only logits
        logits = _compute_logits(policy, inputs, packed["sources"])
        outputs = {"log_probs": select_log_probs(logits, labels, temperature=temperature, **sets)}
        if with_entropy:
            source = logits.detach() if detach_entropy else logits
            outputs["token_entropy"] = compute_entropy(source, temperature=temperature, **sets)
        if with_collisions:
            sharpened = select_log_probs(logits, labels, temperature=temperature / 2, **sets)
            outputs["collision_probs"] = compute_collision_probs(outputs["log_probs"], sharpened)
        return outputs
    states = rearrange(head.body(**inputs).last_hidden_state, "row column hidden -> (row column) hidden")
    apply_head = partial(  # it keeps logits only if they are small: the default of its max_logits_bytes
        fused_linear_log_probs,
        states.index_select(0, packed["sources"].to(device, non_blocking=True)),
        head.output.weight,
        labels,
        bias=head.output.bias,
        logit_softcap=head.softcap,
        **sets,
    )
    outputs = apply_head(temperature=temperature, return_entropy=with_entropy)
    if with_collisions:
        sharpened = apply_head(temperature=temperature / 2, return_entropy=False)["log_probs"]
        outputs["collision_probs"] = compute_collision_probs(outputs["log_probs"], sharpened)
    return outputs | ({"token_entropy": outputs["token_entropy"].detach()} if with_entropy and detach_entropy else {})


def only_sampled(
    packed: dict[str, Tensor], sets: dict[str, Tensor], completions: Sequence[Completion]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs without the inserted tokens of conversations; these stay in the context of the others."""
    if not any(completion.sampled for completion in completions):
        return packed, sets
    flags = torch.tensor([flag for completion in completions for flag in completion.is_sampled])
    sampled = {name: packed[name][flags] for name in ("sources", "labels")}
    return packed | sampled, {name: ids[flags] for name, ids in sets.items()}


def token_sets(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Return `kept_ids` and `excluded_ids` of the tokens of all completions, one row each, where they are replayed."""
    sets: dict[str, Tensor] = {}
    kept = [completion.kept for completion in completions if completion.kept is not None]
    if kept:
        width = max(max(one.counts, default=0) for one in kept)
        sets["kept_ids"] = torch.cat([one.to_tensor(width) for one in kept])
    width = max((len(ids) for completion in completions for ids in completion.excluded), default=0)
    if width:
        rows = [
            [*ids, *[-1] * (width - len(ids))]
            for one in completions
            for ids in [*one.excluded, *[()] * (len(one.token_ids) - len(one.excluded))]
        ]
        sets["excluded_ids"] = torch.tensor(rows)
    return sets


def _compute_logits(policy: nn.Module, inputs: dict[str, Any], sources: Tensor) -> Tensor:
    """Return the logits at the positions `sources`. Columns that no position needs are skipped if the model can."""
    device, width = inputs["input_ids"].device, inputs["input_ids"].shape[1]
    rows, columns = sources // width, sources % width
    if "logits_to_keep" in inspect.signature(policy.forward).parameters:
        needed, columns = columns.unique(return_inverse=True)
        inputs, width = inputs | {"logits_to_keep": needed.to(device, non_blocking=True)}, len(needed)
    places = (rows * width + columns).to(device, non_blocking=True)
    logits: Tensor = rearrange(policy(**inputs).logits, "row column vocab -> (row column) vocab")
    return logits.index_select(0, places)


@torch.no_grad()
def forward_all(
    policy: nn.Module,
    rollouts: RolloutBatch,
    config: AlgorithmSettings,
    *,
    with_entropy: bool = False,
    with_collisions: bool = False,
) -> dict[str, Tensor]:
    """Return `forward` of a whole rollout batch in host memory, computed in micro-batches, like those of training."""
    requested = {"with_entropy": with_entropy, "with_collisions": with_collisions}
    whole = {name: torch.zeros(rollouts.response_mask.shape) for name in _list_outputs(**requested)}
    parts = list(plan_micro_batches(config, policy, rollouts, range(len(rollouts))))
    for (members, rows), is_counted in distributed.shard_across_ranks(parts):
        part = forward(policy, rollouts.select(members), config.sampling_temperature, rows, **requested)
        for name, values in part.items() if is_counted else ():
            whole[name][members, : values.shape[1]] = values.to("cpu", torch.float32)
    return {name: distributed.all_reduce_sum_(values) for name, values in whole.items()}
