"""Fine-tuning on demonstrations (Algorithm 1 of CS336's fifth assignment): `python drivers/sft.py --help`.

One step takes the next B demonstrations, of up to T response tokens (file in drivers/training/ -> function):

    1. batch    batch.demonstration_batch            B demonstrations -> mask (B, T), advantages of 1 (B, 1)
    2. update   update.update                        loss = mean of -log pi over the response tokens; one AdamW step
    3. push     engine.load_weights                  only before an evaluation, the one use of the engine
"""

import drivers.common.environment  # noqa: F401  before torch: OpenMP reads its settings once
from drivers.settings.command_line import answer_early, parse_settings
from drivers.settings.imitation import SftConfig

if __name__ == "__main__":  # before the imports below, which load torch and take seconds
    answer_early(SftConfig.program, lambda arguments: parse_settings(SftConfig, arguments))

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from drivers.common import distributed
from drivers.common.cli import exit_on_user_error
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.grading.pool import start_grading
from drivers.grading.verdicts import grade_all
from drivers.policy.loading import context_length, load_tokenizer, resolve_model
from drivers.runs.completions import describe_demonstration
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.demonstrations import Demonstration, WorkedExample, load_demonstrations, make_demonstrations
from drivers.tasks.questions import fit_context
from drivers.training.batch import demonstration_batch
from drivers.training.components import Components
from drivers.training.launch import run_training
from drivers.training.metrics import UpdateMetrics
from drivers.training.run import Run
from drivers.training.setup import load_prompt_from_settings, setup_run
from drivers.training.state import TrainingState
from drivers.training.update import update


def fine_tune(config: GrpoConfig, components: Components, demonstrations: Sequence[Demonstration], run: Run) -> None:
    """Train the policy on demonstrations; the engine samples for evaluations only.

    `config` is `SftConfig.as_grpo(len(demonstrations))`.
    """
    policy, engine = components.policy, components.engine
    at_temperature_one = replace(config, sampling_temperature=1.0)  # the loss is -log pi of the unscaled model
    state = run.start(TrainingState(config, policy), components)
    engine.sleep()

    for step in run.steps():
        # Take the next demonstrations of this epoch, and minimize -log pi(o | q) on them.
        indices = select_batch(len(demonstrations), config.train_batch_size, config.seed, step)
        chosen = [demonstrations[index] for index in indices]
        batch, logged = demonstration_batch(chosen), chosen[: config.n_logged_completions]
        metrics = UpdateMetrics(batch.completions[: len(logged)], has_sampler=False)
        with run.timer.phase("update"):
            update(at_temperature_one, policy, batch, run, step, metrics)
        state.step = step

        if run.is_first_step(step) or run.is_evaluation_due(step):
            run.push_weights(components, step)
            if run.is_evaluation_due(step):
                run.evaluate(components, step=step)
            engine.sleep()
        run.report(step, metrics.summary())
        rows = [describe_demonstration(demonstration, run.tokenizer) for demonstration in logged]
        run.log_samples(step, rows, metrics.logged_token_values())
        run.end_step(policy)


def select_batch(n: int, size: int, seed: int, step: int) -> list[int]:
    """Return the indices of a step's batch. Each epoch takes all `n` once, in its own random order."""
    epoch, batch = divmod(step - 1, -(-n // size))
    order = random.Random(f"{seed}, {epoch}").sample(range(n), n)
    return order[batch * size : (batch + 1) * size]


def choose_demonstrations(settings: SftConfig, say: Callable[[str], None] = print) -> list[WorkedExample]:
    """Return the demonstrations to train on: with `--correct-only` the correct ones, then a random `--n-examples`.

    A smaller `--n-examples` takes the beginning of the same order.
    """
    examples = load_demonstrations("--data-path", settings.data_path)
    if settings.correct_only:
        examples = select_correct(settings, examples, say)
    n_examples = len(examples) if settings.n_examples is None else settings.n_examples
    if n_examples > len(examples):
        raise UsageError(f"--n-examples {n_examples}: only {len(examples)} demonstrations are available; pass fewer")
    return random.Random(settings.seed).sample(examples, len(examples))[:n_examples]


def select_correct(
    settings: SftConfig, examples: Sequence[WorkedExample], say: Callable[[str], None]
) -> list[WorkedExample]:
    """Grade the demonstrations and return those with a reward of 1."""
    for example in examples:
        if not example.answer:
            raise UsageError(f"--correct-only: {example.source} has no `answer` to grade its response against")
    with start_grading(settings, lambda text: say(f"warning: {text}")) as grade:
        responses, answers = [one.response for one in examples], [one.answer for one in examples]
        verdicts = grade_all(grade, responses, answers, [one.question for one in examples])
    correct = [example for example, verdict in zip(examples, verdicts, strict=True) if verdict.scores["reward"] == 1]
    say(f"--correct-only: {len(correct)} of {len(examples)} demonstrations are correct")
    if not correct:
        raise UsageError(f"--correct-only: no demonstration of {settings.data_path} is correct")
    return correct


def leave_out_long(
    config: GrpoConfig, examples: Sequence[WorkedExample], say: Callable[[str], None]
) -> list[WorkedExample]:
    """Return the demonstrations that fit into the model's context, because their number decides the steps."""
    assert config.model_path is not None  # the command line refuses that
    model_path = resolve_model(config.model_path)
    prompt, tokenizer = load_prompt_from_settings(config), load_tokenizer(model_path, for_chat=config.chat_template)
    demonstrations = fit_context(
        make_demonstrations(examples, prompt, config.sampling.stop, tokenizer),
        max_new_tokens=config.sampling_max_tokens,
        context=context_length(model_path),
        long_prompts=config.long_prompts,
        say=say,
    )
    kept = {id(demonstration.example) for demonstration in demonstrations}
    return [example for example in examples if id(example) in kept]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, choose the demonstrations, then train."""
    with exit_on_user_error(SftConfig.program):
        settings = parse_settings(SftConfig, sys.argv[1:] if arguments is None else arguments)
        say = print if distributed.is_rank_zero() else lambda _: None
        examples = choose_demonstrations(settings, say)
        config = settings.as_grpo(len(examples))
        if config.long_prompts == "drop":
            examples = leave_out_long(config, examples, say)
            config = settings.as_grpo(len(examples))

        def setup(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
            if any(of_rank != examples for of_rank in distributed.gather(examples)):
                raise UsageError(f"--reward {settings.reward}: the ranks disagree on which demonstrations are correct")
            make = partial(make_demonstrations, examples, load_prompt_from_settings(config), config.sampling.stop)
            return setup_run(config, display, make, settings)

        def loop(components: Components, run: Run) -> None:
            demonstrations = [item for item in components.train_set if isinstance(item, Demonstration)]
            fine_tune(config, components, demonstrations, run)

        run_training(settings, config, setup, loop)


if __name__ == "__main__":
    main()
