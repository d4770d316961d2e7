"""The loss of one micro-batch, scaled for gradient accumulation, and train steps that also call `backward`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import require, shape_checked
from grpo_core.losses._ratios import clamp_log_ratio
from grpo_core.losses.aggregation import aggregate_token_losses, sum_weighted_losses
from grpo_core.losses.policy_gradient import compute_cross_entropy_loss, compute_policy_gradient_loss
from grpo_core.masking import masked_sum
from grpo_core.tensor_types import Metadata
from grpo_core.types import AggregationName, GroupSizes, LossTypeName


@shape_checked
def compose_policy_loss(
    policy_losses: Float[Tensor, "batch cols"],
    policy_weights: Float[Tensor, "batch _"],
    *,
    importance_weights: Float[Tensor, "batch _"] | None = None,
    kl: Float[Tensor, "batch seq"] | None = None,
    kl_coef: float = 0.0,
    token_entropy: Float[Tensor, "batch seq"] | None = None,
    entropy_coef: float = 0.0,
    token_weights: Float[Tensor, "batch seq"] | None = None,
    nll: Float[Tensor, "batch seq"] | None = None,
    nll_coef: float = 0.0,
    nll_weights: Float[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    r"""Return $L = \sum w_{ij} \kappa_{ij} \ell_{ij} + \sum_{it} w'_{it} (\beta k_{it} - c H_{it})$, the full loss.

    With `nll`, $\mu \sum_{it} v_{it} n_{it}$ is added, the negative log-likelihood of chosen responses. In VAPO, they
    are those with a positive reward, and $v$ is `compute_token_weights` of their tokens alone.

    The importance weight multiplies the policy loss after its clip, but no other term, because the trainer computes
    those itself. Differentiable in `policy_losses`, `kl`, `token_entropy` and `nll`; the gradient is exactly 0 where a
    weight is 0, even at NaN or infinity. If the weights are those of the whole batch, the losses of its parts add up
    to its loss.

    Args:
        policy_losses: $\ell$, one per token or one per response.
        policy_weights: $w$, from `compute_token_weights` for token losses or `compute_sequence_weights` for response
            losses.
        importance_weights: $\kappa$: one column, or one value per token for token losses.
        kl: $k$ of `estimate_kl`, in nats.
        kl_coef: $\beta \ge 0$, in units of loss per nat.
        token_entropy: $H$, the entropy of the distribution of each token, in nats, with its gradient.
        entropy_coef: $c$, in units of loss per nat.
        token_weights: $w'$ of `compute_token_weights`, required by `kl` and `token_entropy`.
        nll: $n$ of `compute_cross_entropy_loss`, in nats.
        nll_coef: $\mu \ge 0$, in units of loss per nat. VAPO uses 0.1.
        nll_weights: $v$, required by `nll`; 0 for the responses that are not imitated.

    Returns:
        The loss.

    Raises:
        ValueError: if weights do not match the losses, or `kl`, `token_entropy` or `nll` is given without its weights.

    Examples:
        >>> losses, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
        >>> compose_policy_loss(losses, weights, kl=torch.ones(1, 2), kl_coef=0.25, token_weights=weights)
        tensor(2.2500)

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3; Schulman et al. 2017, arXiv:1707.06347, eq. 9 (entropy bonus);
        Yue et al. 2025, arXiv:2504.05118, eq. 10 and 11 (negative log-likelihood of positive examples).
    """
    if importance_weights is not None:
        if importance_weights.shape[1] not in (1, policy_losses.shape[1]):
            raise ValueError(
                f"importance_weights have shape {tuple(importance_weights.shape)} and losses"
                f" {tuple(policy_losses.shape)}: losses of whole responses take one weight per response"
            )
        policy_losses = importance_weights.detach().to(policy_losses.dtype) * policy_losses
    loss = sum_weighted_losses(policy_losses, policy_weights)
    for name, coefficient, values in (("kl", kl_coef, kl), ("token_entropy", -entropy_coef, token_entropy)):
        if values is not None and coefficient != 0:
            if token_weights is None:
                raise ValueError(f"{name} needs token_weights; got None")
            loss = loss + coefficient * sum_weighted_losses(values, token_weights)
    if nll is not None and nll_coef != 0:
        if nll_weights is None:
            raise ValueError("nll needs nll_weights; got None")
        loss = loss + nll_coef * sum_weighted_losses(nll, nll_weights)
    return loss


@shape_checked
def describe_policy_update(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    flags: Metadata,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
) -> Metadata:
    r"""Return the means over the response tokens of the quantities that monitor an update.

    Detached scalars, 0 if there are no tokens; no value outside the mask is read. The mean over a step is the mean
    over its micro-batches weighted by `response_tokens`.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: True where a token belongs to a response.
        flags: the flags that an objective returns, Bool, one per token or (one column) per response.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats.

    Returns:
        `response_tokens`, their number; for each flag the share of tokens for which it is True, under the name
        `clip_fraction` for `is_clipped` (likewise `clip_fraction_low`) and `penalized_fraction` for `is_penalized`; if
        `old_log_probs` is given, `mean_ratio` (the mean of $\rho$) and `approx_kl` (the mean of $\rho - 1 - \log
        \rho$, an estimate of $\mathrm{KL}(\pi_{\mathrm{old}} \Vert \pi_\theta)$ in nats), with $\log \rho$ clamped to
        20 nats.

    Examples:
        >>> mask, flags = torch.tensor([[True, True]]), {"is_clipped": torch.tensor([[True, False]])}
        >>> describe_policy_update(torch.zeros(1, 2), mask, flags)
        {'response_tokens': tensor(2.), 'clip_fraction': tensor(0.5000)}

    References:
        Schulman 2020, "Approximating KL divergence" (k3).
    """
    tokens = response_mask.sum()
    metrics = {"response_tokens": tokens.to(torch.float32)}
    # 0 instead of NaN for an empty batch, so that averages weighted by tokens stay finite.
    counted = tokens.clamp(min=1)
    for name, flag in flags.items():
        key = name.replace("is_clipped", "clip_fraction").replace("is_penalized", "penalized_fraction")
        metrics[key] = (flag & response_mask).sum() / counted
    if old_log_probs is not None:
        with torch.no_grad():
            log_ratio = clamp_log_ratio(policy_log_probs - old_log_probs).masked_fill_(~response_mask, 0.0)
            growth = log_ratio.expm1()
            metrics["mean_ratio"] = (growth.sum() + tokens) / counted
            metrics["approx_kl"] = growth.sub_(log_ratio).sum() / counted
    return metrics


@shape_checked
def sft_microbatch_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Return $L = -\frac{1}{K N C} \sum_{it} m_{it} \log \pi_\theta(o_{it})$, the share of one of $K$ micro-batches.

    In nats. Differentiable in `policy_log_probs`; the gradient is exactly 0 outside the mask, even at NaN or infinity.
    A response without tokens adds 0 and still counts in $N$, the number of responses.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: $m$, True where a token belongs to the response.
        gradient_accumulation_steps: $K \ge 1$, the number of micro-batches per optimizer step.
        normalize_constant: $C > 0$, in tokens; 1 gives the sum over the tokens of a response.

    Returns:
        The loss, and detached scalars: `response_tokens` (their number) and `nll` (the mean of $-\log \pi_\theta$ over
        the response tokens, in nats per token; 0 if there are none).

    Raises:
        ValueError: if `gradient_accumulation_steps` is less than 1, or `normalize_constant` is not positive and
            finite.

    Examples:
        >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
        >>> loss, metadata = sft_microbatch_loss(log_probs, mask, gradient_accumulation_steps=2)
        >>> loss, metadata["nll"]
        (tensor(2.), tensor(2.))
    """
    _check_accumulation_steps(gradient_accumulation_steps)
    losses = compute_cross_entropy_loss(policy_log_probs, response_mask=response_mask)
    loss = aggregate_token_losses(losses, response_mask, "constant", normalize_constant=normalize_constant)
    return loss / gradient_accumulation_steps, {
        "response_tokens": response_mask.sum().to(torch.float32),
        "nll": _mean_over_tokens(-policy_log_probs.detach(), response_mask),
    }


@shape_checked
def grpo_microbatch_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    loss_type: LossTypeName,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    *,
    aggregation: AggregationName = "sequence_mean",
    normalize_constant: float | None = None,
    group_sizes: GroupSizes | None = None,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Return $L = \frac{1}{K} \sum_{it} w_{it} m_{it} \ell_{it}$, the share of one of $K$ micro-batches.

    The gradients of the $K$ shares add up to the gradient of the whole batch if the micro-batches have equal numbers
    of responses. "token_mean" has no such requirement and is not divided by $K$, because its constant counts the
    tokens of all micro-batches. If micro-batches differ in size, compute the weights of the whole step with
    `compute_token_weights` and use `compose_policy_loss`.

    Differentiable in `policy_log_probs` only; the gradient is exactly 0 outside the mask, and no argument is read
    there. A response without tokens adds 0 and still counts in the mean.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: $m$, True where a token belongs to the response.
        gradient_accumulation_steps: $K \ge 1$, the number of micro-batches per optimizer step.
        loss_type: $\ell$, one of the losses of `compute_policy_gradient_loss`.
        raw_rewards: $r_i$, required by "no_baseline".
        advantages: $A_i$, required by the other losses. NaN is not refused: the loss is NaN then.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, required by the two GRPO losses.
        cliprange: $\epsilon$, required by "grpo_clip".
        aggregation: $w$, one of the aggregations of `aggregate_token_losses`.
        normalize_constant: $C$ of `aggregate_token_losses`, in tokens.
        group_sizes: the number of responses to each question, required by "prompt_mean".

    Returns:
        The loss, and the metrics of `describe_policy_update`.

    Raises:
        ValueError: if `gradient_accumulation_steps` is less than 1, and as in `compute_policy_gradient_loss` and
            `aggregate_token_losses`.

    Examples:
        >>> log_probs, mask, advantages = torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2).bool(), torch.tensor([[2.0]])
        >>> loss, _ = grpo_microbatch_loss(log_probs, mask, 2, "reinforce_with_baseline", advantages=advantages)
        >>> loss
        tensor(2.)

    References:
        Shao et al. 2024, arXiv:2402.03300, algorithm 1 and eq. 3; Schulman 2020, "Approximating KL divergence" (k3).
    """
    _check_accumulation_steps(gradient_accumulation_steps)
    # The constant of "token_mean" already counts the tokens of all micro-batches.
    shares = 1 if aggregation == "token_mean" else gradient_accumulation_steps
    token_losses, flags = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange, response_mask=response_mask
    )
    loss = aggregate_token_losses(
        token_losses,
        response_mask,
        aggregation,
        normalize_constant=normalize_constant,
        group_sizes=group_sizes,
    )
    return loss / shares, describe_policy_update(policy_log_probs, response_mask, flags, old_log_probs)


@shape_checked
def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Compute $L$ of `sft_microbatch_loss` and call `backward`, which adds $\nabla L$ to the parameters' gradients.

    Arguments, metadata and errors are those of `sft_microbatch_loss`. The returned loss is detached, in nats.

    Examples:
        >>> log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
        >>> loss, metadata = sft_microbatch_train_step(log_probs, torch.tensor([[True, False]]), 2)
        >>> log_probs.grad
        tensor([[-0.5000,  0.0000]])
    """
    loss, metadata = sft_microbatch_loss(
        policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), metadata


@shape_checked
def grpo_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    loss_type: LossTypeName,
    raw_rewards: Float[Tensor, "batch 1"] | None = None,
    advantages: Float[Tensor, "batch 1"] | None = None,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
    cliprange: float | None = None,
    *,
    aggregation: AggregationName = "sequence_mean",
    normalize_constant: float | None = None,
    group_sizes: GroupSizes | None = None,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""Compute $L$ of `grpo_microbatch_loss` and call `backward`, which adds $\nabla L$ to the parameters' gradients.

    Arguments, metadata and errors are those of `grpo_microbatch_loss`. The returned loss is detached.

    Examples:
        >>> log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
        >>> mask, rewards = torch.tensor([[True, False]]), torch.tensor([[1.0]])
        >>> loss, metadata = grpo_microbatch_train_step(log_probs, mask, 2, "no_baseline", rewards)
        >>> log_probs.grad
        tensor([[-0.5000,  0.0000]])
    """
    loss, metadata = grpo_microbatch_loss(
        policy_log_probs,
        response_mask,
        gradient_accumulation_steps,
        loss_type,
        raw_rewards,
        advantages,
        old_log_probs,
        cliprange,
        aggregation=aggregation,
        normalize_constant=normalize_constant,
        group_sizes=group_sizes,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), metadata


def _check_accumulation_steps(gradient_accumulation_steps: int) -> None:
    require(gradient_accumulation_steps >= 1, "gradient_accumulation_steps", gradient_accumulation_steps, "at least 1")


def _mean_over_tokens(
    values: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the mean of a metric over the response tokens, 0 if there are none."""
    return masked_sum(values, response_mask) / response_mask.sum().clamp(min=1)
