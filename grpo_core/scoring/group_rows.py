"""A group as one row: the prompt once, then its responses, each of which sees the prompt and itself."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grpo_core._checks import require, shape_checked
from grpo_core.scoring._forward import logits_at
from grpo_core.scoring.response_log_probs import score_logits

_PADDING = -1


@shape_checked
def pack_group_rows(
    prompt_token_ids: Sequence[Sequence[int]], response_token_ids: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Int[Tensor, "..."]]:
    r"""$x_k = (q_k, o_{k1}, \dots, o_{kG})$ with positions that restart after $q_k$: a row for each group.

    With `mask_group_rows` as the attention mask, a causal model gives each response token the same logits as in a row
    $(q, o_i)$ of its own, so that $G$ rows of $|q| + |o_i|$ tokens become one of $|q| + \sum_i |o_i|$. A row with one
    response is the plain row, and needs no mask but the causal one.

    Args:
        prompt_token_ids: $q_k$ of each row, at least one token.
        response_token_ids: $o_{k1} \dots o_{kG}$ of each row; an empty response takes no place.

    Returns:
        Int "rows seq" each: `input_ids`, `position_ids` and `segments`, which is 0 on the prompt, $i$ on response $i$
        and -1 on the padding at the end. One entry per response token, in order, Int " token" each: `sources`, the
        place in the flattened rows whose logits predict it, and `labels`, its id.

    Raises:
        ValueError: if there is no row, or a prompt is empty: its first response token would have nothing to be
            predicted from.

    Example:
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
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    places: list[list[int]] = []
    for prompt, responses in zip(prompt_token_ids, response_token_ids, strict=True):
        if len(prompt) == 0:
            raise ValueError("prompt_token_ids is empty; at least one token is required: begin with the BOS token")
        row, position, segment, source = list(prompt), [*range(len(prompt))], [0] * len(prompt), []
        for number, response in enumerate(responses, start=1):
            if response:
                source += [len(prompt) - 1, *range(len(row), len(row) + len(response) - 1)]
            row += response
            position += range(len(prompt), len(prompt) + len(response))
            segment += [number] * len(response)
        for rows, part in zip((ids, positions, segments, places), (row, position, segment, source), strict=True):
            rows.append(part)
    width = max(map(len, ids))
    labels = [token for responses in response_token_ids for response in responses for token in response]
    return {
        # Any id will do: padding stands after all else, and nothing looks at it.
        "input_ids": torch.tensor([row + [row[0]] * (width - len(row)) for row in ids]),
        "position_ids": torch.tensor([row + [0] * (width - len(row)) for row in positions]),
        "segments": torch.tensor([row + [_PADDING] * (width - len(row)) for row in segments]),
        "sources": torch.tensor([k * width + place for k, row in enumerate(places) for place in row]).long(),
        "labels": torch.tensor(labels).long(),
    }


@shape_checked
def mask_group_rows(segments: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows seq seq"]:
    r"""$M_{st} = 1[t \le s]\, 1[c_t \in \{0, c_s\}]$, $c$ = `segments`: True where query $s$ may look at key $t$.

    Padding looks at padding, so that no query looks at nothing, which attention makes NaN of.

    Args:
        segments: of `pack_group_rows`.

    Returns:
        The mask.

    Example:
        >>> mask_group_rows(torch.tensor([[0, 1, 2]])).int().tolist()
        [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    """
    place = torch.arange(segments.shape[1], device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    return ((key == query) | (key == 0)) & (place[:, None] >= place[None, :])


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
    r"""$\log \pi_\theta(o_{it} \mid q, o_{i,<t})$ of every response of one group, in nats, from a single row.

    The same numbers and gradients as `get_response_log_probs` on padded rows, with the prompt run once and logits at
    response tokens alone. Differentiable in the model's parameters. The model must accept `position_ids` and a 4-D
    additive `attention_mask`, as Hugging Face models do under the `sdpa` and `eager` attention implementations (not
    under `flash_attention_2`, which ignores such a mask), and
    attend to the whole row in every layer: with a sliding window or a recurrent state, use padded rows.

    Args:
        model: A causal language model whose output has `.logits`.
        prompt_token_ids: $q$, shared by the group.
        response_token_ids: $o_1 \dots o_G$; at least one token among them.
        return_token_entropy: Whether to return the entropy of each token's distribution too.
        temperature: What the logits are divided by, as the sampler did.
        detach_entropy: True for an entropy that is only looked at: without a gradient, and nothing kept for one.

    Returns:
        `log_probs` and, if asked for, `token_entropy` (nats): row $i$ holds response $i$ from its first token on, then
        zeros up to the longest.

    Raises:
        ValueError: If the prompt is empty, or no response has a token.

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3: $\pi_\theta(o_{i,t} \mid q, o_{i,<t})$.
    """
    rows = pack_group_rows([prompt_token_ids], [response_token_ids])
    if rows["labels"].numel() == 0:
        raise ValueError("response_token_ids holds no token; at least one response must be non-empty: skip this group")
    first = next(model.parameters())
    rows = {name: tensor.to(first.device) for name, tensor in rows.items()}
    visible = mask_group_rows(rows["segments"])[:, None]
    hidden = torch.zeros_like(visible, dtype=first.dtype).masked_fill(~visible, torch.finfo(first.dtype).min)
    logits = logits_at(
        model, rows["input_ids"], rows["sources"], attention_mask=hidden, position_ids=rows["position_ids"]
    )[0]
    lengths = torch.tensor([len(response) for response in response_token_ids], device=first.device)
    response_mask = torch.arange(int(lengths.max()), device=first.device)[None] < lengths[:, None]
    scored = score_logits(logits, rows["labels"], return_token_entropy, temperature, detach_entropy)
    return {
        name: values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)
        for name, values in scored.items()
    }
