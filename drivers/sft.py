"""Fine-tuning on demonstrations (Algorithm 1 of CS336's fifth assignment): `python drivers/sft.py --help`."""

# isort: off
from drivers.common import environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_settings
from drivers.settings.imitation import SftConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(SftConfig.program, lambda arguments: parse_settings(SftConfig, arguments))

# isort: on

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from drivers.common import distributed
from drivers.common.cli import exit_on_user_error
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.common.signals import defer_signals
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.grading.pool import start_grading
from drivers.grading.verdicts import Grader, grade_all
from drivers.runs.completions import describe_demonstration
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.demonstrations import Demonstration, WorkedExample, load_demonstrations, make_demonstrations
from drivers.tasks.questions import Question
from drivers.training.batch import as_right
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.run import Run
from drivers.training.setup import Components, prompt_of, setup_run
from drivers.training.state import TrainingState
from drivers.training.update import update


def fine_tune(
    config: GrpoConfig,
    policy: nn.Module,
    engine: RolloutEngine,
    grade: Grader,
    demonstrations: Sequence[Demonstration],
    val_set: Sequence[Question],
    run: Run,
) -> None:
    """The loop. `config` is `SftConfig.as_grpo` these demonstrations; the engine samples for evaluations alone."""
    untempered = replace(config, sampling_temperature=1.0)  # -log pi of the model as it is
    state = run.begin(TrainingState(config, policy))
    run_with_engine(engine, lambda: engine.load_weights(version=state.step))
    run.check_engine(engine, policy, val_set, version=state.step)
    if state.step == 0:
        run.evaluate(engine, val_set, grade, step=0)
    engine.sleep()

    for step in run.steps():
        # D_b ~ D: the next ones of this pass;  theta <- descend -log pi_theta(o | q) on them.
        places = batch_of_step(len(demonstrations), config.train_batch_size, config.seed, step)
        chosen = [demonstrations[place] for place in places]
        batch, shown = as_right(chosen), chosen[: config.n_logged_completions]
        metrics = UpdateMetrics(batch.completions[: len(shown)], has_sampler=False)
        with run.phase("update"):
            update(untempered, policy, batch, state, run, step, metrics)
        state.step = step

        is_due = step % config.eval_steps == 0 or step == config.n_grpo_steps
        if run.is_first(step) or is_due:
            with run.phase("push"), defer_signals():
                run_with_engine(engine, partial(engine.load_weights, version=step))
            if run.is_first(step):
                run.check_engine(engine, policy, val_set, version=step)
            if is_due:
                run.evaluate(engine, val_set, grade, step=step)
            engine.sleep()
        run.report(step, metrics.summary())
        rows = [describe_demonstration(one, run.tokenizer) for one in shown]
        run.log_samples(step, rows, metrics.logged_token_values())
        state.snapshot()
        if step % config.checkpoint_steps == 0 or step == config.n_grpo_steps:
            run.save(policy, f"checkpoint-{step}")


def batch_of_step(n: int, size: int, seed: int, step: int) -> list[int]:
    """Which of `n` demonstrations a step, from 1, trains on. Each pass has its own order, and takes each once."""
    epoch, place = divmod(step - 1, -(-n // size))
    order = random.Random(f"{seed}, {epoch}").sample(range(n), n)
    return order[place * size : (place + 1) * size]


def choose(settings: SftConfig, say: Callable[[str], None] = print) -> list[WorkedExample]:
    """The demonstrations that the settings ask for: of those that are right, if only these, the first of an order."""
    examples = load_demonstrations("--data-path", settings.data_path)
    found = len(examples)
    if settings.correct_only:
        lacking = next((example.source for example in examples if not example.answer), None)
        if lacking is not None:
            raise UsageError(f"--correct-only: {lacking} has no `answer` to grade its response against")
        with start_grading(settings, lambda text: say(f"warning: {text}")) as grade:
            graded = grade_all(
                grade,
                [example.response for example in examples],
                [example.answer for example in examples],
                [example.question for example in examples],
            )
        examples = [e for e, verdict in zip(examples, graded, strict=True) if verdict.scores["reward"] == 1]
        say(f"--correct-only: {len(examples)} of {found} demonstrations are graded right")
        if not examples:
            raise UsageError(f"--correct-only: no demonstration of {settings.data_path} is graded right")
    wanted = len(examples) if settings.n_examples is None else settings.n_examples
    if wanted > len(examples):
        raise UsageError(f"--n-examples {wanted}: there are {len(examples)} to choose from; no more can be asked for")
    return random.Random(settings.seed).sample(examples, len(examples))[:wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: settings, demonstrations, parts, the loop."""
    with exit_on_user_error(SftConfig.program):
        settings = parse_settings(SftConfig, sys.argv[1:] if arguments is None else arguments)
        examples = choose(settings, print if distributed.is_rank_zero() else lambda _: None)
        config = settings.as_grpo(len(examples))

        def prepare(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
            if any(found != examples for found in distributed.gather(examples)):
                raise UsageError(f"--reward {settings.reward}: the ranks found other demonstrations right")
            make = partial(make_demonstrations, examples, prompt_of(config), config.sampling.stop)
            return setup_run(config, display, make, settings)

        def loop(run: Run, parts: Components) -> None:
            shown = [one for one in parts.train_set if isinstance(one, Demonstration)]
            fine_tune(config, parts.policy, parts.engine, parts.grade, shown, parts.val_set, run)

        run_training(settings, config, prepare, loop)


if __name__ == "__main__":
    main()
