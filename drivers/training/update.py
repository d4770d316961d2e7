"""Make one optimizer step."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.signals import defer_signals
from drivers.settings.algorithm import AlgorithmSettings
from drivers.training.anomalies import Anomaly, check_update
from drivers.training.batch import PreparedBatch, WeightedBatch
from drivers.training.forward import forward
from drivers.training.metrics import UpdateMetrics
from drivers.training.micro_batches import plan_micro_batches
from drivers.training.objective import LossInputs, compute_loss, find_responses_with_gradient, weigh_step
from drivers.training.run import Run


def update(
    config: AlgorithmSettings,
    policy: nn.Module,
    train_batch: PreparedBatch,
    run: Run,
    step: int,
    metrics: UpdateMetrics,
    rollout_anomalies: Sequence[Anomaly] = (),
    entropy_coef: float = 0.0,
) -> None:
    """Make one optimizer step on a train batch, unless its own anomalies or those of the rollouts forbid it."""
    state = run.state
    weighted_batch, batch_metrics = weigh_step(config, train_batch)
    loss_scale = state.optimizer.loss_scale
    loss = accumulate_gradients(policy, weighted_batch, config, entropy_coef, metrics, loss_scale)
    norm = state.optimizer.clip_gradient(config.max_grad_norm)
    drift = metrics.drift()
    rewards = train_batch.rewards[:, 0].tolist()
    # If a scale of 1 is still too large, something else is wrong.
    is_overflow = loss_scale > 1 and math.isfinite(loss.item()) and not math.isfinite(norm.item())
    found = check_update(loss.item(), norm.item(), state.grad_norms, drift, rewards, is_overflow=is_overflow)
    is_allowed = run.anomalies.should_apply_update(step, [*rollout_anomalies, *found])
    run.hold_signals()
    with defer_signals():
        is_made = state.finish_update(norm.item(), apply=is_allowed and not is_overflow)
        metrics.add_update(loss, None if is_overflow else norm, batch_metrics, made=is_made)
    if is_overflow:
        run.display.say(
            f"step {step}: a gradient overflowed float16; the update is skipped, and the loss scale falls from "
            f"{loss_scale:g} to {state.optimizer.loss_scale:g}"
        )


def accumulate_gradients(
    policy: nn.Module,
    weighted_batch: WeightedBatch,
    config: AlgorithmSettings,
    entropy_coef: float,
    metrics: UpdateMetrics,
    loss_scale: float = 1.0,
) -> torch.Tensor:
    """Add up the gradient over micro-batches of any size, and return the loss of the train batch.

    The gradient is `loss_scale` times that of the loss, which is returned and recorded without the scale.
    """
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    metrics.trained_tokens += weighted_batch.n_response_tokens
    responses = find_responses_with_gradient(config, weighted_batch, entropy_coef)
    metrics.skipped_responses += len(weighted_batch) - len(responses)  # their gradient is exactly 0
    is_entropy_only_logged = entropy_coef == 0
    plan = list(plan_micro_batches(config, policy, weighted_batch, responses))
    for (members, rows), is_counted in distributed.shard_across_ranks(plan):
        micro = weighted_batch.select(members).to(device)
        token_values = forward(
            policy,
            micro,
            config.sampling_temperature,
            rows,
            with_entropy=True,
            detach_entropy=is_entropy_only_logged,
        )
        token_values["log_probs"].retain_grad()  # for metrics: the share of the gradient by sign of the advantage
        inputs = LossInputs(micro, token_values["log_probs"], token_values["token_entropy"], entropy_coef)
        outputs = compute_loss(config, inputs)
        # A rank without its own micro-batch repeats another with weight 0: all must take part in each gather.
        ((loss_scale if is_counted else 0.0) * outputs.loss).backward()  # type: ignore[no-untyped-call]
        if is_counted:
            total += outputs.loss.detach()
            metrics.add_micro_batch(micro, token_values, outputs.metrics, outputs.correction_statistics, loss_scale)
    return distributed.all_reduce_sum_(total)
