"""Parse command lines into settings."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from drivers.common.cli import exit_on_user_error
from drivers.common.errors import UsageError
from drivers.common.wrapping import print_line
from drivers.settings.base import Settings
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import QUICKSTARTS, ImitationSettings
from drivers.settings.parser import parse
from drivers.settings.recipes import QUICKSTART, RECIPES

Trained = TypeVar("Trained", bound=TrainingSettings)
Imitation = TypeVar("Imitation", bound=ImitationSettings)
HELP = {"-h", "--help"}


def flag_given(arguments: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag among raw arguments, in any spelling that tyro accepts, or None."""
    given = None
    for index, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            given = value if has_value else (arguments[index + 1] if index + 1 < len(arguments) else "")
    return given


def names_model(arguments: Sequence[str]) -> bool:
    """Return whether raw arguments name a model, by --model-path or by a recipe that has one."""
    recipe = flag_given(arguments, "--recipe") or ""
    return flag_given(arguments, "--model-path") is not None or "model_path" in RECIPES.get(recipe, {})


def answer_early(program: str, parse_arguments: Callable[[Sequence[str]], object]) -> None:
    """Answer --help and mistakes in flags, and return if there are none."""
    arguments = sys.argv[1:]
    out = sys.stdout if HELP & set(arguments) else StringIO()  # the program prints its notices when it parses again
    with exit_on_user_error(program), redirect_stdout(out):
        parse_arguments(arguments)


def parse_train_config(arguments: Sequence[str]) -> GrpoConfig:
    """Return the settings of train.py: defaults, then the recipe or the resumed run, then flags.

    Without a recipe and a model, the recipe is the quickstart.
    """
    recipe = flag_given(arguments, "--recipe")
    earlier = earlier_settings(GrpoConfig, arguments)
    if earlier is not None:
        if recipe not in (None, earlier.recipe):
            raise UsageError(
                f"--recipe {recipe}: the resumed run has recipe {earlier.recipe}; omit it, and change single settings "
                "by their flags"
            )
        return resolve_micro_batching(arguments, parse(GrpoConfig, arguments, earlier))
    has_model = names_model(arguments)
    if recipe is None and not has_model and not HELP & set(arguments):
        print_line("No --model-path and no --recipe: this is the embedded quickstart (--recipe quickstart).")
        recipe = "quickstart"
    settings: dict[str, Any] = {}
    if recipe in RECIPES:
        base = QUICKSTART if recipe == "quickstart" or not has_model else {}
        settings = {"recipe": recipe, **base, **RECIPES[recipe]}
    config = resolve_micro_batching(arguments, parse(GrpoConfig, arguments, GrpoConfig(**settings)))
    if config.model_path is None:
        raise UsageError("--model-path: is missing; pass a folder or hub name, or --recipe quickstart")
    return config


def resolve_micro_batching(arguments: Sequence[str], config: GrpoConfig) -> GrpoConfig:
    """Return the settings with --gradient-accumulation-steps, if it was given, in place of --micro-batch-tokens."""
    if flag_given(arguments, "--gradient-accumulation-steps") is None:
        return config
    if flag_given(arguments, "--micro-batch-tokens") is not None:
        raise UsageError(
            "--gradient-accumulation-steps: cannot be combined with --micro-batch-tokens, because both set the size "
            "of a micro-batch; pass only one of the two"
        )
    return replace(config, micro_batch_tokens=None)


def earlier_settings(kind: type[Trained], arguments: Sequence[str]) -> Trained | None:
    """Return the settings of the run named by --resume, or None. Runs of other programs are rejected."""
    resume = flag_given(arguments, "--resume")
    if resume is None:
        return None
    save_dir = flag_given(arguments, "--save-dir")
    if resume != "auto" and save_dir is not None:
        raise UsageError(
            f"--save-dir {save_dir}: cannot be combined with --resume, because a resumed run continues in its own "
            "folder; omit it"
        )
    path = Path(save_dir or "" if resume == "auto" else resume)
    file = next((folder / "config.json" for folder in (path, path.parent) if is_run(folder)), None)
    if file is None:
        if resume == "auto":
            return None
        raise UsageError(f"--resume {resume}: not a run folder or checkpoint: config.json not found")
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        saved, program = written["config"], written.get("program", GrpoConfig.program)
        if program == kind.program:
            return _read_settings(kind, saved)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--resume {resume}: {file} cannot be read ({reason})") from error
    raise UsageError(f"--resume {resume}: is a run of {program}; resume it with that program")


def _read_settings(kind: type[Trained], saved: dict[str, Any]) -> Trained:
    """Return settings that were saved as JSON. Values of a wrong type raise ValueError."""
    known = {field.name for field in fields(kind)} - {"resume", "save_dir", "show"}
    if isinstance(saved.get("val_data_path"), str):  # older runs have a single file
        saved = saved | {"val_data_path": [saved["val_data_path"]]}
    return kind(**check_types(kind, {name: value for name, value in saved.items() if name in known}))


def check_types(kind: type[Settings], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of `kind` that were saved as JSON, lists as tuples. Values of a wrong type raise ValueError."""
    from beartype.door import is_bearable  # here, because importing it takes a third of the time of --help

    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    hints = get_type_hints(kind)
    for name, value in settings.items():
        as_float = float(value) if type(value) is int else value  # JSON has one kind of number
        if not (is_bearable(value, hints[name]) or is_bearable(as_float, hints[name])):
            raise ValueError(f"{name}={value!r} is not of type {hints[name]}")
    return settings


def is_run(folder: Path) -> bool:
    """Return whether the folder is of a run; a model's folder has a config.json too."""
    return (folder / "config.json").exists() and (folder / "metrics.jsonl").exists()


def parse_settings(kind: type[Imitation], arguments: Sequence[str]) -> Imitation:
    """Return the settings of a program that imitates: defaults, quickstart or resumed run, then flags."""
    earlier = earlier_settings(kind, arguments)
    if earlier is not None:
        return parse(kind, arguments, earlier)
    is_quickstart = flag_given(arguments, "--model-path") is None and not HELP & set(arguments)
    if is_quickstart:
        print_line("No --model-path: this is the embedded quickstart.")
    settings = parse(kind, arguments, kind(**(QUICKSTARTS[kind] if is_quickstart else {})))
    if settings.model_path is None:
        raise UsageError("--model-path: is missing; pass a folder or hub name")
    return settings
