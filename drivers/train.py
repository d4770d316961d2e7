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
from drivers.config import GrpoConfig, exit_with, parse_train_config
from drivers.data import Question
from drivers.display import Display
from drivers.errors import EngineDiedError, UnsoundRunError, UsageError
from drivers.formula import show
from drivers.interrupts import terminate_as_interrupt, uninterrupted
from drivers.metrics import UpdateMetrics
from drivers.objective import compute_loss, prepare_rollouts, rows_with_gradient, weigh_step
from drivers.rollout import RolloutEngine
from drivers.run import Run, prepare
from drivers.scoring import plan_micro_batches, score
from drivers.state import TrainingState
from grpo_core import RewardFn


def train(
    config: GrpoConfig,
    policy: nn.Module,
    engine: RolloutEngine,
    reward_fn: RewardFn,
    train_set: Sequence[Question],
    val_set: Sequence[Question],
    run: Run,
    reference: nn.Module | None = None,
) -> None:
    """The loop. Its parts are built by `drivers.run.prepare`, or by you."""
    state = run.begin(TrainingState(config, policy))
    engine.load_weights(version=state.step)
    run.check_engine(engine, policy, val_set, version=state.step)
    if state.step == 0:
        run.evaluate(engine, val_set, reward_fn, step=0)

    sample = partial(collect, config, engine, reward_fn, train_set, state.draw)
    with Rollouts(sample, state, run, config.async_steps) as batches:
        for step in run.steps():
            # D_b ~ D;  o_1 .. o_G ~ pi_old(. | q) for each question q of D_b;  r_i = R(q, o_i).
            collected = batches.of(step)
            batches.begin(step + 1)

            # A_i = r_i against its group;  pi <- ascend the objective on these rollouts, in one update or several.
            metrics = UpdateMetrics()
            entropy_coef = state.bonus.of_step(collected.facts["rollout_entropy"])
            with run.phase("update"):
                rollouts = make_rollout_batch(collected.completions, collected.raw_rewards, config.group_size)
                rollouts = prepare_rollouts(
                    config, policy, reference, rollouts, collected.scores, collected.greedy_rewards
                )
                for _ in range(config.epochs_per_rollout_batch):
                    for train_batch in rollouts.shuffled(state.shuffle).split(config.train_batch_size):
                        train_batch, facts = weigh_step(config, train_batch)
                        loss = accumulate_gradients(policy, train_batch, config, entropy_coef, metrics)
                        with uninterrupted():
                            metrics.add_update(loss, state.optimizer.step(loss, config.max_grad_norm), facts)
                state.step = step

            # pi_old <- pi.
            batches.wait()
            with run.phase("push"), uninterrupted():
                engine.load_weights(version=step)
            if step == 1:
                run.check_engine(engine, policy, val_set, version=step)
            if step % config.eval_steps == 0 or step == config.n_grpo_steps:
                run.evaluate(engine, val_set, reward_fn, step=step)
            coefficient = {"entropy_coef": entropy_coef} if config.has_entropy_bonus else {}
            run.report(step, collected.facts | metrics.summary() | coefficient)
            state.mark()
            if step % config.checkpoint_steps == 0:
                run.save(policy, f"checkpoint-{step}")


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
    """The command line: settings, parts, the loop, and how it may end."""
    try:
        config = parse_train_config(sys.argv[1:] if arguments is None else arguments)
        if config.show:
            print(show(config))
            return
        # The first rank may wait for an engine that is asked, started again and asked once more.
        ranks.start(3 * config.engine_deadline_s)
        with Display(config.n_grpo_steps, quiet=not ranks.is_first()) as display, terminate_as_interrupt():
            run, parts = prepare(config, display)
            try:
                train(config, *parts[:5], run, parts.reference)
                saved = run.save(parts.policy, "final_model")
            except BaseException:  # whatever ends the run, the steps that were made are kept
                keep_what_was_made(run, parts.policy)
                raise
            finally:
                try:
                    run.finish()
                finally:
                    parts.engine.close()
            display.say(f"Done: {run.summary()}. Model: {saved}/  Curves: {run.folder}/curves.png")
        ranks.end()
    except UsageError as error:
        exit_with("train.py", error, status=2)
    except (UnsoundRunError, EngineDiedError) as error:
        exit_with("train.py", error, status=1)
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        exit_with("train.py", RuntimeError(f"another rank has ended: {error}"), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def keep_what_was_made(run: Run, policy: nn.Module) -> None:
    """A checkpoint of a run that was stopped. Of several ranks none knows what the others do: the last one stands."""
    if run.step == 0:
        return
    if ranks.size() > 1:
        run.display.say(f"Stopped after step {run.step}; what is kept is the last checkpoint in {run.folder}/")
        return
    saved = run.last_checkpoint()
    if saved is None:
        with uninterrupted():
            saved = run.save(policy, f"checkpoint-{run.step}-stopped")
    run.display.say(f"Stopped after step {run.step}; the weights of the last update are in {saved}/")


if __name__ == "__main__":
    main()
