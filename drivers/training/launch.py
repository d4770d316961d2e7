"""Run the loop of a training program: set up before it, save and clean up after it."""

from collections.abc import Callable

from torch import nn

from drivers.common import distributed
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError
from drivers.common.signals import defer_signals, terminate_as_interrupt
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
        print(f"{finished}/ is already complete ({steps}). Increase {settings.extend_flag} to continue.")
        return
    distributed.start(config.collective_timeout_s, on_gpus=config.policy_device != "cpu")
    display = Display(config.n_grpo_steps, quiet=not distributed.is_rank_zero(), title=settings.title)
    with display, terminate_as_interrupt():
        run, components = setup(config, display)
        try:
            loop(components, run)
            final = run.checkpointer.publish(run.state, FINAL)
        except BaseException:  # also after Ctrl-C, the steps so far are saved
            save_on_abort(run, components.policy)
            raise
        finally:
            try:
                run.finish()
            finally:
                components.close()
        display.say(f"Done: {run.summary()}. Model: {final}/  Curves: {run.folder}/curves.png")
    distributed.end()


def save_on_abort(run: Run, policy: nn.Module) -> None:
    """Save a checkpoint of a run that was stopped, unless the last one contains all its updates.

    With several ranks, none knows where the others stopped, so the last checkpoint stands.
    """
    if run.step == 0:
        return
    if distributed.size() > 1:
        run.display.say(f"Stopped after step {run.step}; the last checkpoint in {run.folder}/ is kept")
        return
    saved = run.checkpointer.latest(run.state)
    if saved is None:
        try:
            with defer_signals():
                saved = run.save(policy, run.checkpointer.free_name(f"checkpoint-{run.step}-stopped"))
        except TrainingAbortedError as error:  # a warning, so that the error that ended the run is printed last
            run.warn(str(error))
    result = f"the weights of the last update are in {saved}/" if saved else "its weights could not be saved"
    run.display.say(f"Stopped after step {run.step}; {result}")
