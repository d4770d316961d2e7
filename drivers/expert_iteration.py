"""Expert iteration (Algorithm 2 of CS336's fifth assignment): `python drivers/expert_iteration.py --help`.

One step samples G responses to each of P questions and fine-tunes on the correct ones (file in drivers/training/):

    1. sample   rollouts.collect                     P questions -> P * G completions, graded
    2. select   batch.imitation_batch                the M completions with a reward of 1 -> mask (M, T)
    3. update   update.update, per train batch       loss = mean of -log pi over their tokens, for `--epochs` epochs
    4. push     engine.load_weights                  policy weights -> engine
"""

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_settings
from drivers.settings.imitation import ExpertIterationConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(ExpertIterationConfig.program, lambda arguments: parse_settings(ExpertIterationConfig, arguments))

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from drivers.common.cli import exit_on_user_error
from drivers.common.display import Display
from drivers.engines.rank_zero import run_with_engine
from drivers.settings.grpo import GrpoConfig
from drivers.training.anomalies import check_right_responses, check_rollouts
from drivers.training.batch import imitation_batch
from drivers.training.components import Components
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.rollouts import collect
from drivers.training.run import Run
from drivers.training.setup import load_train_set, setup_run
from drivers.training.state import TrainingState
from drivers.training.update import update


def iterate(settings: ExpertIterationConfig, components: Components, run: Run) -> None:
    """Train the policy on its own correct responses."""
    config, policy, engine = settings.as_grpo(), components.policy, components.engine
    at_temperature_one = replace(config, sampling_temperature=1.0)  # the loss is -log pi of the unscaled model
    # At another temperature, the sampler's log-probs belong to another distribution.
    has_sampler = config.sampling_temperature == 1
    state = run.start(TrainingState(config, policy), components)

    for step in run.steps():
        # Sample o_1 .. o_G ~ pi(. | q) for each question q of a batch, grade them, and keep those with r_i = 1.
        collected = run_with_engine(engine, partial(collect, config, components, state.draw, run, step, run.timer))
        graded = zip(collected.completions, collected.rewards.tolist(), strict=True)
        correct = [completion for completion, reward in graded if reward == 1]
        anomalies = [*check_rollouts(collected.metrics), *check_right_responses(len(correct))]
        anomalies += state.collapse.check(collected.metrics)

        # Minimize -log pi(o | q) on them.
        metrics = UpdateMetrics(collected.logged_completions, has_sampler=has_sampler)
        with run.timer.phase("update"):
            if not correct:
                run.anomalies.should_apply_update(step, anomalies)
            for _ in range(settings.epochs if correct else 0):
                for batch in imitation_batch(correct).shuffled(state.shuffle).split(settings.train_batch_size):
                    update(at_temperature_one, policy, batch, run, step, metrics, anomalies)
        state.step = step

        # Let the engine sample from the new policy.
        run.push_weights(components, step)
        if run.is_evaluation_due(step):
            run.evaluate(components, step=step)
        run.report(step, collected.metrics | metrics.summary() | {"right_responses": float(len(correct))})
        run.log_samples(step, collected.logged_rows, metrics.logged_token_values())
        run.end_step(policy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, then train."""
    with exit_on_user_error(ExpertIterationConfig.program):
        settings = parse_settings(ExpertIterationConfig, sys.argv[1:] if arguments is None else arguments)

        def setup(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
            make_train_set = load_train_set(config, "; lower --question-batch-size")
            return setup_run(config, display, make_train_set, settings)

        run_training(settings, settings.as_grpo(), setup, partial(iterate, settings))


if __name__ == "__main__":
    main()
