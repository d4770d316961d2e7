"""Weigh the responses of an optimizer step, and compute the loss of each of its micro-batches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_core as core
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.tables import resolve_values
from drivers.training.batch import PreparedBatch, WeightedBatch


class Correction(NamedTuple):
    """The correction for a sampler whose log-probs differ from the trainer's."""

    weights: Tensor | None
    """Importance weights; None if tokens are rejected instead."""
    is_in_bounds: Tensor
    """Tokens whose importance ratio, or divergence from the sampler, is within the bounds."""
    statistics: dict[str, Tensor]
    """The tensors that `describe_correction` needs, each of one row."""


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss of a micro-batch, beside the settings."""

    batch: WeightedBatch
    log_probs: Tensor
    """Log-probs of the response tokens under the policy, with gradient."""
    token_entropy: Tensor
    entropy_coef: float


@dataclass(frozen=True)
class LossOutputs:
    """The share of a micro-batch in the loss of its optimizer step."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Means over the micro-batch's response tokens."""
    correction_statistics: dict[str, Tensor] = field(default_factory=dict)
    """`Correction.statistics`, if the forward pass of the loss computes importance weights; else empty."""


class PolicyLosses(NamedTuple):
    """Losses before aggregation."""

    losses: Tensor
    """One loss per token or per response."""
    flags: dict[str, Tensor]
    """Tokens or responses at which a clip bound is active, by bound."""


def weigh_step(config: AlgorithmSettings, batch: PreparedBatch) -> tuple[WeightedBatch, dict[str, float]]:
    """Weigh the losses of an optimizer step before it is split into micro-batches; return batch and metrics."""
    objective = config.objective
    mask = select_trained_responses(config, batch)
    metrics: dict[str, float] = {}
    filters: list[Tensor] = []
    importance_weights = None
    if config.importance != "none" and not config.computes_importance_weights_in_forward:
        correction = correct_for_sampler(config, batch.old_log_probs, batch.sampler_log_probs, mask)
        importance_weights = correction.weights
        metrics |= describe_correction([correction.statistics])
        if config.importance != "truncate":
            filters.append(correction.is_in_bounds)
    if config.top_entropy_fraction is not None:
        filters.append(core.select_high_entropy(batch.old_entropy, mask, config.top_entropy_fraction))
    if config.second_moment_threshold is not None:
        pair = (batch.old_log_probs, batch.sampler_log_probs)
        filters.append(core.keep_within_second_moment(*pair, mask, config.second_moment_threshold))
    if objective.high_covariance == "drop":
        filters.append(~select_high_covariance(config, batch, mask))
    penalized = torch.zeros_like(mask)
    if objective.high_covariance == "penalize":
        penalized = select_high_covariance(config, batch, mask)
    kept = reduce(torch.logical_and, filters, mask)
    if config.mask_truncated or filters:
        metrics["kept_tokens"] = (kept.sum() / _count_tokens(batch.response_mask)).item()
    if config.kl_coef > 0 and config.kl_in == "reward":
        difference = core.masked_sum(batch.old_log_probs - batch.reference_log_probs, batch.response_mask)
        metrics["kl"] = (difference / _count_tokens(batch.response_mask)).item()
    if config.teacher is not None:
        difference = core.masked_sum(batch.old_log_probs - batch.teacher_log_probs, batch.response_mask)
        metrics["teacher_kl"] = (difference / _count_tokens(batch.response_mask)).item()
    weighted = WeightedBatch.from_prepared(
        batch,
        old_log_probs=choose_old_log_probs(config, batch),
        objective_weights=compute_objective_weights(config, batch, mask, kept),
        token_weights=core.compute_token_weights(
            mask, config.aggregation, empty_responses=config.empty_responses, **_aggregation_arguments(config, batch)
        ),
        importance_weights=importance_weights,
        penalized=penalized,
        imitation_weights=weigh_imitation(config, batch, mask),
    )
    return weighted, metrics


def weigh_imitation(config: AlgorithmSettings, batch: PreparedBatch, mask: Tensor) -> Tensor:
    """Return the weight of each token's negative log-likelihood, equal for all tokens of rewarded responses."""
    imitated = mask & (batch.rewards > 0) & (config.positive_nll_coef > 0)
    return core.compute_token_weights(imitated, "token_mean")


def select_trained_responses(config: AlgorithmSettings, batch: PreparedBatch) -> Tensor:
    """Return the mask of tokens to train on: without responses that could not be scored or, if asked, truncated ones.

    A response without a reward is excluded because a reward of 0 would teach that it is bad.
    """
    excluded = batch.unscored | batch.truncated if config.mask_truncated else batch.unscored
    return batch.response_mask & ~excluded[:, None]


def select_high_covariance(config: AlgorithmSettings, batch: PreparedBatch, mask: Tensor) -> Tensor:
    """Return the tokens with the highest covariance of advantage and log-prob, which are dropped or penalized."""
    drops = config.objective.high_covariance == "drop"
    bounds = config.covariance_bounds if drops else (0.0, torch.inf)
    return core.select_high_covariance(
        batch.advantages, batch.old_log_probs, mask, config.covariance_fraction, low=bounds[0], high=bounds[1]
    )


def choose_old_log_probs(config: AlgorithmSettings, batch: PreparedBatch) -> Tensor | None:
    """Return the log-probs that the ratio refers to; None if they are those of the loss's own forward pass."""
    if config.uses_current_policy_as_old:
        return None
    return batch.sampler_log_probs if config.old_policy == "sampler" else batch.old_log_probs


def compute_objective_weights(config: AlgorithmSettings, batch: PreparedBatch, mask: Tensor, kept: Tensor) -> Tensor:
    """Return the weight of each policy loss in the optimizer step: of a token, or of a response."""
    counting: dict[str, Any] = {"rejected_tokens": config.rejected_tokens, "empty_responses": config.empty_responses}
    if config.objective.has_response_loss:
        return core.compute_sequence_weights(mask, kept=kept, **counting)
    arguments = _aggregation_arguments(config, batch)
    return core.compute_token_weights(mask, config.aggregation, kept=kept, **arguments, **counting)


def _aggregation_arguments(config: AlgorithmSettings, batch: PreparedBatch) -> dict[str, Any]:
    arguments: dict[str, Any] = {"group_sizes": batch.group_sizes}
    if config.aggregation == "constant":
        arguments["normalize_constant"] = float(config.sampling_max_tokens)
    return arguments


def _count_tokens(mask: Tensor) -> Tensor:
    return mask.sum().clamp(min=1)


def correct_for_sampler(
    config: AlgorithmSettings, log_probs: Tensor, sampler_log_probs: Tensor, mask: Tensor
) -> Correction:
    """Return the correction for the difference between the trainer's `log_probs` and the sampler's."""
    if config.importance_measure == "ratio":
        values = core.compute_importance_ratios(log_probs, sampler_log_probs, mask, config.importance_level)
    else:
        how = (config.importance_measure, config.importance_level)
        values = core.compute_importance_divergences(log_probs, sampler_log_probs, mask, *how)
    bounds = {"low": config.importance_low, "high": config.importance_high}
    is_in_bounds = core.keep_within_bounds(values, **bounds)
    statistics = {
        "old": log_probs,
        "sampler": sampler_log_probs,
        "mask": mask,
        "is_in_bounds": (is_in_bounds & mask).float(),
    }
    weights = None
    if config.importance != "reject":
        limit = core.truncate_importance_weights if config.importance == "truncate" else core.mask_importance_weights
        weights = limit(values, **bounds)
        if config.self_normalize:
            weights = core.self_normalize_weights(weights, mask)
        is_per_token = weights.shape == mask.shape
        statistics |= {"weights": weights, "is_weighted": mask if is_per_token else mask.any(dim=1, keepdim=True)}
    rows = {name: value.detach().reshape(1, -1) for name, value in statistics.items()}
    return Correction(weights, is_in_bounds, rows)


def describe_correction(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return metrics of the mismatch of policy and sampler, and of the bounds on it, over all `parts`."""
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    metrics = dict(core.describe_mismatch(whole["old"], whole["sampler"], whole["mask"]))
    metrics["importance_in_bounds"] = whole["is_in_bounds"].sum() / _count_tokens(whole["mask"])
    if "weights" in whole:
        metrics["importance_ess"] = core.effective_sample_size(whole["weights"], whole["is_weighted"])
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))


def find_responses_with_gradient(config: AlgorithmSettings, batch: WeightedBatch, entropy_coef: float) -> list[int]:
    """Return the responses that have a gradient. With advantage 0, only `dro` and other terms of the loss have one."""
    rows = range(len(batch))
    if entropy_coef > 0 or (config.kl_coef > 0 and config.kl_in == "loss"):
        return list(rows)
    if config.objective.has_gradient_without_signal:
        return list(rows)
    signal = batch.advantages if config.objective.uses_advantages else batch.rewards
    has_gradient = (signal * batch.objective_weights != 0).any(dim=1) | batch.penalized.any(dim=1)
    has_gradient = has_gradient | (batch.imitation_weights > 0).any(dim=1)
    return [row for row in rows if has_gradient[row]]


def compute_loss(config: AlgorithmSettings, inputs: LossInputs) -> LossOutputs:
    """Return the share of a micro-batch in the loss of its optimizer step."""
    batch, log_probs, mask = inputs.batch, inputs.log_probs, inputs.batch.response_mask
    # The policy of this forward pass as the old one makes the ratio exactly 1, but with a gradient.
    old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
    losses, flags = compute_objective(config, batch, log_probs, old)
    uses_ratio = config.objective.uses_ratio
    metrics = dict(core.describe_policy_update(log_probs, mask, flags, old if uses_ratio else None))
    weights, importance_weights = batch.objective_weights, batch.importance_weights
    statistics: dict[str, Tensor] = {}
    if config.computes_importance_weights_in_forward:
        counted = mask & (batch.token_weights > 0)
        correction = correct_for_sampler(config, log_probs.detach(), batch.sampler_log_probs, counted)
        importance_weights, statistics = correction.weights, correction.statistics
        if config.importance != "truncate":
            weights = weights * correction.is_in_bounds
            metrics["kept_tokens"] = statistics["is_in_bounds"].sum() / _count_tokens(mask)
    if config.off_policy_threshold is not None:
        kept = core.keep_on_policy_sequences(
            batch.advantages[:, :1], log_probs, batch.sampler_log_probs, mask, config.off_policy_threshold
        )
        weights = weights * kept
        metrics["off_policy_dropped"] = (mask & ~kept).sum() / _count_tokens(mask)
    kl = None
    if config.kl_coef > 0 and config.kl_in == "loss":
        kl = core.estimate_kl(
            log_probs, batch.reference_log_probs, config.kl_estimator, old_log_probs=old, response_mask=mask
        )
        metrics["kl"] = core.masked_sum(kl.detach(), mask) / _count_tokens(mask)
    loss = core.compose_policy_loss(
        losses,
        weights,
        importance_weights=importance_weights,
        kl=kl,
        kl_coef=config.kl_coef,
        token_entropy=inputs.token_entropy,
        entropy_coef=inputs.entropy_coef,
        token_weights=batch.token_weights,
        nll=core.compute_cross_entropy_loss(log_probs, response_mask=mask),
        nll_coef=config.positive_nll_coef,
        nll_weights=batch.imitation_weights,
    )
    return LossOutputs(loss, metrics, statistics)


def compute_objective(config: AlgorithmSettings, batch: WeightedBatch, log_probs: Tensor, old: Tensor) -> PolicyLosses:
    """Return the losses of `--loss-type`, before they are weighted."""
    objective = config.objective
    inputs = {
        "advantages": batch.advantages,
        "raw_rewards": batch.rewards,
        "policy_log_probs": log_probs,
        "old_log_probs": old,
        "response_mask": batch.response_mask,
        "penalized": batch.penalized,
    }
    # By default compute_naive_policy_gradient_loss; the table OBJECTIVES names the others.
    function = objective.own_function or getattr(core, objective.function)
    result = function(**objective.get_arguments(inputs, resolve_values(config)))
    return PolicyLosses(*result) if isinstance(result, tuple) else PolicyLosses(result, {})


class EntropyBonus:
    """The coefficient of the entropy bonus; with `--entropy-target` it adapts to the entropy of the rollouts."""

    def __init__(self, config: AlgorithmSettings) -> None:
        self._target, self.value = config.entropy_target, config.entropy_coef

    def adapt(self, entropy: float) -> float:
        """Return the coefficient of a step whose responses were sampled with this entropy per token."""
        if self._target is None or not math.isfinite(entropy):  # an entropy that is not finite is an anomaly
            return self.value
        self.value = core.adapt_entropy_coefficient(self.value, entropy, self._target)
        return self.value if entropy <= self._target else 0.0
