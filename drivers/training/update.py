"""Make one optimizer step."""

from collections.abc import Sequence

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.signals import defer_signals
from drivers.settings.algorithm import AlgorithmSettings
from drivers.training.anomalies import Anomaly, check_update
from drivers.training.batch import RolloutBatch
from drivers.training.metrics import UpdateMetrics
from drivers.training.micro_batches import plan_micro_batches
from drivers.training.objective import compute_loss, rows_with_gradient, weigh_step
from drivers.training.run import Run
from drivers.training.scoring import score
from drivers.training.state import TrainingState


def update(
    config: AlgorithmSettings,
    policy: nn.Module,
    train_batch: RolloutBatch,
    state: TrainingState,
    run: Run,
    step: int,
    metrics: UpdateMetrics,
    unsound: Sequence[Anomaly] = (),
    entropy_coef: float = 0.0,
) -> None:
    """One optimizer step, unless something in it or, `unsound`, before it forbids that."""
    train_batch, facts = weigh_step(config, train_batch)
    loss = accumulate_gradients(policy, train_batch, config, entropy_coef, metrics)
    norm, drift = state.optimizer.clip(config.max_grad_norm), metrics.drift()
    found = check_update(loss.item(), norm.item(), state.grad_norms, drift)
    with defer_signals():
        made = state.update(norm.item(), made=run.should_apply_update(step, [*unsound, *found]))
        metrics.add_update(loss, norm, facts, made=made)


def accumulate_gradients(
    policy: nn.Module,
    train_batch: RolloutBatch,
    config: AlgorithmSettings,
    entropy_coef: float,
    metrics: UpdateMetrics,
) -> torch.Tensor:
    """The loss of one optimizer step; its gradient is added up over micro-batches of any size."""
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    metrics.trained_tokens += train_batch.n_response_tokens
    pulling = rows_with_gradient(config, train_batch, entropy_coef)
    metrics.skipped_responses += len(train_batch) - len(pulling)  # exactly 0, without a forward pass
    watched_alone = entropy_coef == 0
    for (members, rows), counts in distributed.shard_across_ranks(
        list(plan_micro_batches(config, policy, train_batch, pulling))
    ):
        micro = train_batch.select(members).to(device)
        scored = score(
            policy, micro, config.sampling_temperature, rows, with_entropy=True, detach_entropy=watched_alone
        )
        scored["log_probs"].retain_grad()
        loss, described, watched = compute_loss(config, micro, scored, entropy_coef)
        (loss if counts else 0 * loss).backward()  # type: ignore[no-untyped-call]
        if counts:
            total += loss.detach()
            metrics.add_micro_batch(micro, scored, described, watched)
    return distributed.all_reduce_sum_(total)
