"""Turn rewards into advantages."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

import grpo_core as core
from drivers.common.errors import TrainingAbortedError
from drivers.engines.protocol import Completion
from drivers.policy.lora import without_lora
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.objectives import ADVANTAGES, resolve_values
from drivers.training.batch import RolloutBatch
from drivers.training.scoring import score_all


def shape_rewards(
    config: AlgorithmSettings, completions: Sequence[Completion], scores: Sequence[Mapping[str, float | None]]
) -> Tensor:
    """The reward of each response, with what is added for its length; NaN where it could not be scored."""
    rewards = core.read_rewards(list(scores))
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    longest = config.sampling_max_tokens
    match config.length_penalty:
        case "none":
            return rewards
        case "soft_overlong":
            return rewards + core.compute_soft_overlong_penalty(lengths, longest, config.penalized_tokens)
        case "cosine":
            right = core.compute_cosine_length_reward(lengths, longest, 2.0, 1.0)
            wrong = core.compute_cosine_length_reward(lengths, longest, -10.0, 0.0)
            answers = [score.get("answer_reward", score["reward"]) or 0.0 for score in scores]
            shaped = torch.where(torch.tensor(answers) > 0, right, wrong)
            # A wrong answer must not gain by running into the limit, where its cosine is best.
            shaped = shaped.masked_fill(
                torch.tensor([completion.finish_reason == "length" for completion in completions]), -10.0
            )
            return shaped.masked_fill(rewards.isnan(), torch.nan)


def prepare_rollouts(
    config: GrpoConfig,
    policy: nn.Module,
    reference: nn.Module | None,
    rollouts: RolloutBatch,
    scores: Sequence[Mapping[str, float | None]],
    greedy_rewards: Tensor | None,
) -> RolloutBatch:
    """All that is one value per rollout batch: log-probs before the first update, then advantages."""
    if config.needs_old_log_probs:
        scored = score_all(policy, rollouts, config, with_entropy=config.top_entropy_fraction is not None)
        rollouts = replace(rollouts, old_log_probs=scored["log_probs"], old_entropy=scored.get("token_entropy"))
    if config.needs_reference:
        if reference is None and config.lora_rank == 0:
            raise ValueError(f"kl_coef={config.kl_coef} needs reference; got None: a frozen copy of the first policy")
        with nullcontext(reference) if reference is not None else without_lora(policy) as first:
            rollouts = replace(rollouts, reference_log_probs=score_all(first, rollouts, config)["log_probs"])
    elif config.kl_coef > 0:
        rollouts = replace(rollouts, reference_log_probs=rollouts.sampler_log_probs)
    try:
        return replace(rollouts, advantages=_advantages(config, rollouts, scores, greedy_rewards))
    except ValueError as error:  # rewards of a kind that the estimator cannot take
        raise TrainingAbortedError(f"--advantage {config.advantage}: {error}") from error


def _advantages(
    config: AlgorithmSettings,
    rollouts: RolloutBatch,
    scores: Sequence[Mapping[str, float | None]],
    greedy_rewards: Tensor | None,
) -> Tensor:
    """One column, or one value for each token where the divergence is in the reward."""
    estimator, rewards = ADVANTAGES[config.advantage], rollouts.raw_rewards[:, 0]
    inputs = {
        "rewards": rewards,
        "group_sizes": config.group_size,
        "lengths": rollouts.lengths,
        "greedy_rewards": greedy_rewards,
    }
    if estimator.compares_reward_parts:
        inputs["reward_parts"] = _stack_reward_parts(scores, list(config.weights_of_parts))
    advantages = rewards
    if estimator.function is not None:
        advantages = getattr(core, estimator.function)(**estimator.get_arguments(inputs, resolve_values(config)))
    # What was not scored has no part in statistics over tokens either.
    column, mask = advantages[:, None], core.drop_truncated_responses(rollouts.response_mask, rollouts.unscored)
    if config.kl_coef > 0 and config.kl_in == "reward":
        assert rollouts.old_log_probs is not None  # `needs_old_log_probs` says so
        assert rollouts.reference_log_probs is not None
        kl = core.estimate_kl(rollouts.old_log_probs, rollouts.reference_log_probs, "k1", response_mask=mask)
        column = column - config.kl_coef * core.compute_reward_to_go(kl, mask)
    return core.whiten_over_tokens(column, mask) if estimator.whitens_over_tokens else column


def _stack_reward_parts(scores: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> Tensor:
    """Return the named parts of each response's reward, one column per name; NaN for a response without a reward."""
    lacking = [name for name in names for score in scores if score["reward"] is not None and name not in score]
    if lacking:
        raise ValueError(f"it compares {' and '.join(names)}, and the reward function returned no {lacking[0]}")
    values = [[None if score["reward"] is None else score[name] for name in names] for score in scores]
    return torch.tensor([[torch.nan if value is None else value for value in row] for row in values])
