"""Parse command lines into settings."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from beartype.door import is_bearable

from drivers.common.errors import UsageError
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import QUICKSTARTS, ImitationSettings
from drivers.settings.parser import parse
from drivers.settings.recipes import QUICKSTART, RECIPES

Trained = TypeVar("Trained", bound=TrainingSettings)


Imitation = TypeVar("Imitation", bound=ImitationSettings)


def flag_given(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `--flag` among raw arguments, in any spelling that tyro takes; None when it is not there.

    The last one, as for tyro.
    """
    given = None
    for index, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            given = value if has_value else (arguments[index + 1] if index + 1 < len(arguments) else "")
    return given


def parse_train_config(arguments: Sequence[str]) -> GrpoConfig:
    """Defaults, then the recipe's, then the flags. Without a recipe or a model, the quickstart."""
    recipe = flag_given(arguments, "--recipe")
    earlier = earlier_settings(GrpoConfig, arguments)
    if earlier is not None:
        if recipe not in (None, earlier.recipe):
            raise UsageError(
                f"--recipe {recipe}: the run to go on with has recipe={earlier.recipe}; its settings can be changed "
                "by flags of their own"
            )
        return resolve_micro_batching(arguments, parse(GrpoConfig, arguments, earlier))
    has_model = flag_given(arguments, "--model-path") is not None
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if recipe is None and not has_model and not asks_for_help:
        print("No --model-path and no --recipe: this is the embedded quickstart (--recipe quickstart).", flush=True)
        recipe = "quickstart"
    settings: dict[str, Any] = {}
    if recipe in RECIPES:
        base = QUICKSTART if recipe == "quickstart" or not has_model else {}
        settings = {"recipe": recipe, **base, **RECIPES[recipe]}
    config = resolve_micro_batching(arguments, parse(GrpoConfig, arguments, GrpoConfig(**settings)))
    if config.model_path is None:
        raise UsageError("model_path=None: a folder or hub name is required, or --recipe quickstart, which names one")
    return config


def resolve_micro_batching(arguments: Sequence[str], config: GrpoConfig) -> GrpoConfig:
    """Of the two flags that say how a train batch is cut, the one that was given wins over what was there before."""
    if flag_given(arguments, "--gradient-accumulation-steps") is None:
        return config
    if flag_given(arguments, "--micro-batch-tokens") is not None:
        raise UsageError(
            "--gradient-accumulation-steps and --micro-batch-tokens both say how a train batch is cut: pass one"
        )
    return replace(config, micro_batch_tokens=None)


def earlier_settings(kind: type[Trained], arguments: Sequence[str]) -> Trained | None:
    """Of the run that `--resume` names, if there is one: of this kind, for another program's is none to go on with."""
    resume = flag_given(arguments, "--resume")
    if resume is None:
        return None
    save_dir = flag_given(arguments, "--save-dir")
    if resume != "auto" and save_dir is not None:
        raise UsageError(f"--save-dir {save_dir}: a run is gone on with in its own folder; leave it out with --resume")
    path = Path(save_dir or "" if resume == "auto" else resume)
    file = next((folder / "config.json" for folder in (path, path.parent) if _is_run(folder)), None)
    if file is None:
        if resume == "auto":
            return None
        raise UsageError(
            f"--resume {resume}: no run's folder, nor a checkpoint in one; a config.json is required there"
        )
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        saved, program = written["config"], written.get("program", GrpoConfig.program)
        if program == kind.program:
            return _read_settings(kind, saved)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--resume {resume}: {file} cannot be read ({reason})") from error
    raise UsageError(f"--resume {resume}: a run of {program}, and {kind.program} cannot go on with it")


def _read_settings(kind: type[Trained], saved: dict[str, Any]) -> Trained:
    """As JSON has kept them; what is of the wrong type raises."""
    known = {field.name for field in fields(kind)} - {"resume", "save_dir", "show"}
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
    hints = get_type_hints(kind)
    for name, value in settings.items():
        if not any(is_bearable(one, hints[name]) for one in (value, _as_float(value))):
            raise ValueError(f"{name}={value!r} is no {hints[name]}")
    return kind(**settings)


def _as_float(value: Any) -> Any:
    """JSON has one kind of numbers."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_run(folder: Path) -> bool:
    """A model's folder has a config.json too."""
    return (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()


def parse_settings(kind: type[Imitation], arguments: Sequence[str]) -> Imitation:
    """Defaults, or without a model those of the quickstart, or those of the run to go on with; then the flags."""
    earlier = earlier_settings(kind, arguments)
    if earlier is not None:
        return parse(kind, arguments, earlier)
    is_own = flag_given(arguments, "--model-path") is not None or bool({"-h", "--help"} & set(arguments))
    if not is_own:
        print("No --model-path: this is the embedded quickstart.", flush=True)
    settings = parse(kind, arguments, kind(**({} if is_own else QUICKSTARTS[kind])))
    if settings.model_path is None:
        raise UsageError("model_path=None: a folder or hub name is required")
    return settings
