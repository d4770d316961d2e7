"""What stands around the loop of each program that trains: how it begins, and how it may end."""

from collections.abc import Callable

from torch import nn

from drivers.common import distributed
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError
from drivers.common.signals import defer_signals, terminate_as_interrupt
from drivers.runs.resume import finished_model
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.training.run import Run
from drivers.training.setup import Components


def run_training(
    settings: TrainingSettings,
    config: GrpoConfig,
    prepare: Callable[[GrpoConfig, Display], tuple[Run, Components]],
    loop: Callable[[Run, Components], None],
) -> None:
    """Parts, the loop, the model. `settings` are the program's own, `config` is what its parts are given."""
    finished = finished_model(config)
    if finished is not None:
        print(f"Nothing is left to do: {finished}/ has all {config.n_grpo_steps} steps; more: {settings.extend_flag}.")
        return
    distributed.start(config.collective_timeout_s, on_gpus=config.policy_device != "cpu")
    display = Display(config.n_grpo_steps, quiet=not distributed.is_rank_zero(), title=settings.title)
    with display, terminate_as_interrupt():
        run, parts = prepare(config, display)
        try:
            loop(run, parts)
            saved = run.publish("final_model")
        except BaseException:  # whatever ends the run, the steps that were made are kept
            save_on_abort(run, parts.policy)
            raise
        finally:
            try:
                run.finish()
            finally:
                parts.close()
        display.say(f"Done: {run.summary()}. Model: {saved}/  Curves: {run.folder}/curves.png")
    distributed.end()


def save_on_abort(run: Run, policy: nn.Module) -> None:
    """A checkpoint of a run that was stopped. Of several ranks none knows what the others do: the last one stands."""
    if run.step == 0:
        return
    if distributed.size() > 1:
        run.display.say(f"Stopped after step {run.step}; what is kept is the last checkpoint in {run.folder}/")
        return
    saved = run.last_checkpoint()
    if saved is None:
        try:
            with defer_signals():
                saved = run.save(policy, run.free_name(f"checkpoint-{run.step}-stopped"))
        except TrainingAbortedError as error:  # what ended the run is what is told last
            run.warn(str(error))
    kept = f"the weights of the last update are in {saved}/" if saved else "its weights could not be written"
    run.display.say(f"Stopped after step {run.step}; {kept}")
