"""Prepare rollouts for training: rewards, log-probs before the first update, advantages."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

import grpo_core as core
from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError
from drivers.engines.protocol import Completion
from drivers.engines.teacher_server import TeacherServer
from drivers.policy.lora import without_lora
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.tables import resolve_values
from drivers.training.batch import PreparedBatch, RolloutBatch
from drivers.training.forward import forward_all


def compute_rewards(
    config: AlgorithmSettings, completions: Sequence[Completion], scores: Sequence[Mapping[str, float | None]]
) -> Tensor:
    """Return the reward of each response, with its length penalty; NaN for a response that could not be scored."""
    rewards = core.read_rewards(list(scores))
    lengths = torch.tensor([completion.n_sampled for completion in completions])
    longest = config.sampling_max_tokens
    match config.length_penalty:
        case "none":
            return rewards
        case "soft_overlong":
            return rewards + core.compute_soft_overlong_penalty(lengths, longest, config.penalized_tokens)
        case "cosine":
            correct = core.compute_cosine_length_reward(lengths, longest, 2.0, 1.0)
            wrong = core.compute_cosine_length_reward(lengths, longest, -10.0, 0.0)
            answers = [score.get("answer_reward", score["reward"]) or 0.0 for score in scores]
            shaped = torch.where(torch.tensor(answers) > 0, correct, wrong)
            # The cosine of a wrong answer is best at the limit, which must not make truncation pay.
            truncated = torch.tensor([completion.finish_reason == "length" for completion in completions])
            return shaped.masked_fill(truncated, -10.0).masked_fill(rewards.isnan(), torch.nan)


def prepare_rollouts(
    config: GrpoConfig,
    policy: nn.Module,
    reference: nn.Module | None,
    rollouts: RolloutBatch,
    scores: Sequence[Mapping[str, float | None]],
    greedy_rewards: Tensor | None,
    teacher: nn.Module | TeacherServer | None = None,
) -> PreparedBatch:
    """Compute everything that has one value per rollout batch: log-probs before the first update, then advantages."""
    known: dict[str, Tensor] = {}
    of_tokens: dict[str, Tensor] = {"response_mask": rollouts.response_mask}
    if config.needs_old_log_probs:
        requested = {
            "with_entropy": config.top_entropy_fraction is not None,
            "with_collisions": config.has_token_baselines,
        }
        token_values = forward_all(policy, rollouts, config, **requested)
        names = {"log_probs": "old_log_probs", "token_entropy": "old_entropy"}
        known |= {names[name]: values for name, values in token_values.items() if name in names}
        of_tokens |= token_values
        of_tokens["old_log_probs"] = token_values["log_probs"]
    if config.needs_reference:
        if reference is None and config.lora_rank == 0:
            raise ValueError(
                f"kl_coef={config.kl_coef} needs reference, a frozen copy of the initial policy; got None"
            )
        with nullcontext(reference) if reference is not None else without_lora(policy) as initial:
            known["reference_log_probs"] = forward_all(initial, rollouts, config)["log_probs"]
    if config.teacher is not None:
        if teacher is None:
            raise ValueError(f"{config.flag('teacher')} needs teacher, its model or server; got None")
        known["teacher_log_probs"] = compute_teacher_log_probs(config, teacher, rollouts)
    try:
        advantages = estimate_advantages(config, rollouts, scores, greedy_rewards, of_tokens)
        batch = PreparedBatch.from_rollouts(rollouts, advantages, **known)
        return replace(batch, advantages=finish_advantages(config, batch))
    except ValueError as error:  # the estimator does not accept these rewards
        raise TrainingAbortedError(f"--advantage {config.advantage}: {error}") from error


def compute_teacher_log_probs(
    config: GrpoConfig, teacher: nn.Module | TeacherServer, rollouts: RolloutBatch
) -> Tensor:
    """Return the teacher's log-prob of each response token. Of several ranks, the first asks a server."""
    if isinstance(teacher, nn.Module):
        return forward_all(teacher, rollouts, config)["log_probs"]
    log_probs = torch.tensor(distributed.run_on_rank_zero(partial(teacher.compute_log_probs, rollouts.completions)))
    return torch.zeros(rollouts.response_mask.shape).masked_scatter(rollouts.response_mask, log_probs)


def estimate_advantages(
    config: AlgorithmSettings,
    rollouts: RolloutBatch,
    scores: Sequence[Mapping[str, float | None]],
    greedy_rewards: Tensor | None,
    of_tokens: Mapping[str, Tensor],
) -> Tensor:
    """Return the advantages by `--advantage`, one per response or per token; zeros with `--teacher-only`.

    `of_tokens` has values of each token by name.
    """
    estimator, rewards = config.estimator, rollouts.rewards[:, 0]
    if config.teacher_only:
        return torch.zeros_like(rollouts.rewards)
    if estimator.function is None:
        return rollouts.rewards
    inputs = {
        **of_tokens,
        "rewards": rewards,
        "group_sizes": config.group_size,
        "lengths": rollouts.lengths,
        "greedy_rewards": greedy_rewards,
    }
    if estimator.compares_reward_parts:
        inputs["reward_parts"] = _stack_reward_parts(scores, list(config.weights_of_parts))
    # For `--advantage group`, normalize_group_rewards; the table ADVANTAGES names the others.
    function = estimator.own_function or getattr(core, estimator.function)
    advantages: Tensor = function(**estimator.get_arguments(inputs, resolve_values(config)))
    return advantages if estimator.is_per_token else rearrange(advantages, "response -> response 1")


def finish_advantages(config: AlgorithmSettings, batch: PreparedBatch) -> Tensor:
    """Return the advantages, minus a KL penalty in the reward, whitened if the estimator asks, plus the teacher's."""
    advantages = batch.advantages
    # A response without a reward is excluded from statistics over tokens too.
    mask = batch.response_mask & ~batch.unscored[:, None]
    if config.has_kl_in_reward:
        kl = core.estimate_kl(batch.old_log_probs, batch.reference_log_probs, "k1", response_mask=mask)
        advantages = advantages - config.kl_coef * core.compute_reward_to_go(kl, mask)
    if config.estimator.whitens_over_tokens:
        advantages = core.whiten_over_tokens(advantages, mask)
    if config.teacher is not None:
        taught = core.compute_distillation_advantages(batch.old_log_probs, batch.teacher_log_probs, mask)
        advantages = advantages + config.teacher_coef * taught
    return advantages


def _stack_reward_parts(scores: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> Tensor:
    """Return the named parts of each response's reward, one column per name; NaN for a response without a reward."""
    missing = [name for name in names for score in scores if score["reward"] is not None and name not in score]
    if missing:
        raise ValueError(f"it compares {' and '.join(names)}, but the reward function returned no {missing[0]}")
    values = [[None if score["reward"] is None else score[name] for name in names] for score in scores]
    return torch.tensor([[torch.nan if value is None else value for value in row] for row in values])
