"""Train with GRPO or a relative of it: `python drivers/train.py --help`.

The default is GRPO's advantage with the loss of REINFORCE; `--loss-type grpo_clip` adds ratio and clip.

One step samples G responses to each of P prompts, N = P * G responses of up to T tokens from a vocabulary of V:

    1. sample   rollouts.collect -> engine.generate     P prompts -> N token sequences and the sampler's log-probs
    2. grade    rollouts.collect -> grade_completions   N texts and P answers -> N verdicts
    3. reward   rollouts.collect -> compute_rewards     N verdicts -> rewards (N,), with the length penalty
    4. batch    batch.make_rollout_batch                N completions -> mask and sampler log-probs (N, T)
    5. prepare  advantages.prepare_rollouts             old, reference and teacher log-probs (N, T), where needed;
                                                        rewards in groups of G -> advantages (N, 1) or (N, T)
    6. update   update.update, for each train batch of B <= N responses, in micro-batches of b <= B:
         weigh    objective.weigh_step                  weights of its tokens in the loss (B, T)
         forward  forward.forward                       logits (b, T, V), in pieces -> log-probs, entropies (b, T)
         loss     objective.compute_loss                log-probs, advantages, weights -> a number; then backward()
         step     state.finish_update                   one AdamW step of the optimizer
    7. push     run.push_weights -> engine.load_weights policy weights -> engine

Files are in drivers/training/, except grade_completions (drivers/evaluation/policy.py) and the engine
(drivers/engines/). The formulas are functions of grpo_core. docs/algorithm.md follows a reward, a token id and a
weight through the code.
"""

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_train_config
from drivers.settings.grpo import GrpoConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(GrpoConfig.program, parse_train_config)

import sys
from collections.abc import Sequence
from functools import partial

from drivers.common.cli import exit_on_user_error
from drivers.settings.formula import show
from drivers.training.advantages import prepare_rollouts
from drivers.training.anomalies import check_rollouts
from drivers.training.batch import make_rollout_batch
from drivers.training.components import Components
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.rollouts import RolloutPrefetcher, collect
from drivers.training.run import Run
from drivers.training.setup import setup_grpo_run
from drivers.training.state import TrainingState
from drivers.training.update import update


def train(config: GrpoConfig, components: Components, run: Run) -> None:
    """Train the policy with GRPO. `drivers.training.setup.setup_grpo_run` builds the components and the run."""
    policy, reference, teacher = components.policy, components.reference, components.teacher
    state = run.start(TrainingState(config, policy, reference), components)
    collect_step = partial(collect, config, components, state.draw, run)
    with RolloutPrefetcher(collect_step, components.engine, state, run) as prefetcher:
        for step in run.steps():
            # Sample o_1 .. o_G ~ pi_old(. | q) for each question q of a batch, and grade them: r_i = R(q, o_i).
            collected = prefetcher.get(step)
            prefetcher.prefetch(step + 1)
            anomalies = check_rollouts(
                collected.metrics, has_regularization_gradient=config.has_regularization_gradient
            ) + state.collapse.check(collected.metrics)
            entropy_coef = state.bonus.adapt(collected.metrics["rollout_entropy"])

            # Compare each r_i with its group, which gives A_i, and maximize the objective in one or more updates.
            metrics = UpdateMetrics(collected.logged_completions)
            with run.timer.phase("update"):
                rollouts = make_rollout_batch(collected.completions, collected.rewards, config.group_size)
                rollouts = prepare_rollouts(
                    config, policy, reference, rollouts, collected.scores, collected.greedy_rewards, teacher
                )
                for _ in range(config.epochs_per_rollout_batch // config.passes_per_update):
                    for train_batch in rollouts.shuffled(state.shuffle).split(config.train_batch_size):
                        update(config, policy, train_batch, run, step, metrics, anomalies, entropy_coef)
                state.step = step

            # Let the engine sample from the new policy: pi_old <- pi.
            prefetcher.drain()
            run.push_weights(components, step)
            if run.is_evaluation_due(step):
                run.evaluate(components, step=step)
            coefficient = {"entropy_coef": entropy_coef} if config.has_entropy_bonus else {}
            run.report(step, collected.metrics | metrics.summary() | coefficient)
            run.log_samples(step, collected.logged_rows, metrics.logged_token_values(), rollouts.advantages)
            state.move_reference()
            run.end_step(policy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, then train, or print the objective with `--show`."""
    with exit_on_user_error(GrpoConfig.program):
        config = parse_train_config(sys.argv[1:] if arguments is None else arguments)
        if config.show:
            print(show(config))
            return
        run_training(config, config, setup_grpo_run, partial(train, config))


if __name__ == "__main__":
    main()
