"""GRPO (Algorithm 3): `python drivers/train.py --help`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_train_config
from drivers.settings.grpo import GrpoConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(GrpoConfig.program, parse_train_config)

# isort: on

import sys
from collections.abc import Sequence
from functools import partial

from torch import nn

from drivers.common.cli import exit_on_user_error
from drivers.common.signals import defer_signals
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.grading.verdicts import Grader
from drivers.settings.formula import show
from drivers.tasks.questions import Question
from drivers.training.advantages import prepare_rollouts
from drivers.training.anomalies import check_rollouts
from drivers.training.batch import make_rollout_batch
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.rollouts import RolloutPrefetcher, collect
from drivers.training.run import Run
from drivers.training.setup import setup_grpo_run
from drivers.training.state import TrainingState
from drivers.training.update import update


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
    """The loop. Its parts are built by `drivers.training.setup.prepare`, or by you."""
    state = run.begin(TrainingState(config, policy))
    run_with_engine(engine, lambda: engine.load_weights(version=state.step))
    run.check_engine(engine, policy, val_set, version=state.step)
    if state.step == 0:
        run.evaluate(engine, val_set, grade, step=0)

    sample = partial(collect, config, engine, grade, train_set, state.draw)
    with RolloutPrefetcher(sample, state, run, config.async_steps, engine) as batches:
        for step in run.steps():
            # D_b ~ D;  o_1 .. o_G ~ pi_old(. | q) for each question q of D_b;  r_i = R(q, o_i).
            collected = batches.of(step)
            batches.begin(step + 1)

            # A_i = r_i against its group;  pi <- ascend the objective on these rollouts, in one update or several.
            metrics = UpdateMetrics(collected.logged_completions)
            unsound = check_rollouts(collected.facts, has_regularization_gradient=config.has_regularization_gradient)
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
            with run.phase("push"), defer_signals():
                run_with_engine(engine, partial(engine.load_weights, version=step))
            if run.is_first(step):
                run.check_engine(engine, policy, val_set, version=step)
            if step % config.eval_steps == 0 or step == config.n_grpo_steps:
                run.evaluate(engine, val_set, grade, step=step)
            coefficient = {"entropy_coef": entropy_coef} if config.has_entropy_bonus else {}
            run.report(step, collected.facts | metrics.summary() | coefficient)
            run.log_samples(step, collected.shown, metrics.logged_token_values(), rollouts.advantages)
            state.snapshot()
            if step % config.checkpoint_steps == 0 or step == config.n_grpo_steps:
                run.save(policy, f"checkpoint-{step}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: settings, parts, the loop."""
    with exit_on_user_error(GrpoConfig.program):
        config = parse_train_config(sys.argv[1:] if arguments is None else arguments)
        if config.show:
            print(show(config))
            return
        run_training(
            config, config, setup_grpo_run, lambda run, parts: train(config, *parts[:5], run, parts.reference)
        )


if __name__ == "__main__":
    main()
