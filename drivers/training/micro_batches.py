"""Plan micro-batches and rows."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from math import inf
from typing import Any, NamedTuple

from torch import nn

from drivers.settings.groups import UpdateSettings
from drivers.training.batch import RolloutBatch
from drivers.training.shortcuts import packs_rows, shares_rows


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
    config: UpdateSettings, policy: nn.Module, rollouts: RolloutBatch, wanted: Sequence[int]
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
