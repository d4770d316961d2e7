"""Log-probabilities and losses computed from hidden states, one block of logits at a time.

torch.compile runs these functions eagerly, and they do not support the transforms of torch.func.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_core._checks import disable_compile, require, shape_checked
from grpo_core.scoring._linear_head import HeadGradients, LinearHead, choose_max_logits_bytes, scale_gradient
from grpo_core.scoring._softmax_stats import (
    Scaling,
    SoftmaxStats,
    StatsGrad,
    check_labels,
    compute_softmax_stats,
    concatenate_stats,
    get_wide_dtype,
    store_exponentials,
)
from grpo_core.scoring._token_sets import TokenSets
from grpo_core.tensor_types import Metadata


@disable_compile
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
    max_logits_bytes: int | None = None,
    kept_ids: Int[Tensor, "*batch kept"] | None = None,
    excluded_ids: Int[Tensor, "*batch excluded"] | None = None,
) -> dict[str, Float[Tensor, "*batch"]]:
    r"""Return $\log p_y = z_y - \log \sum_v e^{z_v}$ and $H = -\sum_v p_v \log p_v$ of $z = (W h + b) / T$, in nats.

    The values are those of `select_log_probs` and `compute_entropy` on the logits $W h + b$, in less time and memory.
    Both are differentiable once in `hidden`, `lm_head_weight` and `bias`; a value that the loss does not use adds
    nothing to the cost of the gradient. Logits have the type of the inputs (float32 on CUDA), and the results are at
    least float32. Under autocast, the inputs are cast as for a linear layer.

    Args:
        hidden: $h$, the input of the output layer at the position before each label.
        lm_head_weight: $W$ of the output layer.
        labels: $y$, token ids in $[0, V)$; any value where `response_mask` is False.
        response_mask: if given, nothing outside it is read or computed, and both results are exactly 0 there.
        bias: $b$ of the output layer, if it has one.
        temperature: $T > 0$ of the sampled distribution.
        logit_softcap: $c > 0$ of a model whose logits are $c \tanh((W h + b) / c)$.
        return_entropy: False omits `token_entropy`.
        max_logits_bytes: maximum size of the logits in memory. Logits that fit are kept for the gradient, which takes
            three matrix products in total. Otherwise only one block exists at a time and is computed again for the
            gradient, which takes four. Default: 512 MiB; on CUDA a quarter of the free memory if that is more, except
            under `torch.use_deterministic_algorithms`.
        kept_ids: if given, the softmax is over these tokens only, as in `select_log_probs`. It costs a pass over the
            logits and runs in the kernels too.
        excluded_ids: tokens outside of the softmax, as in `select_log_probs`.

    Returns:
        `log_probs` and, if requested, `token_entropy`, in float32 or the wider type of `hidden`.

    Raises:
        ValueError: if `temperature`, `logit_softcap` or `max_logits_bytes` is not positive, the types of `hidden` and
            `lm_head_weight` differ, or a label or another id lies outside the vocabulary or a label outside of its set
            (checked on a CPU only, as in `select_log_probs`).

    Examples:
        >>> fused_linear_log_probs(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        {'log_probs': tensor([-1.3863]), 'token_entropy': tensor([1.3863])}
        >>> fused_linear_log_probs(
        ...     torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]), kept_ids=torch.tensor([[0, 3]])
        ... )
        {'log_probs': tensor([-0.6931]), 'token_entropy': tensor([0.6931])}

    References:
        Wijmans et al. 2024, arXiv:2411.09009, section 3 (log-probabilities from blocks of logits); DeepSeek-AI 2025,
        arXiv:2512.02556, section 3.1 (keep sampling mask).
    """
    states, head = _prepare_inputs(hidden, lm_head_weight, bias, temperature, logit_softcap, max_logits_bytes)
    tokens = None if response_mask is None else _find_tokens(response_mask)
    selected = _select_tokens(states, tokens)
    targets = _select_tokens(rearrange(labels, "... -> (...)").long(), tokens)
    sets = TokenSets(kept_ids, excluded_ids).flatten().select(tokens)
    check_labels(targets, len(lm_head_weight))
    sets.check(targets, len(lm_head_weight))
    log_probs, entropy = _apply(_FusedLogProbs, selected, head, targets, sets, return_entropy)
    values = {"log_probs": log_probs} | ({"token_entropy": entropy} if return_entropy else {})
    return {name: _scatter_tokens(value, tokens, labels.shape) for name, value in values.items()}


@disable_compile
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
    max_logits_bytes: int | None = None,
    kept_ids: Int[Tensor, "batch seq kept"] | None = None,
    excluded_ids: Int[Tensor, "batch seq excluded"] | None = None,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Return $L = \sum_t f(\log p_{y_t}, H_t)$ over the response tokens, from one pass over blocks of logits.

    The gradient of a block is computed while its logits are in memory, so that any size takes three matrix products
    and the memory of one block. This requires a loss that is a sum of terms, each of which depends on a single token.
    Every token loss of this library with its weights has this form; for losses of whole responses use
    `fused_linear_log_probs`. Differentiable once in `hidden`, `lm_head_weight` and `bias`.

    Args:
        hidden: $h$, the input of the output layer at the position before each label.
        lm_head_weight: $W$ of the output layer.
        labels: $y$, token ids in $[0, V)$; any value where `response_mask` is False.
        loss_fn: $f$, called for each block of tokens as `loss_fn(log_probs, token_entropy, take)`. Both values are
            Float "1 tokens", in nats. `take(tensor)` returns the values of these tokens in a tensor of shape "batch
            seq" or "batch 1", as "1 tokens". The result is the share of these tokens in the loss, a scalar.
        response_mask: True for the tokens that enter the loss; nothing else is read or computed.
        bias: $b$ of the output layer, if it has one.
        temperature: $T > 0$ of the sampled distribution.
        logit_softcap: $c > 0$ of a model whose logits are $c \tanh((W h + b) / c)$.
        max_logits_bytes: maximum size of a block of logits; the default is that of `fused_linear_log_probs`.
        kept_ids: if given, the softmax is over these tokens only, as in `select_log_probs`.
        excluded_ids: tokens outside of the softmax, as in `select_log_probs`.

    Returns:
        The loss, in float32 or wider, and detached `log_probs` and `token_entropy`, 0 outside the mask.

    Raises:
        ValueError: as in `fused_linear_log_probs`.

    Examples:
        >>> advantages, weights = torch.tensor([[2.0]]), torch.tensor([[0.5, 0.5]])
        >>> loss, values = fused_linear_token_loss(
        ...     torch.ones(1, 2, 2), torch.zeros(4, 2), torch.tensor([[3, 1]]),
        ...     lambda log_probs, _, take: -(take(weights) * take(advantages) * log_probs).sum(),
        ...     response_mask=torch.tensor([[True, True]]),
        ... )
        >>> loss, values["log_probs"]
        (tensor(2.7726), tensor([[-1.3863, -1.3863]]))
    """
    states, head = _prepare_inputs(hidden, lm_head_weight, bias, temperature, logit_softcap, max_logits_bytes)
    tokens = _find_tokens(response_mask)
    selected = _select_tokens(states, tokens)
    targets = _select_tokens(rearrange(labels, "... -> (...)").long(), tokens)
    sets = TokenSets(kept_ids, excluded_ids).flatten().select(tokens)
    check_labels(targets, len(lm_head_weight))
    sets.check(targets, len(lm_head_weight))

    def block_loss(log_probs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        place = tokens[block]
        row, column = place // labels.shape[1], place % labels.shape[1]
        return loss_fn(log_probs, entropy, lambda tensor: tensor[row, column if tensor.shape[1] > 1 else 0][None])

    loss, log_probs, entropy = _apply(_FusedTokenLoss, selected, head, targets, sets, block_loss)
    values = {"log_probs": log_probs, "token_entropy": entropy}
    return loss, {name: _scatter_tokens(value, tokens, labels.shape) for name, value in values.items()}


class _FusedLogProbs(torch.autograd.Function):
    """Log-probs and entropies, whose gradient uses kept or recomputed exponentials of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int[Tensor, " tokens"],
        head: LinearHead,
        sets: TokenSets,
        with_entropy: bool,
    ) -> tuple[Tensor | None, ...]:
        head = head._replace(weight=weight, bias=bias)
        parts, logits = [], None
        keeps_logits = any(ctx.needs_input_grad) and head.fits(len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.iterate_blocks(len(hidden)):
                logits = head.compute_logits(hidden[rows], sets.select(rows))
                parts.append(
                    compute_softmax_stats(
                        logits, labels[rows], head.scaling, with_entropy=with_entropy, store_exp=keeps_logits
                    )
                )
        stats = concatenate_stats(parts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, *stats)
        ctx.head = head._replace(weight=weight.new_empty(0), bias=None)
        ctx.sets = sets
        ctx.kept_exp = logits if keeps_logits else None
        return stats.as_outputs()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 7
        hidden, weight, bias, labels, *columns = ctx.saved_tensors
        head, stats = ctx.head._replace(weight=weight, bias=bias), SoftmaxStats(*columns)
        grad = StatsGrad.from_outputs(grad_log_probs, grad_entropy)
        # The gradient overwrites the kept exponentials, so a second backward pass computes them again.
        kept_exp, ctx.kept_exp = ctx.kept_exp, None
        gradients = HeadGradients(head, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.iterate_blocks(len(hidden)):
                exp, block_stats = kept_exp, stats.select(rows)
                if exp is None:
                    exp = head.compute_logits(hidden[rows], ctx.sets.select(rows))
                    store_exponentials(exp, head.scaling, block_stats)
                gradients.add(rows, exp, labels[rows], block_stats, grad.select(rows))
        return *gradients.result(), None, None, None, None


class _FusedTokenLoss(torch.autograd.Function):
    """The loss, whose gradients are computed block by block in forward and kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int[Tensor, " tokens"],
        head: LinearHead,
        sets: TokenSets,
        block_loss: Callable[[Tensor, Tensor, slice], Tensor],
    ) -> tuple[Tensor | None, ...]:
        head = head._replace(weight=weight, bias=bias)
        loss, parts = hidden.new_zeros((), dtype=get_wide_dtype(hidden)), []
        gradients = HeadGradients(head, hidden, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.iterate_blocks(len(hidden)):
                exp = head.compute_logits(hidden[rows], sets.select(rows))
                stats = compute_softmax_stats(exp, labels[rows], head.scaling, with_entropy=True, store_exp=True)
                share, grad = _differentiate_loss(block_loss, stats, rows)
                loss += share
                parts.append(stats)
                gradients.add(rows, exp, labels[rows], stats, grad)
        log_probs, entropy = concatenate_stats(parts).as_outputs()
        # Saved by autograd, which frees them after backward unless the graph is retained.
        ctx.save_for_backward(*gradients.result())
        ctx.mark_non_differentiable(log_probs, entropy)
        return loss, log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if part is None else scale_gradient(part, grad_loss) for part in ctx.saved_tensors)
        return *scaled, None, None, None, None


def _differentiate_loss(
    block_loss: Callable[[Tensor, Tensor, slice], Tensor], stats: SoftmaxStats, rows: slice
) -> tuple[Tensor, StatsGrad]:
    """Return the loss of a block and its gradient in the log-probs and entropies."""
    with torch.enable_grad():
        values = (stats.log_probs, stats.entropy)
        leaves = [value.detach().requires_grad_() for value in values if value is not None]
        log_probs, entropy = (rearrange(leaf, "token 1 -> 1 token") for leaf in leaves)
        share = block_loss(log_probs, entropy, rows)
        if not share.requires_grad:
            return share, StatsGrad(None, None)
        grad = StatsGrad(*torch.autograd.grad(share, leaves, allow_unused=True))
    return share.detach(), grad


def _prepare_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    max_logits_bytes: int | None,
) -> tuple[Tensor, LinearHead]:
    """Check the arguments, cast them as autocast does, and return hidden states "tokens width" and the head."""
    require(0 < temperature < float("inf"), "temperature", temperature, "positive and finite")
    require(logit_softcap is None or logit_softcap > 0, "logit_softcap", logit_softcap, "positive, or None for no cap")
    max_logits_bytes = choose_max_logits_bytes(hidden.device) if max_logits_bytes is None else max_logits_bytes
    require(max_logits_bytes > 0, "max_logits_bytes", max_logits_bytes, "positive: a row of logits needs memory")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    require(
        hidden.dtype == weight.dtype,
        "lm_head_weight",
        f"[{weight.dtype}]",
        f"of the type of hidden, {hidden.dtype}: cast one of them",
    )
    states = rearrange(hidden, "... width -> (...) width")
    return states, LinearHead(weight, bias, Scaling(temperature, logit_softcap), max_logits_bytes)


def _apply(function: Any, hidden: Tensor, head: LinearHead, labels: Tensor, sets: TokenSets, argument: object) -> Any:
    return function.apply(hidden, head.weight, head.bias, labels, head, sets, argument)


def _find_tokens(mask: Tensor) -> Int[Tensor, " tokens"]:
    """Return the flat indices of the tokens that the mask keeps."""
    return rearrange(mask, "... -> (...)").nonzero()[:, 0]


def _select_tokens(values: Tensor, tokens: Tensor | None) -> Tensor:
    return values if tokens is None else values.index_select(0, tokens)


def _scatter_tokens(values: Float[Tensor, " tokens"], tokens: Tensor | None, shape: torch.Size) -> Tensor:
    """Return `values` at their places in a tensor of this shape, 0 elsewhere."""
    if tokens is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy(0, tokens, values).view(shape)
