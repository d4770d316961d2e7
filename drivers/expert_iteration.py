"""Expert iteration (Algorithm 2 of CS336's fifth assignment): `python drivers/expert_iteration.py --help`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_settings
from drivers.settings.imitation import ExpertIterationConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(ExpertIterationConfig.program, lambda arguments: parse_settings(ExpertIterationConfig, arguments))

# isort: on

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from drivers.common.cli import exit_on_user_error
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.common.signals import defer_signals
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.grading.verdicts import Grader
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question, load_examples, make_questions
from drivers.training.anomalies import check_rollouts, find_none_right
from drivers.training.batch import imitation_batch
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.rollouts import collect
from drivers.training.run import Run
from drivers.training.setup import Components, prompt_of, setup_run
from drivers.training.state import TrainingState
from drivers.training.update import update


def iterate(
    settings: ExpertIterationConfig,
    policy: nn.Module,
    engine: RolloutEngine,
    grade: Grader,
    train_set: Sequence[Question],
    val_set: Sequence[Question],
    run: Run,
) -> None:
    """The loop. Its parts are built by `drivers.training.setup.build`, or by you."""
    config = settings.as_grpo()
    untempered = replace(config, sampling_temperature=1.0)  # -log pi of the model as it is
    state = run.begin(TrainingState(config, policy))
    run_with_engine(engine, lambda: engine.load_weights(version=state.step))
    run.check_engine(engine, policy, val_set, version=state.step)
    if state.step == 0:
        run.evaluate(engine, val_set, grade, step=0)

    for step in run.steps():
        # D_b ~ D;  o_1 .. o_G ~ pi(. | q) for each question q of D_b;  r_i = R(q, o_i);  keep those with r_i = 1.
        sample = partial(collect, config, engine, grade, train_set, state.draw, run, step)
        collected = run_with_engine(engine, sample)
        graded = zip(collected.completions, collected.raw_rewards.tolist(), strict=True)
        right = [completion for completion, reward in graded if reward == 1]

        # theta <- descend -log pi_theta(o | q) on these: fine-tuning, with samples in the place of demonstrations.
        # The sampler's log-probs are of another distribution where the temperature is not 1.
        metrics = UpdateMetrics(collected.logged_completions, has_sampler=config.sampling_temperature == 1)
        unsound = [*check_rollouts(collected.facts), *find_none_right(len(right))]
        with run.phase("update"):
            if not right:
                run.should_apply_update(step, unsound)
            for _ in range(settings.epochs if right else 0):
                for batch in imitation_batch(right).shuffled(state.shuffle).split(settings.train_batch_size):
                    update(untempered, policy, batch, state, run, step, metrics, unsound)
        state.step = step

        # The next samples are from the new policy.
        with run.phase("push"), defer_signals():
            run_with_engine(engine, partial(engine.load_weights, version=step))
        if run.is_first(step):
            run.check_engine(engine, policy, val_set, version=step)
        if step % config.eval_steps == 0 or step == config.n_grpo_steps:
            run.evaluate(engine, val_set, grade, step=step)
        run.report(step, collected.facts | metrics.summary() | {"right_responses": float(len(right))})
        run.log_samples(step, collected.shown, metrics.logged_token_values())
        state.snapshot()
        if step % config.checkpoint_steps == 0 or step == config.n_grpo_steps:
            run.save(policy, f"checkpoint-{step}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: settings, parts, the loop."""
    with exit_on_user_error(ExpertIterationConfig.program):
        settings = parse_settings(ExpertIterationConfig, sys.argv[1:] if arguments is None else arguments)

        def prepare(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
            examples = load_examples("--data-path", config.data_path)
            if len(examples) < settings.question_batch_size:
                raise UsageError(
                    f"--data-path {config.data_path}: holds {len(examples)} questions, and a step asks "
                    f"{settings.question_batch_size} different ones: lower --question-batch-size"
                )
            return setup_run(config, display, partial(make_questions, examples, prompt_of(config)), settings)

        run_training(settings, settings.as_grpo(), prepare, lambda run, parts: iterate(settings, *parts[:5], run))


if __name__ == "__main__":
    main()
