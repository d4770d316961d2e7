"""A group as one row: the prompt once, then its responses, each of which sees the prompt and itself."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from grpo_core._check import shape_checked
from grpo_core._forward import logits_at
from grpo_core.scoring import score_logits


@shape_checked
def pack_group_row(
    prompt_token_ids: Sequence[int], response_token_ids: Sequence[Sequence[int]]
) -> dict[str, Int[Tensor, "..."] | Bool[Tensor, "..."]]:
    r"""$x = (q, o_1, \dots, o_G)$ with positions that restart after $q$, and who may look at whom.

    Attending as `visible` says and rotating by `position_ids`, a causal model gives each response token the same
    logits as in a row $(q, o_i)$ of its own, so $G$ rows of $|q| + |o_i|$ tokens become one of $|q| + \sum_i |o_i|$.

    Args:
        prompt_token_ids: $q$, at least one token.
        response_token_ids: $o_1 \dots o_G$; an empty response takes no place.

    Returns:
        `input_ids` and `position_ids` (Int "1 row"); `visible` (Bool "row row"), True where the query (first axis) may
        attend to the key; and, one entry per response token in order, `sources` (Int " token"), the place in the row
        whose logits predict it, and `labels` (Int " token"), its id.

    Raises:
        ValueError: If the prompt is empty: the first response token would have nothing to be predicted from.

    Example:
        >>> row = pack_group_row([7, 8], [[1, 2], [3]])
        >>> row["input_ids"].tolist(), row["position_ids"].tolist()
        ([[7, 8, 1, 2, 3]], [[0, 1, 2, 3, 2]])
        >>> row["sources"].tolist(), row["labels"].tolist()
        ([1, 2, 1], [1, 2, 3])
        >>> row["visible"][4].tolist()
        [True, True, False, False, True]
    """
    prompt, lengths = len(prompt_token_ids), [len(response) for response in response_token_ids]
    if prompt == 0:
        raise ValueError("prompt_token_ids is empty; at least one token is required: begin with the BOS token")
    flat = [token for response in response_token_ids for token in response]
    within = torch.cat([torch.arange(0), *map(torch.arange, lengths)])
    # Segment 0 is the prompt, which all see; response i is segment i.
    segment = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([prompt, *lengths]))
    place = torch.arange(len(segment))
    own_or_prompt = (segment[:, None] == segment[None, :]) | (segment[None, :] == 0)
    return {
        "input_ids": torch.tensor([[*prompt_token_ids, *flat]]),
        "position_ids": torch.cat([torch.arange(prompt), prompt + within])[None],
        "visible": own_or_prompt & (place[:, None] >= place[None, :]),
        "sources": torch.where(within == 0, prompt - 1, prompt + torch.arange(len(flat)) - 1),
        "labels": torch.tensor(flat, dtype=torch.long),
    }


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
    row = pack_group_row(prompt_token_ids, response_token_ids)
    if row["labels"].numel() == 0:
        raise ValueError("response_token_ids holds no token; at least one response must be non-empty: skip this group")
    first = next(model.parameters())
    row = {name: tensor.to(first.device) for name, tensor in row.items()}
    hidden = torch.zeros_like(row["visible"], dtype=first.dtype)
    hidden = hidden.masked_fill(~row["visible"], torch.finfo(first.dtype).min)
    logits = logits_at(
        model, row["input_ids"], row["sources"], attention_mask=hidden[None, None], position_ids=row["position_ids"]
    )[0]
    lengths = torch.tensor([len(response) for response in response_token_ids], device=first.device)
    response_mask = torch.arange(int(lengths.max()), device=first.device)[None] < lengths[:, None]
    scored = score_logits(logits, row["labels"], return_token_entropy, temperature, detach_entropy)
    return {
        name: values.new_zeros(response_mask.shape).masked_scatter(response_mask, values)
        for name, values in scored.items()
    }
