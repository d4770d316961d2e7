"""From settings to functions of grpo_core: rewards to advantages, a step to weights, a micro-batch to its loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import grpo_core as core
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.objectives import OBJECTIVES, resolve_values
from drivers.training.batch import RolloutBatch


def weigh_step(config: AlgorithmSettings, batch: RolloutBatch) -> tuple[RolloutBatch, dict[str, float]]:
    """All that is a statistic of one optimizer step, before it is cut into micro-batches; and how it came out.

    A response that could not be scored is left out like one that was cut off under --mask-truncated: a reward of 0
    would teach that it is bad.
    """
    left_out = batch.unscored | batch.truncated if config.mask_truncated else batch.unscored
    mask = core.drop_truncated_responses(batch.response_mask, left_out)
    assert batch.advantages is not None  # `prepare_rollouts` took them
    kept, importance = mask, None
    facts: dict[str, float] = {}
    if config.importance != "none" and not config.computes_importance_weights_in_forward:
        assert batch.old_log_probs is not None  # `needs_old_log_probs` says so
        importance, inside, watched = correct_for_sampler(config, batch, batch.old_log_probs, mask)
        facts = describe_correction([watched])
        if config.importance != "truncate":
            kept = kept & inside
    if config.top_entropy_fraction is not None:
        assert batch.old_entropy is not None
        kept = kept & core.select_high_entropy(batch.old_entropy, mask, config.top_entropy_fraction)
    penalized = None
    high_covariance = OBJECTIVES[config.loss_type].high_covariance
    if high_covariance != "train":
        assert batch.old_log_probs is not None
        low, high = config.covariance_bounds if high_covariance == "drop" else (0.0, torch.inf)
        chosen = core.select_high_covariance(
            batch.advantages, batch.old_log_probs, mask, config.covariance_fraction, low=low, high=high
        )
        kept, penalized = (kept & ~chosen, None) if high_covariance == "drop" else (kept, chosen)
    counting: dict[str, Any] = {"rejected_tokens": config.rejected_tokens, "empty_responses": config.empty_responses}
    sizing: dict[str, Any] = {"group_sizes": batch.group_sizes}
    if config.aggregation == "constant":
        sizing["normalize_constant"] = float(config.sampling_max_tokens)
    if OBJECTIVES[config.loss_type].has_response_loss:
        weights = core.compute_sequence_weights(mask, kept=kept, **counting)
    else:
        weights = core.compute_token_weights(mask, config.aggregation, kept=kept, **sizing, **counting)
    tokens = batch.response_mask.sum().clamp(min=1)
    if config.mask_truncated or kept is not mask:
        facts["kept_tokens"] = (kept.sum() / tokens).item()
    if config.kl_coef > 0 and config.kl_in == "reward":
        assert batch.old_log_probs is not None
        assert batch.reference_log_probs is not None
        difference = batch.old_log_probs - batch.reference_log_probs
        facts["kl"] = (core.masked_sum(difference, batch.response_mask) / tokens).item()
    return replace(
        batch,
        raw_rewards=batch.raw_rewards.masked_fill(batch.raw_rewards.isnan(), 0.0),  # 0 times NaN would be NaN
        # The sampler's own log-probs in the place of the old policy's: two policies instead of three.
        old_log_probs=batch.sampler_log_probs if config.old_policy == "sampler" else batch.old_log_probs,
        policy_weights=weights,
        token_weights=core.compute_token_weights(
            mask, config.aggregation, empty_responses=config.empty_responses, **sizing
        ),
        importance_weights=importance,
        penalized=penalized,
    ), facts


def correct_for_sampler(
    config: AlgorithmSettings, batch: RolloutBatch, old_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
    """Importance weights, if there are any; which ratios lie within the bounds; and what both are described by."""
    sampler = batch.sampler_log_probs
    ratios = core.compute_importance_ratios(old_log_probs, sampler, mask, config.importance_level)
    bounds = {"low": config.importance_low, "high": config.importance_high}
    inside = core.keep_within_bounds(ratios, **bounds)
    weights = None
    if config.importance != "reject":
        cut = core.truncate_importance_weights if config.importance == "truncate" else core.mask_importance_weights
        weights = cut(ratios, **bounds)
        if config.self_normalize:
            weights = core.self_normalize_weights(weights, mask)
    watched = {"old": old_log_probs, "sampler": sampler, "mask": mask, "inside": (inside & mask).float()}
    if weights is not None:
        per_token = weights.shape == mask.shape
        watched |= {"weights": weights, "weighed": mask if per_token else mask.any(dim=1, keepdim=True)}
    return weights, inside, {name: value.detach().reshape(1, -1) for name, value in watched.items()}


def describe_correction(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mismatch of policy and sampler before any bound, and what the bounds left of it, over all the parts."""
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    facts = dict(core.describe_mismatch(whole["old"], whole["sampler"], whole["mask"]))
    facts["importance_in_bounds"] = whole["inside"].sum() / whole["mask"].sum().clamp(min=1)
    if "weights" in whole:
        facts["importance_ess"] = core.effective_sample_size(whole["weights"], whole["weighed"])
    return dict(zip(facts, torch.stack([value.double() for value in facts.values()]).tolist(), strict=True))


def rows_with_gradient(config: AlgorithmSettings, batch: RolloutBatch, entropy_coef: float) -> list[int]:
    """The responses of which any term has one; where the advantage is 0, the objective has none."""
    assert batch.advantages is not None
    assert batch.policy_weights is not None
    rows = range(len(batch))
    if entropy_coef > 0 or (config.kl_coef > 0 and config.kl_in == "loss"):
        return list(rows)
    signal = batch.advantages if OBJECTIVES[config.loss_type].uses_advantages else batch.raw_rewards
    pulls = (signal * batch.policy_weights != 0).any(dim=1)
    if batch.penalized is not None:
        pulls |= batch.penalized.any(dim=1)
    return [row for row in rows if pulls[row]]


def compute_loss(
    config: AlgorithmSettings, micro: RolloutBatch, scored: Mapping[str, Tensor], entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
    """The share of a micro-batch in the loss of its optimizer step, and what it is watched by.

    Last comes what the correction for the sampler is described by, where it is made here.
    """
    log_probs, mask = scored["log_probs"], micro.response_mask
    assert micro.policy_weights is not None
    # On-policy, pi_old is the policy of this very pass: the ratio is exactly 1, its gradient is not 0.
    old = log_probs.detach()
    if not config.uses_current_policy_as_old and micro.old_log_probs is not None:
        old = micro.old_log_probs
    losses, flags = compute_objective(config, micro, log_probs, old)
    weights, importance = micro.policy_weights, micro.importance_weights
    dropped, watched = None, None
    if config.computes_importance_weights_in_forward:
        assert micro.token_weights is not None
        counted = mask & (micro.token_weights > 0)
        importance, inside, watched = correct_for_sampler(config, micro, log_probs.detach(), counted)
        if config.importance != "truncate":
            weights = weights * inside
    if config.off_policy_threshold is not None:
        assert micro.advantages is not None
        kept = core.keep_on_policy_sequences(
            micro.advantages[:, :1], log_probs, micro.sampler_log_probs, mask, config.off_policy_threshold
        )
        weights, dropped = weights * kept, mask & ~kept
    kl = None
    if config.kl_coef > 0 and config.kl_in == "loss":
        assert micro.reference_log_probs is not None
        kl = core.estimate_kl(
            log_probs, micro.reference_log_probs, config.kl_estimator, old_log_probs=old, response_mask=mask
        )
    loss = core.compose_policy_loss(
        losses,
        weights,
        importance_weights=importance,
        kl=kl,
        kl_coef=config.kl_coef,
        token_entropy=scored["token_entropy"],
        entropy_coef=entropy_coef,
        token_weights=micro.token_weights,
    )
    uses_ratio = OBJECTIVES[config.loss_type].uses_ratio
    described = core.describe_policy_update(log_probs, mask, flags, old if uses_ratio else None)
    if kl is not None:
        described["kl"] = core.masked_sum(kl.detach(), mask) / mask.sum().clamp(min=1)
    if watched is not None and config.importance != "truncate":
        described["kept_tokens"] = watched["inside"].sum() / mask.sum().clamp(min=1)
    if dropped is not None:
        described["off_policy_dropped"] = dropped.sum() / mask.sum().clamp(min=1)
    return loss, described, watched


class EntropyBonus:
    """The coefficient of the entropy bonus, which with a target follows the entropy of what was sampled."""

    def __init__(self, config: AlgorithmSettings) -> None:
        self._target, self.value = config.entropy_target, config.entropy_coef

    def of_step(self, entropy: float) -> float:
        """What a step applies whose responses, before it, have this entropy per token."""
        if self._target is None or not math.isfinite(entropy):  # which the run is told of, or ended by
            return self.value
        self.value = core.adapt_entropy_coefficient(self.value, entropy, self._target)
        return self.value if entropy <= self._target else 0.0


def compute_objective(
    config: AlgorithmSettings, micro: RolloutBatch, log_probs: Tensor, old: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one loss per token or response, and where a bound binds."""
    objective = OBJECTIVES[config.loss_type]
    inputs = {
        "advantages": micro.advantages,
        "raw_rewards": micro.raw_rewards,
        "policy_log_probs": log_probs,
        "old_log_probs": old,
        "response_mask": micro.response_mask,
        "penalized": micro.penalized,
    }
    result = getattr(core, objective.function)(**objective.get_arguments(inputs, resolve_values(config)))
    return result if isinstance(result, tuple) else (result, {})
