"""Plan the rows and the micro-batches of the forward passes.

A *row* is a prompt followed by the responses that share it. Responses to one prompt share a row, or have one row each,
whichever needs fewer operations.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, groupby
from math import inf
from typing import Any, NamedTuple

from torch import nn

from drivers.settings.groups import UpdateSettings
from drivers.training.batch import RolloutBatch
from drivers.training.shortcuts import packs_rows, shares_rows

MASKED_ATTENTION_COST = {"cuda": 2.0}
"""Cost of attention with its own mask, relative to the causal mask, by type of device; 1 elsewhere. On CUDA such
a mask rules out flash attention. The factor of the memory-efficient kernel is an estimate, not a measurement."""


class Row(NamedTuple):
    """One prompt and the responses to it, side by side.

    Two responses of 2 and 1 tokens, the first and the third of a batch, in one row of 5 tokens:

    >>> row = Row(prompt=(1, 2), members=(0, 2), lengths=(2, 1))
    >>> row.n_tokens
    5
    """

    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    members: tuple[int, ...]
    """Indices of the responses: in the rollouts while the plan is made, in the micro-batch afterwards."""
    lengths: tuple[int, ...]
    """Number of tokens of each response."""

    @property
    def n_tokens(self) -> int:
        """Return the length of the row."""
        return len(self.prompt) + sum(self.lengths)


class MicroBatch(NamedTuple):
    """The responses of one forward pass.

    The responses 4 and 7 of a batch, which have one prompt and one row; in the micro-batch they are 0 and 1:

    >>> MicroBatch(members=[4, 7], rows=[Row(prompt=(1, 2), members=(0, 1), lengths=(2, 1))]).rows[0].n_tokens
    5
    """

    members: list[int]
    """Indices of the responses in the batch that the plan is for."""
    rows: list[Row]
    """Rows of these responses; `Row.members` are indices into `members`."""


def plan_rows(policy: Any, rollouts: RolloutBatch, wanted: Sequence[int], max_tokens: float = inf) -> list[Row]:
    """Put each wanted response into one row, in order; responses without tokens are skipped."""
    rows: list[Row] = []
    causal = attention_cost(policy) if shares_rows(policy) else inf  # no row is shared if attention costs so much
    masked = causal * MASKED_ATTENTION_COST.get(next(policy.parameters()).device.type, 1.0)
    for _, same_prompt in groupby(wanted, key=lambda i: rollouts.completions[i].prompt_token_ids):
        members = [i for i in same_prompt if rollouts.completions[i].token_ids]
        while members:
            prompt = rollouts.completions[members[0]].prompt_token_ids
            lengths = [len(rollouts.completions[i].token_ids) for i in members]
            n_fitting = max(1, sum(len(prompt) + length <= max_tokens for length in accumulate(lengths)))
            rows += _choose_layout(prompt, members[:n_fitting], lengths[:n_fitting], causal, masked)
            members = members[n_fitting:]
    return rows


def _choose_layout(
    prompt: tuple[int, ...], members: list[int], lengths: list[int], causal_cost: float, masked_cost: float
) -> list[Row]:
    """Return one row for all responses, or one row per response: the layout that needs fewer operations.

    The costs are those of attending to one more token, relative to all other cost of a token.
    """
    one_row = Row(prompt, tuple(members), tuple(lengths))
    # With the mask of a shared row, attention computes what the mask hides; with a causal mask it skips that half.
    one_row_cost = one_row.n_tokens * (1 + masked_cost * one_row.n_tokens)
    many_rows_cost = sum((len(prompt) + n) * (1 + causal_cost * (len(prompt) + n) / 2) for n in lengths)
    if len(members) > 1 and one_row_cost < many_rows_cost:
        return [one_row]
    return [Row(prompt, (i,), (n,)) for i, n in zip(members, lengths, strict=True)]


def plan_micro_batches(
    config: UpdateSettings, policy: nn.Module, rollouts: RolloutBatch, wanted: Sequence[int]
) -> Iterator[MicroBatch]:
    """Yield micro-batches that contain each wanted response with tokens once.

    With `micro_batch_tokens`, a micro-batch is as many rows of similar length as fit into that budget with their
    padding; a response that does not fit is alone. Otherwise it is the wanted ones among `micro_train_batch_size`
    consecutive responses.
    """
    wanted = [i for i in wanted if rollouts.completions[i].token_ids]
    if config.micro_batch_tokens is None:
        for _, members in groupby(wanted, key=lambda i: i // config.micro_train_batch_size):
            yield _make_micro_batch(plan_rows(policy, rollouts, list(members)))
        return
    rows = plan_rows(policy, rollouts, wanted, config.micro_batch_tokens)
    rows.sort(key=lambda row: (-row.n_tokens, row.members))
    packed, taken, slots = packs_rows(policy), list[Row](), 0
    for row in rows:
        # The first row is the longest, and others are padded to its length unless rows are packed.
        width = row.n_tokens if packed or not taken else taken[0].n_tokens
        if taken and slots + width > config.micro_batch_tokens:
            yield _make_micro_batch(taken)
            taken, slots, width = [], 0, row.n_tokens
        taken.append(row)
        slots += width
    if taken:
        yield _make_micro_batch(taken)


def _make_micro_batch(rows: list[Row]) -> MicroBatch:
    places = count()  # of the responses in the micro-batch
    placed = [row._replace(members=tuple(next(places) for _ in row.members)) for row in rows]
    return MicroBatch([i for row in rows for i in row.members], placed)


def attention_cost(policy: Any) -> float:
    """Return the cost of attending to one more token, relative to all other cost of a token."""
    config = policy.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    embedded = policy.get_input_embeddings().weight.numel()
    multiplied = sum(p.numel() for p in policy.base_model.parameters()) - embedded
    # Attention multiplies queries with keys and weights with values; everything else multiplies with each parameter.
    return float(2 * width * config.num_hidden_layers / max(1, multiplied))
