"""Adapters for the official tests of CS336 assignment 5, edition 2026: its signatures over functions of grpo_core.

Copy this file to `tests/adapters.py` of the course's repository. docs/tutorials/cs336.md explains both editions.
"""

import math

import torch

import grpo_core

run_tokenize_prompt_and_output = grpo_core.tokenize_prompt_and_output
run_get_response_log_probs = grpo_core.get_response_log_probs


def run_compute_rollout_rewards(reward_fn, rollout_responses, repeated_ground_truths):
    """Return the reward of each response, and the means of the reward and its parts."""
    pairs = zip(rollout_responses, repeated_ground_truths, strict=True)
    scores = [reward_fn(response, ground_truth) for response, ground_truth in pairs]
    return grpo_core.read_rewards(scores), grpo_core.describe_rewards(scores, len(scores))


def run_compute_group_normalized_rewards(
    raw_rewards, group_size, baseline="mean", advantage_eps=1e-6, advantage_normalizer="std"
):
    """Return the advantages of the edition's four estimators, and the shares of zero-signal groups."""
    match baseline, advantage_normalizer:
        case "mean", "std":  # GRPO
            advantages = grpo_core.normalize_group_rewards(raw_rewards, group_size, advantage_eps=advantage_eps)
        case "mean", "none":  # Dr. GRPO
            advantages = grpo_core.normalize_group_rewards(raw_rewards, group_size, normalize_by_std=False)
        case "mean", "mean":  # MaxRL, which needs no epsilon: a group without reward has advantage 0
            advantages = grpo_core.compute_maxrl_advantages(raw_rewards, group_size)
        case "none", "none":  # RFT
            advantages = raw_rewards
        case _:
            raise ValueError(f"baseline={baseline!r}, advantage_normalizer={advantage_normalizer!r}: not implemented")
    return advantages, grpo_core.describe_silent_groups(raw_rewards, group_size)


def run_compute_policy_gradient_loss(
    raw_rewards_or_advantages,
    policy_log_probs,
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    response_mask=None,
):
    """Return the loss of each token and the flags of the clip. GSPO's loss of a response is that of its tokens."""
    advantages = raw_rewards_or_advantages.reshape(-1, 1)
    match importance_reweighting_method:
        case "none":
            return grpo_core.compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
        case "noclip":
            return grpo_core.compute_grpo_no_clip_loss(advantages, policy_log_probs, old_log_probs)
        case "grpo":
            return grpo_core.compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
        case "gspo":
            mask = torch.ones_like(policy_log_probs, dtype=torch.bool) if response_mask is None else response_mask
            losses, flags = grpo_core.compute_gspo_loss(advantages, policy_log_probs, old_log_probs, mask, cliprange)
            return losses.expand_as(policy_log_probs), flags
        case _:
            raise ValueError(f"importance_reweighting_method={importance_reweighting_method!r}: not implemented")


def run_aggregate_loss_across_microbatch(
    per_token_policy_gradient_loss, mask, loss_normalization="sequence", normalization_constant=None
):
    """Return the mean over responses of their mean losses, or the sum of all losses over the constant."""
    weights = _weigh_tokens(mask, loss_normalization, normalization_constant)
    return grpo_core.sum_weighted_losses(per_token_policy_gradient_loss, weights)


def run_grpo_train_step(
    model,
    tokenizer,
    optimizer,
    gradient_accumulation_steps,
    max_grad_norm,
    reward_fn,
    repeated_prompts,
    rollout_responses,
    repeated_ground_truths,
    group_size,
    baseline="mean",
    advantage_eps=1e-6,
    advantage_normalizer="std",
    importance_reweighting_method="none",
    old_log_probs=None,
    cliprange=None,
    loss_normalization="sequence",
    normalization_constant=None,
):
    """Make one optimizer step on graded responses, and return the loss of the batch and statistics."""
    rewards, statistics = run_compute_rollout_rewards(reward_fn, rollout_responses, repeated_ground_truths)
    advantages, silent_groups = run_compute_group_normalized_rewards(
        rewards, group_size, baseline, advantage_eps, advantage_normalizer
    )
    batch = run_tokenize_prompt_and_output(repeated_prompts, rollout_responses, tokenizer)
    batch |= {"advantages": advantages, "old_log_probs": old_log_probs}
    # Weights of the whole batch, so that the losses of its micro-batches add up, whatever their sizes.
    batch["weights"] = _weigh_tokens(batch["response_mask"], loss_normalization, normalization_constant)
    losses, updates = [], []
    for rows in torch.arange(len(rewards)).chunk(gradient_accumulation_steps):
        micro = {name: None if values is None else values[rows].to(model.device) for name, values in batch.items()}
        log_probs = run_get_response_log_probs(model, micro["input_ids"], micro["labels"], False)["log_probs"]
        token_losses, flags = run_compute_policy_gradient_loss(
            micro["advantages"],
            log_probs,
            importance_reweighting_method,
            micro["old_log_probs"],
            cliprange,
            micro["response_mask"],
        )
        loss = grpo_core.sum_weighted_losses(token_losses, micro["weights"])
        loss.backward()
        losses.append(loss.detach())
        updates.append(grpo_core.describe_policy_update(log_probs, micro["response_mask"], flags))
    grad_norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), math.inf if max_grad_norm is None else max_grad_norm
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = torch.stack([update.pop("response_tokens") for update in updates])
    means = {name: (torch.stack([u[name] for u in updates]) * tokens).sum() / tokens.sum() for name in updates[0]}
    return torch.stack(losses).sum(), {**statistics, **silent_groups, **means, "grad_norm": grad_norm}


def _weigh_tokens(mask, loss_normalization, normalization_constant):
    """Return the weight of each token. The edition's constant divides the batch, grpo_core's each response."""
    if loss_normalization == "sequence":
        return grpo_core.compute_token_weights(mask, "sequence_mean")
    if loss_normalization != "constant" or normalization_constant is None:
        raise ValueError(
            f"loss_normalization={loss_normalization!r}, normalization_constant={normalization_constant}: pass "
            "'sequence', or 'constant' with its constant"
        )
    return grpo_core.compute_token_weights(mask, "constant", normalize_constant=normalization_constant / len(mask))
