"""Log-probs of rollouts: how responses become rows of a forward pass, and the head that scores them.

A *row* is a prompt with the responses that share it. What is cheaper by the count of operations is chosen: one row for
a group, or one for each response.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from math import inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drivers.batch import RolloutBatch
from drivers.config import GrpoConfig
from grpo_core import (
    compute_entropy,
    fused_linear_log_probs,
    mask_group_rows,
    pack_group_rows,
    select_log_probs,
)


class Row(NamedTuple):
    """Responses to one prompt, scored side by side; `members` are their places in the batch."""

    prompt: tuple[int, ...]
    members: tuple[int, ...]
    tokens: int
    """How long it is."""


def packs_rows(policy: Any) -> bool:
    """Whether rows stand one after the other in one sequence without padding.

    Flash attention keeps them apart by their positions; it takes no mask, so each response is a row of its own there.
    """
    return str(policy.config._attn_implementation).startswith("flash")


def plan_rows(policy: Any, rollouts: RolloutBatch, wanted: Sequence[int], max_tokens: float = inf) -> list[Row]:
    """Each of these responses in one row, in order; those without tokens are left out."""
    rows: list[Row] = []
    share = inf if packs_rows(policy) else attention_share(policy)
    for _, run in groupby(wanted, key=lambda i: rollouts.completions[i].prompt_token_ids):
        members = [i for i in run if rollouts.completions[i].token_ids]
        while members:
            prompt = rollouts.completions[members[0]].prompt_token_ids
            lengths = [len(rollouts.completions[i].token_ids) for i in members]
            count = max(1, sum(len(prompt) + length <= max_tokens for length in accumulate(lengths)))
            rows += _one_row_or_many(prompt, members[:count], lengths[:count], share)
            members = members[count:]
    return rows


def _one_row_or_many(
    prompt: tuple[int, ...], members: list[int], lengths: list[int], attention_share: float
) -> list[Row]:
    """What takes fewer operations.

    `attention_share` is the cost of attention to one token, by the cost of all else that a token takes.
    """
    together = len(prompt) + sum(lengths)
    # Under a mask of its own attention computes the half that it hides; the causal mask of a plain row skips it.
    one_row = together * (1 + attention_share * together)
    many = sum((len(prompt) + n) * (1 + attention_share * (len(prompt) + n) / 2) for n in lengths)
    if len(members) > 1 and one_row < many:
        return [Row(prompt, tuple(members), together)]
    return [Row(prompt, (i,), len(prompt) + n) for i, n in zip(members, lengths, strict=True)]


def plan_micro_batches(
    config: GrpoConfig, policy: nn.Module, rollouts: RolloutBatch, wanted: Sequence[int]
) -> Iterator[list[int]]:
    """Which responses are scored in one pass: the wanted ones that have tokens, each once.

    With `micro_batch_tokens`, rows of like length, as many as fit with their padding (a response that does not stands
    alone); else those of each `micro_train_batch_size` responses of the batch.
    """
    wanted = [i for i in wanted if rollouts.completions[i].token_ids]
    if config.micro_batch_tokens is None:
        for _, members in groupby(wanted, key=lambda i: i // config.micro_train_batch_size):
            yield list(members)
        return
    rows = plan_rows(policy, rollouts, wanted, config.micro_batch_tokens)
    rows.sort(key=lambda row: (-row.tokens, row.members))
    packed = packs_rows(policy)
    while rows:
        # Padded, each row is as long as the first; packed, as long as it is.
        sizes = accumulate(row.tokens if packed else rows[0].tokens for row in rows)
        count = max(1, sum(size <= config.micro_batch_tokens for size in sizes))
        yield [i for row in rows[:count] for i in row.members]
        rows = rows[count:]


def attention_share(policy: Any) -> float:
    """What attention to one more token costs, by the cost of everything else that is done for a token."""
    config = policy.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    embedded = policy.get_input_embeddings().weight.numel()
    others = sum(p.numel() for p in policy.base_model.parameters()) - embedded
    # Two products, queries with keys and weights with values, against one with each weight of the model.
    return float(2 * width * config.num_hidden_layers / max(1, others))


class Head(NamedTuple):
    """A model in two parts, of which the second is a matrix product."""

    body: nn.Module
    output: nn.Linear
    softcap: float | None


_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(policy: nn.Module) -> Head | None:
    """Body and output layer, if together they give the logits of the model itself; None if there is more to them."""
    if policy not in _HEADS:
        _HEADS[policy] = _proven_head(policy)
    return _HEADS[policy]


@torch.no_grad()
def _proven_head(policy: Any) -> Head | None:
    try:
        output, body = policy.get_output_embeddings(), policy.base_model
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(output, nn.Linear) or body is policy:
        return None
    head = Head(body, output, getattr(policy.config, "final_logit_softcapping", None))
    ids = torch.arange(1, 6, device=output.weight.device)[None] % len(output.weight)
    expected = policy(input_ids=ids, use_cache=False).logits.float()
    found = nn.functional.linear(body(input_ids=ids, use_cache=False).last_hidden_state, output.weight, output.bias)
    if head.softcap is not None:
        found = torch.tanh(found / head.softcap) * head.softcap
    error = (found.float() - expected).abs().max()
    return head if error <= 4 * torch.finfo(output.weight.dtype).eps * expected.abs().max() else None


def score(
    policy: nn.Module,
    rollouts: RolloutBatch,
    temperature: float,
    *,
    with_entropy: bool = False,
    detach_entropy: bool = True,
) -> dict[str, Tensor]:
    """`log_probs` of each response token under `policy`, and on request their `token_entropy`, from one forward pass.

    Both are Float "batch seq", 0 past the end of a response.
    """
    rows = plan_rows(policy, rollouts, range(len(rollouts)))
    options = {"temperature": temperature, "with_entropy": with_entropy, "detach_entropy": detach_entropy}
    width, device = rollouts.response_mask.shape[1], next(policy.parameters()).device
    if not rows:
        names = ("log_probs", "token_entropy") if with_entropy else ("log_probs",)
        return {name: torch.zeros(len(rollouts), width, device=device) for name in names}
    places = [
        i * width + t for row in rows for i in row.members for t in range(len(rollouts.completions[i].token_ids))
    ]
    scored = _score_rows(policy, rollouts, rows, options)
    index = torch.tensor(places, dtype=torch.long).to(device, non_blocking=True)
    return {
        name: values.new_zeros(len(rollouts) * width).index_copy(0, index, values).view(len(rollouts), width)
        for name, values in scored.items()
    }


def _score_rows(policy: Any, rollouts: RolloutBatch, rows: list[Row], options: dict[str, Any]) -> dict[str, Tensor]:
    """Of the response tokens, row after row. All that is planned on the host goes to the device, and nothing back."""
    responses = [[rollouts.completions[i].token_ids for i in row.members] for row in rows]
    first = next(policy.parameters())
    packed = pack_group_rows([row.prompt for row in rows], responses)
    if packs_rows(policy):
        packed = _without_padding(packed)
    packed = {name: tensor.to(first.device, non_blocking=True) for name, tensor in packed.items()}
    inputs: dict[str, Any] = {"input_ids": packed["input_ids"], "use_cache": False}
    if packs_rows(policy):
        inputs["position_ids"] = packed["position_ids"]
    elif any(len(row.members) > 1 for row in rows):  # else the causal mask does
        visible = mask_group_rows(packed["segments"])[:, None]
        hidden = torch.zeros_like(visible, dtype=first.dtype).masked_fill(~visible, torch.finfo(first.dtype).min)
        inputs |= {"attention_mask": hidden, "position_ids": packed["position_ids"]}
    head = find_head(policy)
    if head is None:
        logits = policy(**inputs).logits.flatten(0, 1).index_select(0, packed["sources"])
        return _score_logits(logits, packed["labels"], **options)
    states = head.body(**inputs).last_hidden_state.flatten(0, 1).index_select(0, packed["sources"])
    scored = fused_linear_log_probs(
        states,
        head.output.weight,
        packed["labels"],
        bias=head.output.bias,
        temperature=options["temperature"],
        logit_softcap=head.softcap,
        return_entropy=options["with_entropy"],
    )
    return {
        name: value.detach() if name == "token_entropy" and options["detach_entropy"] else value
        for name, value in scored.items()
    }


def _without_padding(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows in one."""
    real = packed["segments"].flatten() >= 0
    place = real.cumsum(0) - 1
    rows = {name: packed[name].flatten()[real][None] for name in ("input_ids", "position_ids", "segments")}
    return packed | rows | {"sources": place[packed["sources"]]}


def _score_logits(
    logits: Tensor, labels: Tensor, *, temperature: float, with_entropy: bool, detach_entropy: bool
) -> dict[str, Tensor]:
    """For a model whose output layer is more than a product."""
    scored = {"log_probs": select_log_probs(logits, labels, temperature=temperature)}
    if with_entropy:
        watched = logits.detach() if detach_entropy else logits
        scored["token_entropy"] = compute_entropy(watched, temperature=temperature)
    return scored


@torch.no_grad()
def score_all(
    policy: nn.Module, rollouts: RolloutBatch, config: GrpoConfig, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """`score` of a whole rollout batch in parts, in the precision and the mode of training; in host memory."""
    names = ("log_probs", "token_entropy") if with_entropy else ("log_probs",)
    whole = {name: torch.zeros(rollouts.response_mask.shape) for name in names}
    for members in plan_micro_batches(config, policy, rollouts, range(len(rollouts))):
        part = score(policy, rollouts.select(members), config.sampling_temperature, with_entropy=with_entropy)
        for name, values in part.items():
            whole[name][members, : values.shape[1]] = values.to("cpu", torch.float32)
    return whole
