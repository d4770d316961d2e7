"""What stands around the loop of each program that trains: how it begins, and how it may end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from drivers import ranks
from drivers.config import GrpoConfig, Settings, exit_with
from drivers.display import Display
from drivers.errors import EngineDiedError, UnsoundRunError, UsageError
from drivers.interrupts import terminate_as_interrupt, uninterrupted
from drivers.run import Parts, Run, finished_model


@contextmanager
def ending_in_one_line(program: str) -> Iterator[None]:
    """What a person can do something about is one line on stderr, and an exit status; the rest is a traceback."""
    try:
        yield
    except UsageError as error:
        exit_with(program, error, status=2)
    except (UnsoundRunError, EngineDiedError) as error:
        exit_with(program, error, status=1)
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        exit_with(program, RuntimeError(f"another rank has ended: {error}"), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def conduct(
    settings: Settings,
    config: GrpoConfig,
    prepare: Callable[[GrpoConfig, Display], tuple[Run, Parts]],
    loop: Callable[[Run, Parts], None],
) -> None:
    """Parts, the loop, the model. `settings` are the program's own, `config` is what its parts are given."""
    finished = finished_model(config)
    if finished is not None:
        print(f"Nothing is left to do: {finished}/ has all {config.n_grpo_steps} steps; more: {settings.more}.")
        return
    ranks.start(config.leading_s, on_gpus=config.policy_device != "cpu")
    display = Display(config.n_grpo_steps, quiet=not ranks.is_first(), title=settings.title)
    with display, terminate_as_interrupt():
        run, parts = prepare(config, display)
        try:
            loop(run, parts)
            saved = run.publish("final_model")
        except BaseException:  # whatever ends the run, the steps that were made are kept
            keep_what_was_made(run, parts.policy)
            raise
        finally:
            try:
                run.finish()
            finally:
                parts.close()
        display.say(f"Done: {run.summary()}. Model: {saved}/  Curves: {run.folder}/curves.png")
    ranks.end()


def keep_what_was_made(run: Run, policy: nn.Module) -> None:
    """A checkpoint of a run that was stopped. Of several ranks none knows what the others do: the last one stands."""
    if run.step == 0:
        return
    if ranks.size() > 1:
        run.display.say(f"Stopped after step {run.step}; what is kept is the last checkpoint in {run.folder}/")
        return
    saved = run.last_checkpoint()
    if saved is None:
        try:
            with uninterrupted():
                saved = run.save(policy, run.free_name(f"checkpoint-{run.step}-stopped"))
        except UnsoundRunError as error:  # what ended the run is what is told last
            run.warn(str(error))
    kept = f"the weights of the last update are in {saved}/" if saved else "its weights could not be written"
    run.display.say(f"Stopped after step {run.step}; {kept}")
