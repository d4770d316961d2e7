"""Run the loop of a training program: set up before it, save and clean up after it."""

from collections.abc import Callable

from torch import nn

from drivers.common import distributed
from drivers.common.commands import spell_program
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError
from drivers.common.signals import defer_signals, terminate_as_interrupt
from drivers.common.wrapping import print_line
from drivers.runs.checkpoint import read_state_values
from drivers.runs.folder import find_newest_checkpoint
from drivers.runs.resume import FINAL, find_finished_model
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.training.components import Components
from drivers.training.run import Run


def run_training(
    settings: TrainingSettings,
    config: GrpoConfig,
    setup: Callable[[GrpoConfig, Display], tuple[Run, Components]],
    loop: Callable[[Components, Run], None],
) -> None:
    """Set up a run, call its loop, and publish the final model.

    `settings` are those of the program; `config` is what its components read.
    """
    finished = find_finished_model(config)
    if finished is not None:
        steps = f"{config.n_grpo_steps}/{config.n_grpo_steps} steps"
        print_line(f"{finished}/ is already complete ({steps}). Increase {settings.extend_flag} to continue.")
        return
    distributed.start(config.collective_timeout_s, on_gpus=config.policy_device != "cpu")
    display = Display(config.n_grpo_steps, quiet=not distributed.is_rank_zero(), title=settings.title)
    with display, terminate_as_interrupt():
        run, components = setup(config, display)
        try:
            loop(components, run)
            final = run.checkpointer.publish(run.state, FINAL)
        except BaseException:  # also after Ctrl-C, the steps so far are saved
            save_on_abort(run, components.policy, f"{spell_program(settings.program)} --resume {run.folder}")
            raise
        finally:
            try:
                run.finish()
                run.discard_without_result()
            finally:
                components.close()
        display.say(f"Done: {run.summary()}. Model: {final}/  Curves: {run.folder}/curves.png")
    distributed.end()


def save_on_abort(run: Run, policy: nn.Module, resume_command: str) -> None:
    """Save a checkpoint of a run that was stopped, unless one has its last step, and say how to resume it.

    An error or a second signal can end a run between two updates of a step. Then only the weights are saved, and the
    run resumes from an earlier checkpoint. With several ranks, none knows where the others stopped.
    """
    if run.step == 0:
        return
    weights = None
    if distributed.size() == 1:
        step = run.state.saved_step if run.state.is_at_snapshot else run.step
        run.display.say("Stopping: saving a checkpoint ...")
        try:
            with defer_signals():
                run.finish_save()
                if run.checkpointer.latest(run.state) is None:
                    run.save(policy, run.checkpointer.free_name(f"checkpoint-{step}-stopped"))
                    weights = run.finish_save()
        except TrainingAbortedError as error:  # a warning, so that the error that ended the run is printed last
            run.warn(str(error))
    if not distributed.is_rank_zero():
        return
    checkpoint = find_newest_checkpoint(run.folder)
    if weights is not None and weights != checkpoint:
        run.display.say(f"Stopped between two updates of a step; {weights}/ has their weights and cannot be resumed")
    if checkpoint is None:
        run.display.say("Stopped before the first checkpoint: the run cannot be resumed")
    else:
        step = read_state_values(checkpoint)["step"]
        run.display.say(f"Stopped after step {step}. To resume: {resume_command}")
