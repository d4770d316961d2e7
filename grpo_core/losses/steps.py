"""One micro-batch: the terms of a loss put together, scaled for accumulation; the train steps add `backward`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core.losses._ratios import hold
from grpo_core.losses.aggregation import aggregate_token_losses, sum_weighted_losses
from grpo_core.losses.policy_gradient import compute_cross_entropy_loss, compute_policy_gradient_loss
from grpo_core.masking import masked_sum
from grpo_core.types import AggregationName, GroupSizes, LossTypeName, Metadata


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
) -> Float[Tensor, ""]:
    r"""$L = \sum w_{ij} \kappa_{ij} \ell_{ij} + \sum_{it} w'_{it} (\beta k_{it} - c H_{it})$: one objective.

    The importance weight multiplies the objective alone, after its clip: KL and entropy are the trainer's own.
    Differentiable in `policy_losses`, `kl` and `token_entropy`; gradient exactly 0 where a weight is 0, whatever
    stands there. Sums of parts of a batch add up to the sum of the whole, if the weights are those of the whole.

    Args:
        policy_losses: $\ell$, one for each token or one for each response.
        policy_weights: $w$ of `compute_token_weights` or `compute_sequence_weights`, as the losses demand.
        importance_weights: $\kappa$: one column, or one for each token if the losses are those of tokens.
        kl: $k$ of `estimate_kl`, in nats.
        kl_coef: $\beta \ge 0$, in units of loss per nat.
        token_entropy: $H$ of each token's distribution, in nats, with its gradient.
        entropy_coef: $c$, in units of loss per nat.
        token_weights: $w'$ of `compute_token_weights`, for `kl` and `token_entropy`.

    Returns:
        The loss.

    Raises:
        ValueError: if weights do not fit the losses, or `kl` or `token_entropy` come without `token_weights`.

    Example:
        >>> losses, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, 0.5]])
        >>> compose_policy_loss(losses, weights, kl=torch.ones(1, 2), kl_coef=0.25, token_weights=weights)
        tensor(2.2500)

    References:
        Shao et al. 2024, arXiv:2402.03300, eq. 3; Schulman et al. 2017, arXiv:1707.06347, eq. 9 (entropy bonus).
    """
    if importance_weights is not None:
        if importance_weights.shape[1] not in (1, policy_losses.shape[1]):
            raise ValueError(
                f"importance_weights have shape {tuple(importance_weights.shape)} and losses"
                f" {tuple(policy_losses.shape)}: a loss of whole responses takes one weight per response"
            )
        policy_losses = importance_weights.detach().to(policy_losses.dtype) * policy_losses
    loss = sum_weighted_losses(policy_losses, policy_weights)
    for name, coefficient, values in (("kl", kl_coef, kl), ("token_entropy", -entropy_coef, token_entropy)):
        if values is not None and coefficient != 0:
            if token_weights is None:
                raise ValueError(f"{name} needs token_weights; got None")
            loss = loss + coefficient * sum_weighted_losses(values, token_weights)
    return loss


@shape_checked
def describe_policy_update(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    flags: Metadata,
    old_log_probs: Float[Tensor, "batch seq"] | None = None,
) -> Metadata:
    r"""$\frac{1}{n} \sum_{it} m_{it} x_{it}$ over the $n$ response tokens, of what a step is watched by.

    Detached scalars, 0 if there are no tokens; outside the mask nothing is read. Means of micro-batches, weighed by
    their `response_tokens`, are those of the step.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: True where a token belongs to a response.
        flags: the metadata of an objective, Bool, for each token or (one column) each response.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats.

    Returns:
        `response_tokens`, their count; for each flag the share of tokens it is True for, `is_clipped_low` as
        `clip_fraction_low`, `is_penalized` as `penalized_fraction`; if `old_log_probs` is given, `mean_ratio` ($\rho$)
        and `approx_kl` ($\rho - 1 - \log \rho$, an estimate of $\mathrm{KL}(\pi_{\mathrm{old}} \Vert \pi_\theta)$
        in nats), $\log \rho$ held within 20 nats.

    Example:
        >>> mask, flags = torch.tensor([[True, True]]), {"is_clipped": torch.tensor([[True, False]])}
        >>> describe_policy_update(torch.zeros(1, 2), mask, flags)
        {'response_tokens': tensor(2.), 'clip_fraction': tensor(0.5000)}

    References:
        Schulman 2020, "Approximating KL divergence" (k3).
    """
    tokens = response_mask.sum()
    described = {"response_tokens": tokens.to(torch.float32)}
    # Of nothing 0 and not NaN, so that an average weighted by tokens survives an empty batch.
    counted = tokens.clamp(min=1)
    for name, flag in flags.items():
        key = name.replace("is_clipped", "clip_fraction").replace("is_penalized", "penalized_fraction")
        described[key] = (flag & response_mask).sum() / counted
    if old_log_probs is not None:
        with torch.no_grad():
            log_ratio = hold(policy_log_probs - old_log_probs).masked_fill_(~response_mask, 0.0)
            growth = log_ratio.expm1()
            described["mean_ratio"] = (growth.sum() + tokens) / counted
            described["approx_kl"] = growth.sub_(log_ratio).sum() / counted
    return described


@shape_checked
def sft_microbatch_loss(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""$L = -\frac{1}{K N C} \sum_{it} m_{it} \log \pi_\theta(o_{it})$: one of $K$ micro-batches' share, in nats.

    Differentiable in `policy_log_probs`; gradient exactly 0 outside the mask, whatever stands there. A response
    without tokens adds 0 and still counts in $N$.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: $m$, True where a token belongs to the response.
        gradient_accumulation_steps: $K \ge 1$, micro-batches per optimizer step.
        normalize_constant: $C > 0$, in tokens; 1 sums over the tokens of a response.

    Returns:
        The loss, and detached scalars: `response_tokens` (count), `nll` (mean of $-\log \pi_\theta$ over response
        tokens, in nats per token; 0 if there are none).

    Raises:
        ValueError: if `gradient_accumulation_steps` is less than 1, or `normalize_constant` not positive and finite.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
        >>> loss, metadata = sft_microbatch_loss(log_probs, mask, gradient_accumulation_steps=2)
        >>> loss, metadata["nll"]
        (tensor(2.), tensor(2.))
    """
    accumulation = _at_least_one(gradient_accumulation_steps)
    losses = compute_cross_entropy_loss(policy_log_probs, response_mask=response_mask)
    loss = aggregate_token_losses(losses, response_mask, "constant", normalize_constant=normalize_constant)
    return loss / accumulation, {
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
    r"""$L = \frac{1}{K} \sum_{it} w_{it} m_{it} \ell_{it}$: one of $K$ micro-batches' share in the loss of a step.

    The gradients of the $K$ shares add up to the gradient of the whole batch. For all but "token_mean" that takes
    micro-batches of equal size; "token_mean" is not divided by $K$, for its constant counts the tokens of all. Where
    micro-batches differ, weigh the whole step with `compute_token_weights` and use `compose_policy_loss`.

    Differentiable in `policy_log_probs` alone; gradient exactly 0 outside the mask. No value outside the mask is ever
    read, in any argument. A response without tokens adds 0 and still counts.

    Args:
        policy_log_probs: $\log \pi_\theta$ of each token, in nats.
        response_mask: $m$, True where a token belongs to the response.
        gradient_accumulation_steps: $K \ge 1$, micro-batches per optimizer step.
        loss_type: the $\ell$ of `compute_policy_gradient_loss`.
        raw_rewards: $r_i$, for "no_baseline".
        advantages: $A_i$, for the other losses.
        old_log_probs: $\log \pi_{\mathrm{old}}$ of each token, in nats, for the two GRPO losses.
        cliprange: $\epsilon$, for "grpo_clip".
        aggregation: the $w$ of `aggregate_token_losses`.
        normalize_constant: the $C$ of `aggregate_token_losses`, in tokens.
        group_sizes: for "prompt_mean", the number of responses to each question.

    Returns:
        The loss, and the detached scalars of `describe_policy_update`.

    Raises:
        ValueError: if `gradient_accumulation_steps` is less than 1; as `compute_policy_gradient_loss` and
            `aggregate_token_losses`.

    Example:
        >>> log_probs, mask, advantages = torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2).bool(), torch.tensor([[2.0]])
        >>> loss, _ = grpo_microbatch_loss(log_probs, mask, 2, "reinforce_with_baseline", advantages=advantages)
        >>> loss
        tensor(2.)

    References:
        Shao et al. 2024, arXiv:2402.03300, algorithm 1 and eq. 3; Schulman 2020, "Approximating KL divergence" (k3).
    """
    # The constant of "token_mean" counts the tokens of all micro-batches: a second division would be one too many.
    accumulation = _at_least_one(gradient_accumulation_steps)
    shares = 1 if aggregation == "token_mean" else accumulation
    token_losses, per_token = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange, response_mask=response_mask
    )
    loss = aggregate_token_losses(
        token_losses,
        response_mask,
        aggregation,
        normalize_constant=normalize_constant,
        group_sizes=group_sizes,
    )
    return loss / shares, describe_policy_update(policy_log_probs, response_mask, per_token, old_log_probs)


@shape_checked
def sft_microbatch_train_step(
    policy_log_probs: Float[Tensor, "batch seq"],
    response_mask: Bool[Tensor, "batch seq"],
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Float[Tensor, ""], Metadata]:
    r"""$L$ of `sft_microbatch_loss`, then $\nabla L$ added to the gradients of whatever made `policy_log_probs`.

    Arguments, metadata and errors are those of `sft_microbatch_loss`; the loss comes back detached, in nats.

    Example:
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
    r"""$L$ of `grpo_microbatch_loss`, then $\nabla L$ added to the gradients of whatever made `policy_log_probs`.

    Arguments, metadata and errors are those of `grpo_microbatch_loss`; the loss comes back detached.

    Example:
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


def _at_least_one(gradient_accumulation_steps: int) -> int:
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} must be at least 1")
    return gradient_accumulation_steps


def _mean_over_tokens(
    values: Float[Tensor, "batch seq"], response_mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """A metric's mean; 0 over nothing."""
    return masked_sum(values, response_mask) / response_mask.sum().clamp(min=1)
