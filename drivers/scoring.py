"""Log-probs of rollouts: how responses become rows of a forward pass, and the head that scores them.

A *row* is a prompt with the responses that share it. What is cheaper by the count of operations is chosen: one row for
a group, or one for each response.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from math import inf
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drivers import ranks
from drivers.batch import RolloutBatch
from drivers.config import GrpoConfig
from grpo_core import (
    compute_entropy,
    fused_linear_log_probs,
    mask_group_rows,
    pack_group_rows,
    select_log_probs,
)

MAX_LOGITS_BYTES = 1 << 29
"""Of one pass, kept for its gradient; where there are more, the head makes them a block at a time."""


class Row(NamedTuple):
    """Responses to one prompt, scored side by side; `members` are their places in the batch."""

    prompt: tuple[int, ...]
    members: tuple[int, ...]
    tokens: int
    """How long it is."""


class MicroBatch(NamedTuple):
    """What is scored in one pass."""

    members: list[int]
    """Places in the batch that it was planned for."""
    rows: list[Row]
    """Theirs; `Row.members` are places among `members`."""


def packs_rows(policy: Any) -> bool:
    """Whether rows stand one after the other in one sequence without padding.

    Flash attention keeps them apart by their positions; it takes no mask, so each response is a row of its own there.
    """
    return str(policy.config._attn_implementation).startswith("flash")


def plan_rows(policy: Any, rollouts: RolloutBatch, wanted: Sequence[int], max_tokens: float = inf) -> list[Row]:
    """Each of these responses in one row, in order; those without tokens are left out."""
    rows: list[Row] = []
    share = attention_share(policy) if shares_rows(policy) else inf
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
) -> Iterator[MicroBatch]:
    """Which responses are scored in one pass: the wanted ones that have tokens, each once.

    With `micro_batch_tokens`, rows of like length, as many as fit with their padding (a response that does not stands
    alone); else those of each `micro_train_batch_size` responses of the batch.
    """
    wanted = [i for i in wanted if rollouts.completions[i].token_ids]
    if config.micro_batch_tokens is None:
        for _, members in groupby(wanted, key=lambda i: i // config.micro_train_batch_size):
            yield _micro_batch(plan_rows(policy, rollouts, list(members)))
        return
    rows = plan_rows(policy, rollouts, wanted, config.micro_batch_tokens)
    rows.sort(key=lambda row: (-row.tokens, row.members))
    packed, start = packs_rows(policy), 0
    while start < len(rows):
        # Padded, each row is as long as the first; packed, as long as it is.
        count, slots, longest = 0, 0, rows[start].tokens
        while start + count < len(rows):
            slots += rows[start + count].tokens if packed else longest
            if count and slots > config.micro_batch_tokens:
                break
            count += 1
        yield _micro_batch(rows[start : start + count])
        start += count


def _micro_batch(rows: list[Row]) -> MicroBatch:
    members = [i for row in rows for i in row.members]
    ends = list(accumulate(len(row.members) for row in rows))
    return MicroBatch(
        members,
        [row._replace(members=tuple(range(end - len(row.members), end))) for row, end in zip(rows, ends, strict=True)],
    )


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


_SHARING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def shares_rows(policy: nn.Module) -> bool:
    """Whether responses may stand side by side after one prompt: a trial shows that each is then scored as alone.

    Not under flash attention, which takes no mask; nor where a model keeps a state or looks back through a window.
    """
    if packs_rows(policy):
        return False
    if policy not in _SHARING:
        _SHARING[policy] = _holds(_sharing_error, policy)
    return _SHARING[policy]


def _sharing_error(policy: Any) -> Tensor:
    config = policy.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None or not getattr(config, "num_attention_heads", None):
        raise NotImplementedError("a mask of one's own replaces the window, or there is no attention")
    size = policy.get_input_embeddings().num_embeddings
    prompt, responses = [1 % size, 2 % size, 3 % size], [[4 % size, 5 % size], [3 % size, 1 % size, 2 % size]]
    device = policy.get_input_embeddings().weight.device
    logits = []
    for rows in ([responses], [[response] for response in responses]):
        packed = pack_group_rows([prompt] * len(rows), rows)
        inputs = _inputs(policy, packed, shared=len(rows) == 1, device=device)
        logits.append(policy(**inputs).logits.flatten(0, 1)[packed["sources"].to(device)].float())
    return _relative_error(*logits)


class Head(NamedTuple):
    """A model in two parts, of which the second is a matrix product."""

    body: nn.Module
    output: nn.Linear
    softcap: float | None


_HEADS: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def find_head(policy: nn.Module) -> Head | None:
    """Body and output layer, if together they give the logits of the model itself; None if there is more to them."""
    if policy not in _HEADS:
        _HEADS[policy] = _split(policy) if _holds(_head_error, policy) else None
    return _HEADS[policy]


def _split(policy: Any) -> Head:
    output, body = policy.get_output_embeddings(), policy.base_model
    if not isinstance(output, nn.Linear) or body is policy:
        raise NotImplementedError("no output layer of its own")
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
def _holds(error_of: Callable[[nn.Module], Tensor], policy: nn.Module) -> bool:
    """Whether a shortcut gives what the model itself does, but for rounding; any failure of the trial says no.

    Models come in all kinds, and what one lacks (a body, an output layer, a kind of mask) may show in any way: the way
    without the shortcut, which follows, is right for all of them, and tells what is wrong with the rest.
    """
    rounding = 8 * torch.finfo(ranks.computing_dtype(policy)).eps
    try:
        holds = bool(ranks.as_forward(policy, lambda: error_of(policy)) <= rounding)
    except Exception:  # of a trial; see above
        holds = False
    return all(ranks.gather(holds))  # also of a rank on which it failed alone: the others ask for its answer


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
    scored = ranks.as_forward(policy, lambda: _score_rows(policy, head, rollouts, rows, options))
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
        packed = _without_padding(packed)
    device = next(policy.parameters()).device
    inputs = _inputs(policy, packed, shared=any(len(row.members) > 1 for row in rows), device=device)
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


def _inputs(policy: Any, packed: dict[str, Tensor], *, shared: bool, device: torch.device) -> dict[str, Any]:
    """What the model is called with, on its device."""
    ids, positions, segments = (
        packed[name].to(device, non_blocking=True) for name in ("input_ids", "position_ids", "segments")
    )
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if packs_rows(policy):
        inputs["position_ids"] = positions
    elif shared:  # else the causal mask does
        visible, dtype = mask_group_rows(segments)[:, None], policy.get_input_embeddings().weight.dtype
        hidden = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        inputs |= {"attention_mask": hidden, "position_ids": positions}
    return inputs


def _without_padding(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows in one."""
    real = packed["segments"].flatten() >= 0
    place = real.cumsum(0) - 1
    rows = {name: packed[name].flatten()[real][None] for name in ("input_ids", "position_ids", "segments")}
    return packed | rows | {"sources": place[packed["sources"]]}


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
    policy: nn.Module, rollouts: RolloutBatch, config: GrpoConfig, *, with_entropy: bool = False
) -> dict[str, Tensor]:
    """`score` of a whole rollout batch in parts, in the precision and the mode of training; in host memory."""
    names = ("log_probs", "token_entropy") if with_entropy else ("log_probs",)
    whole = {name: torch.zeros(rollouts.response_mask.shape) for name in names}
    parts = list(plan_micro_batches(config, policy, rollouts, range(len(rollouts))))
    for (members, rows), counts in ranks.deal(parts):
        part = score(policy, rollouts.select(members), config.sampling_temperature, rows, with_entropy=with_entropy)
        for name, values in part.items() if counts else ():
            whole[name][members, : values.shape[1]] = values.to("cpu", torch.float32)
    return {name: ranks.total(values) for name, values in whole.items()}
