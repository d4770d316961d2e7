"""Groups packed as one row each: the prompt once, then all responses, which attend to the prompt and themselves."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grpo_core._checks import require, shape_checked
from grpo_core.scoring._forward import compute_logits_at
from grpo_core.scoring.response_log_probs import score_logits

_PADDING = -1


@shape_checked
def pack_group_rows(
    prompt_token_ids: Sequence[Sequence[int]], response_token_ids: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Int[Tensor, "..."]]:
    r"""Return one row $x_k = (q_k, o_{k1}, \dots, o_{kG})$ per group, with positions that restart after $q_k$.

    With `mask_group_rows` as the attention mask, a causal model gives each response token the same logits as in a
    separate row $(q, o_i)$. $G$ rows of $|q| + |o_i|$ tokens thus become one row of $|q| + \sum_i |o_i|$ tokens. A row
    with a single response is an ordinary row, which only needs the causal mask.

    Args:
        prompt_token_ids: $q_k$ of each row, at least one token.
        response_token_ids: $o_{k1} \dots o_{kG}$ of each row; an empty response adds no tokens.

    Returns:
        `input_ids`, `position_ids` and `segments`, Int "rows seq" each; `segments` is 0 on the prompt, $i$ on response
        $i$ and -1 on the padding at the end. `sources` and `labels`, Int " token" each, with one entry per response
        token in order: the index in the flattened rows whose logits predict the token, and the token's id.

    Raises:
        ValueError: if there are no rows, the numbers of rows differ, or a prompt is empty, so that no logits predict
            the first response token.

    Examples:
        >>> rows = pack_group_rows([[7, 8], [9]], [[[1, 2], [3]], [[4]]])
        >>> rows["input_ids"].tolist(), rows["position_ids"].tolist()
        ([[7, 8, 1, 2, 3], [9, 4, 9, 9, 9]], [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]])
        >>> rows["segments"].tolist()
        [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
        >>> rows["sources"].tolist(), rows["labels"].tolist()
        ([1, 2, 1, 5], [1, 2, 3, 4])
    """
    require(len(prompt_token_ids) > 0, "prompt_token_ids", "[]", "of at least one row")
    require(
        len(prompt_token_ids) == len(response_token_ids),
        "response_token_ids",
        f"[{len(response_token_ids)} rows]",
        f"as many rows as prompt_token_ids: {len(prompt_token_ids)}",
    )
    if any(len(prompt) == 0 for prompt in prompt_token_ids):
        raise ValueError("prompt_token_ids holds an empty prompt: give at least one token, such as the BOS token")
    rows = [_pack_row(*group) for group in zip(prompt_token_ids, response_token_ids, strict=True)]
    width = max(len(row.ids) for row in rows)
    labels = [token for responses in response_token_ids for response in responses for token in response]
    return {
        # Any id works as padding, because no token attends to it.
        "input_ids": torch.tensor([row.ids + [row.ids[0]] * (width - len(row.ids)) for row in rows]),
        "position_ids": torch.tensor([row.positions + [0] * (width - len(row.ids)) for row in rows]),
        "segments": torch.tensor([row.segments + [_PADDING] * (width - len(row.ids)) for row in rows]),
        "sources": torch.tensor([k * width + column for k, row in enumerate(rows) for column in row.sources]).long(),
        "labels": torch.tensor(labels).long(),
    }


class _PackedRow(NamedTuple):
    """A group as one row, before padding."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int]
    """For each response token, the column whose logits predict it."""


def _pack_row(prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> _PackedRow:
    row = _PackedRow(list(prompt), [*range(len(prompt))], [0] * len(prompt), [])
    for number, response in enumerate(responses, start=1):
        if response:
            # The last prompt token predicts the first response token, and each response token the next one.
            row.sources.extend([len(prompt) - 1, *range(len(row.ids), len(row.ids) + len(response) - 1)])
        row.ids.extend(response)
        row.positions.extend(range(len(prompt), len(prompt) + len(response)))
        row.segments.extend([number] * len(response))
    return row


@shape_checked
def mask_group_rows(segments: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq seq"]:
    r"""Return $M_{st} = 1[t \le s]\, 1[c_t \in \{0, c_s\}]$, $c$ = `segments`: True if query $s$ attends to key $t$.

    Padding attends to padding, because attention over no keys would be NaN.

    Args:
        segments: `segments` of `pack_group_rows`.

    Returns:
        The mask.

    Examples:
        >>> mask_group_rows(torch.tensor([[0, 1, 2]])).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    """
    position = torch.arange(segments.shape[1], device=segments.device)
    query, key = rearrange(segments, "row query -> row query 1"), rearrange(segments, "row key -> row 1 key")
    return ((key == query) | (key == 0)) & (position[:, None] >= position[None, :])


@shape_checked
def get_group_log_probs(
    model: nn.Module,
    prompt_token_ids: Sequence[int],
    response_token_ids: Sequence[Sequence[int]],
    return_token_entropy: bool = False,
    *,
    temperature: float = 1.0,
    detach_entropy: bool = False,
) -> dict[str, Float[Tensor, "group seq"]]:
    r"""Return $\log \pi_\theta(o_{it} \mid q, o_{i,<t})$ of every response of one group, in nats, from a single row.

    Values and gradients equal those of `get_response_log_probs` on padded rows, but the prompt is processed once, and
    logits are computed at response tokens only. Differentiable in the model's parameters. The model must accept
    `position_ids` and a 4-D additive `attention_mask`, as Hugging Face models do with the attention implementations
    `sdpa` and `eager` (but not with `flash_attention_2`, which ignores such a mask). Every layer must attend to the
    whole row; for models with a sliding window or a recurrent state, use padded rows.

    Args:
        model: a causal language model whose output has `.logits`.
        prompt_token_ids: $q$, shared by the group.
        response_token_ids: $o_1 \dots o_G$; at least one token among them.
        return_token_entropy: whether to return `token_entropy` too.
        temperature: $T > 0$ at which the tokens were sampled; the logits are divided by it.
        detach_entropy: True returns an entropy without gradient, which saves memory if it is only monitored.

    Returns:
        `log_probs` and, if requested, `token_entropy`, in nats. Row $i$ holds response $i$ from its first token on,
        padded with zeros to the longest response.

    Raises:
        ValueError: if the prompt is empty, or no response has a token.

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3: $\pi_\theta(o_{i,t} \mid q, o_{i,<t})$.
    """
    rows = pack_group_rows([prompt_token_ids], [response_token_ids])
    if rows["labels"].numel() == 0:
        raise ValueError("response_token_ids holds no token: skip groups in which every response is empty")
    first = next(model.parameters())
    rows = {name: tensor.to(first.device) for name, tensor in rows.items()}
    visible = rearrange(mask_group_rows(rows["segments"]), "row query key -> row 1 query key")
    attention_mask = torch.zeros_like(visible, dtype=first.dtype).masked_fill(~visible, torch.finfo(first.dtype).min)
    logits = compute_logits_at(
        model, rows["input_ids"], rows["sources"], attention_mask=attention_mask, position_ids=rows["position_ids"]
    )[0]
    lengths = torch.tensor([len(response) for response in response_token_ids], device=first.device)
    response_mask = torch.arange(int(lengths.max()), device=first.device)[None] < lengths[:, None]
    scores = score_logits(logits, rows["labels"], return_token_entropy, temperature, detach_entropy)
    return {
        name: values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)
        for name, values in scores.items()
    }
