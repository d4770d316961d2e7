"""GRPO (Algorithm 3): `python drivers/train.py --help`."""

# isort: off
from drivers import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from drivers import ranks
from drivers.batch import RolloutBatch, make_rollout_batch
from drivers.collect import Rollouts, collect
from drivers.config import GrpoConfig, parse_train_config
from drivers.data import Question
from drivers.formula import show
from drivers.grading import Grader
from drivers.guards import Anomaly, find_in_rollouts, find_in_update
from drivers.interrupts import uninterrupted
from drivers.metrics import UpdateMetrics
from drivers.objective import compute_loss, prepare_rollouts, rows_with_gradient, weigh_step
from drivers.program import conduct, ending_in_one_line
from drivers.rollout import RolloutEngine
from drivers.run import Run, prepare
from drivers.scoring import plan_micro_batches, score
from drivers.state import TrainingState


def train(
    config: GrpoConfig,
    policy: nn.Module,
    engine: RolloutEngine,
    grade: Grader,
    train_set: Sequence[Question],
    val_set: Sequence[Question],
    run: Run,
    reference: nn.Module | None = None,
) -> None:
    """The loop. Its parts are built by `drivers.run.prepare`, or by you."""
    state = run.begin(TrainingState(config, policy))
    ranks.lead(lambda: engine.load_weights(version=state.step))
    run.check_engine(engine, policy, val_set, version=state.step)
    if state.step == 0:
        run.evaluate(engine, val_set, grade, step=0)

    sample = partial(collect, config, engine, grade, train_set, state.draw)
    with Rollouts(sample, state, run, config.async_steps, engine.sleep) as batches:
        for step in run.steps():
            # D_b ~ D;  o_1 .. o_G ~ pi_old(. | q) for each question q of D_b;  r_i = R(q, o_i).
            collected = batches.of(step)
            batches.begin(step + 1)

            # A_i = r_i against its group;  pi <- ascend the objective on these rollouts, in one update or several.
            metrics = UpdateMetrics(collected.shown_completions)
            unsound = find_in_rollouts(collected.facts, has_other_pull=config.has_pull_beside_rewards)
            entropy_coef = state.bonus.of_step(collected.facts["rollout_entropy"])
            with run.phase("update"):
                rollouts = make_rollout_batch(collected.completions, collected.raw_rewards, config.group_size)
                rollouts = prepare_rollouts(
                    config, policy, reference, rollouts, collected.scores, collected.greedy_rewards
                )
                for _ in range(config.epochs_per_rollout_batch):
                    for train_batch in rollouts.shuffled(state.shuffle).split(config.train_batch_size):
                        update(config, policy, train_batch, state, run, step, metrics, unsound, entropy_coef)
                state.step = step

            # pi_old <- pi.
            batches.wait()
            with run.phase("push"), uninterrupted():
                ranks.lead(partial(engine.load_weights, version=step))
            if run.is_first(step):
                run.check_engine(engine, policy, val_set, version=step)
            if step % config.eval_steps == 0 or step == config.n_grpo_steps:
                run.evaluate(engine, val_set, grade, step=step)
            coefficient = {"entropy_coef": entropy_coef} if config.has_entropy_bonus else {}
            run.report(step, collected.facts | metrics.summary() | coefficient)
            run.log_samples(step, collected.shown, metrics.of_shown(), rollouts.advantages)
            state.mark()
            if step % config.checkpoint_steps == 0 or step == config.n_grpo_steps:
                run.save(policy, f"checkpoint-{step}")


def update(
    config: GrpoConfig,
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
    found = find_in_update(loss.item(), norm.item(), state.grad_norms, drift)
    with uninterrupted():
        made = state.update(norm.item(), made=run.allows(step, [*unsound, *found]))
        metrics.add_update(loss, norm, facts, made=made)


def accumulate_gradients(
    policy: nn.Module, train_batch: RolloutBatch, config: GrpoConfig, entropy_coef: float, metrics: UpdateMetrics
) -> torch.Tensor:
    """The loss of one optimizer step; its gradient is added up over micro-batches of any size."""
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    metrics.trained_tokens += train_batch.n_response_tokens
    pulling = rows_with_gradient(config, train_batch, entropy_coef)
    metrics.skipped_responses += len(train_batch) - len(pulling)  # exactly 0, without a forward pass
    watched_alone = entropy_coef == 0
    for (members, rows), counts in ranks.deal(list(plan_micro_batches(config, policy, train_batch, pulling))):
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
    return ranks.total(total)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: settings, parts, the loop."""
    with ending_in_one_line(GrpoConfig.program):
        config = parse_train_config(sys.argv[1:] if arguments is None else arguments)
        if config.show:
            print(show(config))
            return
        conduct(config, config, prepare, lambda run, parts: train(config, *parts[:5], run, parts.reference))


if __name__ == "__main__":
    main()
