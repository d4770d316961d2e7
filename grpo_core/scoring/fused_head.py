"""From hidden states to log-probabilities and losses, a block of logits at a time.

Blocks are no graph: torch.compile goes around these functions, and the transforms of torch.func refuse them.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import eager_alone, require, shape_checked
from grpo_core.scoring._linear_head import GradientSums, Head, scale
from grpo_core.scoring._softmax_stats import Scaling, Statistics, check_labels, join, measure, wide_type
from grpo_core.types import Metadata

MAX_LOGITS_BYTES = 1 << 29


@eager_alone
@shape_checked
def fused_linear_log_probs(
    hidden: Float[Tensor, "*batch width"],
    lm_head_weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, "*batch"],
    *,
    response_mask: Bool[Tensor, "*batch"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = True,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> dict[str, Float[Tensor, "*batch"]]:
    r"""$\log p_y = z_y - \log \sum_v e^{z_v}$ and $H = -\sum_v p_v \log p_v$ of $z = (W h + b) / T$, in nats.

    `select_log_probs` and `compute_entropy` of the logits $W h + b$, in less time and memory. Both values are
    differentiable in `hidden`, `lm_head_weight` and `bias`, once; a value that no loss uses costs nothing in the
    gradient. Logits have the precision of a matrix product of the inputs (on CUDA, float32), everything told of them
    at least float32. Under autocast the inputs are cast as a linear layer casts them.

    Args:
        hidden: $h$, what the output layer gets, at the position before each label.
        lm_head_weight: $W$ of the output layer.
        labels: $y$, token ids in $[0, V)$; anything where `response_mask` is False.
        response_mask: where given, nothing is read or computed elsewhere, and both results are exactly 0 there.
        bias: $b$ of the output layer, if it has one.
        temperature: $T > 0$ of the sampled distribution.
        logit_softcap: $c > 0$ of a model whose logits are $c \tanh((W h + b) / c)$.
        return_entropy: False for `log_probs` alone.
        max_logits_bytes: logits that fit are kept for the gradient, and all takes three matrix products; of others one
            block at a time exists, and the gradient computes it again: four.

    Returns:
        `log_probs` and, unless told otherwise, `token_entropy`, in float32 or the wider type of `hidden`.

    Raises:
        ValueError: if `temperature`, `logit_softcap` or `max_logits_bytes` is not positive, the types of `hidden` and
            `lm_head_weight` differ, or a label lies outside the vocabulary (on a CPU, as in `select_log_probs`).

    Example:
        >>> fused_linear_log_probs(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        {'log_probs': tensor([-1.3863]), 'token_entropy': tensor([1.3863])}

    References:
        Wijmans et al. 2024, arXiv:2411.09009, section 3: log-probabilities from blocks of logits.
    """
    states, head = _prepare(hidden, lm_head_weight, bias, temperature, logit_softcap, max_logits_bytes)
    rows = _rows_of(response_mask)
    chosen, targets = _choose(states, rows), _choose(labels.reshape(-1).long(), rows)
    check_labels(targets, len(lm_head_weight))
    log_probs, entropy = _apply(_LogProbs, chosen, head, targets, return_entropy)
    values = {"log_probs": log_probs} | ({"token_entropy": entropy} if return_entropy else {})
    return {name: _spread(value, rows, labels.shape) for name, value in values.items()}


@eager_alone
@shape_checked
def fused_linear_token_loss(
    hidden: Float[Tensor, "batch seq width"],
    lm_head_weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, "batch seq"],
    loss_fn: Callable[..., Tensor],
    *,
    response_mask: Bool[Tensor, "batch seq"],
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""$L = \sum_t f(\log p_{y_t}, H_t)$ over the response tokens: loss and gradient in one sweep over the logits.

    Three matrix products at any size, in the memory of one block of logits: the gradient of a block is formed while
    its logits are at hand. That needs a loss which is a sum over tokens, each of whose terms depends on its own token
    alone: any token objective of this library times its weights, but no objective of whole responses
    (`fused_linear_log_probs` serves those). Differentiable in `hidden`, `lm_head_weight` and `bias`, once.

    Args:
        hidden: $h$, what the output layer gets, at the position before each label.
        lm_head_weight: $W$ of the output layer.
        labels: $y$, token ids in $[0, V)$; anything where `response_mask` is False.
        loss_fn: $f$, called as `loss_fn(log_probs, token_entropy, take)` for some tokens at a time, which stand in one
            row: both values are Float "1 tokens", in nats, and `take(tensor)` gives what a tensor of shape "batch seq"
            or "batch 1" holds for these tokens, in that shape. It returns their share of the loss, a scalar.
        response_mask: the tokens that the loss is of; nothing else is read or computed.
        bias: $b$ of the output layer, if it has one.
        temperature: $T > 0$ of the sampled distribution.
        logit_softcap: $c > 0$ of a model whose logits are $c \tanh((W h + b) / c)$.
        max_logits_bytes: the most that a block of logits takes.

    Returns:
        The loss, in float32 or wider; and, detached, `log_probs` and `token_entropy`, 0 outside the mask.

    Raises:
        ValueError: as `fused_linear_log_probs` does.

    Example:
        >>> advantages, weights = torch.tensor([[2.0]]), torch.tensor([[0.5, 0.5]])
        >>> loss, told = fused_linear_token_loss(
        ...     torch.ones(1, 2, 2), torch.zeros(4, 2), torch.tensor([[3, 1]]),
        ...     lambda log_probs, _, take: -(take(weights) * take(advantages) * log_probs).sum(),
        ...     response_mask=torch.tensor([[True, True]]),
        ... )
        >>> loss, told["log_probs"]
        (tensor(2.7726), tensor([[-1.3863, -1.3863]]))
    """
    states, head = _prepare(hidden, lm_head_weight, bias, temperature, logit_softcap, max_logits_bytes)
    rows = _rows_of(response_mask)
    assert rows is not None
    chosen, targets = _choose(states, rows), _choose(labels.reshape(-1).long(), rows)
    check_labels(targets, len(lm_head_weight))

    def loss_of(log_probs: Tensor, entropy: Tensor, tokens: slice) -> Tensor:
        place = rows[tokens]
        row, column = place // labels.shape[1], place % labels.shape[1]
        return loss_fn(log_probs, entropy, lambda tensor: tensor[row, column if tensor.shape[1] > 1 else 0][None])

    loss, log_probs, entropy = _apply(_TokenLoss, chosen, head, targets, loss_of)
    told = {"log_probs": log_probs, "token_entropy": entropy}
    return loss, {name: _spread(value, rows, labels.shape) for name, value in told.items()}


class _LogProbs(torch.autograd.Function):
    """Log-probs and entropies forward; what is kept of the logits, or made again, becomes their gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int[Tensor, " tokens"],
        head: Head,
        with_entropy: bool,
    ) -> tuple[Tensor | None, ...]:
        head = head._replace(weight=weight, bias=bias)
        parts, logits = [], None
        keeps = any(ctx.needs_input_grad) and head.fits(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.blocks(len(hidden)):
                logits = head.logits(hidden[rows])
                told = measure(logits, labels[rows], head.scaling, with_entropy=with_entropy, keeps_weights=keeps)
                parts.append(told)
        told = join(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, *told)
        ctx.head = head._replace(weight=weight.new_empty(0), bias=None)
        ctx.kept = logits if keeps else None
        return told.results()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_prob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if by_log_prob is None and by_entropy is None:
            return (None,) * 6
        hidden, weight, bias, labels, *told = ctx.saved_tensors
        head = ctx.head._replace(weight=weight, bias=bias)
        # A second backward pass through the same graph makes the weights again: the first one overwrites them.
        kept, ctx.kept = ctx.kept, None
        sums = GradientSums(head, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.blocks(len(hidden)):
                slopes = (None if slope is None else slope[rows, None] for slope in (by_log_prob, by_entropy))
                if kept is not None:
                    weights, part = kept, Statistics(*told)
                else:
                    weights, chosen = head.logits(hidden[rows]), labels[rows]
                    of_entropy = by_entropy is not None
                    part = measure(weights, chosen, head.scaling, with_entropy=of_entropy, keeps_weights=True)
                sums.add(rows, weights, labels[rows], part, *slopes)
        return *sums.result(), None, None, None


class _TokenLoss(torch.autograd.Function):
    """The loss and, block by block, its gradients, which then wait for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int[Tensor, " tokens"],
        head: Head,
        loss_of: Callable[[Tensor, Tensor, slice], Tensor],
    ) -> tuple[Tensor | None, ...]:
        head = head._replace(weight=weight, bias=bias)
        loss, parts = hidden.new_zeros((), dtype=wide_type(hidden)), []
        sums = GradientSums(head, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.blocks(len(hidden)):
                logits = head.logits(hidden[rows])
                told = measure(logits, labels[rows], head.scaling, with_entropy=True, keeps_weights=True)
                share, slopes = _slopes(loss_of, told, rows)
                loss += share
                parts.append(told)
                sums.add(rows, logits, labels[rows], told, *slopes)
        log_probs, entropy = join(parts).results()
        # Kept by autograd, which lets them go after backward unless it is told to retain the graph.
        ctx.save_for_backward(*sums.result())
        ctx.mark_non_differentiable(log_probs, entropy)
        return loss, log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if part is None else scale(part, by_loss) for part in ctx.saved_tensors), None, None, None


def _slopes(
    loss_of: Callable[[Tensor, Tensor, slice], Tensor], told: Statistics, rows: slice
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The loss of a block, and its derivatives by log-prob and by entropy, None where it has none."""
    with torch.enable_grad():
        values = (told.log_probs, told.entropy)
        leaves = [value.detach().requires_grad_() for value in values if value is not None]
        share = loss_of(leaves[0].t(), leaves[1].t(), rows)
        if not share.requires_grad:
            return share, (None, None)
        by_log_prob, by_entropy = torch.autograd.grad(share, leaves, allow_unused=True)
    return share.detach(), (by_log_prob, by_entropy)


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    max_logits_bytes: int,
) -> tuple[Tensor, Head]:
    """Checked, and in one precision."""
    require(0 < temperature < float("inf"), "temperature", temperature, "positive and finite")
    require(logit_softcap is None or logit_softcap > 0, "logit_softcap", logit_softcap, "positive, or None for no cap")
    require(max_logits_bytes > 0, "max_logits_bytes", max_logits_bytes, "positive: a row of logits needs room")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    require(
        hidden.dtype == weight.dtype,
        "lm_head_weight",
        f"[{weight.dtype}]",
        f"of the type of hidden, {hidden.dtype}: cast one of them",
    )
    states = hidden.reshape(-1, hidden.shape[-1])
    return states, Head(weight, bias, Scaling(temperature, logit_softcap), max_logits_bytes)


def _apply(function: Any, hidden: Tensor, head: Head, labels: Tensor, argument: object) -> Any:
    return function.apply(hidden, head.weight, head.bias, labels, head, argument)


def _rows_of(mask: Tensor | None) -> Int[Tensor, " tokens"] | None:
    return None if mask is None else mask.flatten().nonzero()[:, 0]


def _choose(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values.index_select(0, rows)


def _spread(values: Float[Tensor, " tokens"], rows: Tensor | None, shape: torch.Size) -> Tensor:
    """Back in their places, 0 elsewhere."""
    if rows is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy(0, rows, values).view(shape)
