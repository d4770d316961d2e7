"""Settings of evaluate.py that come from the run whose model it evaluates."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drivers.common.display import Screen
from drivers.common.errors import UsageError
from drivers.common.paths import repository_path
from drivers.common.wrapping import print_line
from drivers.settings.base import spell_flag
from drivers.settings.command_line import HELP, check_types, flag_given, is_run
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.evaluation import split_name
from drivers.settings.parser import parse

_SAME = (
    "prompt_path", "chat_template", "system_prompt_path", "chat_template_args", "chat_date", "long_prompts", "reward",
    "reward_mix", "grader_deadline_s", "sampling_temperature", "sampling_top_p", "sampling_top_k", "sampling_min_p",
    "sampling_min_tokens", "sampling_max_tokens", "sampling_stop", "rollout", "rollout_deadline_s",
)  # fmt: skip
TAKEN = {"data_path": "val_data_path", "n_examples": "n_val_examples", "n_samples": "eval_samples"} | {
    name: name for name in _SAME
}
"""Settings that are taken from a run, and their names there."""
OWN = {
    "sampling_temperature": "eval_temperature",
    "sampling_top_p": "eval_top_p",
    "sampling_max_tokens": "eval_max_tokens",
}
"""Settings whose values for evaluations are taken, and their names there, if the run has some."""
_SHOWN = ("data_path", "n_examples", "prompt_path", "reward")
"""Settings that are printed even if they are the defaults of evaluate.py."""
_PARTS = {
    "n_examples": "--data-path",
    "reward_mix": "--reward",
    "rollout_deadline_s": "--rollout",
    "chat_template": "--no-chat-template",
    "system_prompt_path": "--no-chat-template",
    "chat_template_args": "--no-chat-template",
    "chat_date": "--no-chat-template",
}
"""Settings that are not taken if this flag is given, because they belong to the setting that it replaces."""


def parse_evaluate_config(arguments: Sequence[str]) -> EvaluateConfig:
    """Return the settings of evaluate.py: defaults, then the run of the model if it has one, then flags."""
    if HELP & set(arguments):
        return parse(EvaluateConfig, arguments, EvaluateConfig())
    model_path = flag_given(arguments, "--model-path")
    run = None if model_path is None else find_run(model_path)
    settings = {} if run is None else take_settings(f"--model-path {model_path}", run)
    taken = {name: value for name, value in settings.items() if not _is_part_of_given(name, arguments)}
    config = parse(EvaluateConfig, arguments, EvaluateConfig(**taken))
    ours = EvaluateConfig()
    shown = {
        name: value
        for name, value in taken.items()
        if (name in _SHOWN or value != getattr(ours, name)) and not _is_given(name, arguments)
    }
    if shown:
        flags = " ".join(spell_flag(name, value) for name, value in shown.items())
        here = Path.cwd()
        where = run.relative_to(here) if run is not None and run.is_relative_to(here) else run
        Screen().say(f"From the settings of {where}: {flags}")
    _warn_of_other_run(config, arguments)
    return config


def find_run(model_path: str) -> Path | None:
    """Return the folder of the run that a model is part of, or None if it is part of none."""
    path = Path(model_path)
    if not path.is_dir():  # the name of a model
        return None
    # A link to a model of a run leads to its run; `best_checkpoint` is such a link in the run itself.
    parents = (path.absolute().parent, path.resolve().parent)
    return next((folder for folder in parents if is_run(folder)), None)


def take_settings(flag: str, run: Path) -> dict[str, Any]:
    """Return the settings of a run that evaluate.py takes; errors name `flag`.

    A relative path is one from the folder in which the run was started. If the file is not there, because the run was
    moved or the file is part of the repository, the path is looked up from here.
    """
    file = run / "config.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        saved, started_in = written["config"], written["environment"].get("folder")
        names = {name: of_run for name, of_run in TAKEN.items() if of_run in saved}
        names |= {name: of_run for name, of_run in OWN.items() if saved.get(of_run) is not None}
        settings = {name: saved[of_run] for name, of_run in names.items()}
        if isinstance(settings.get("data_path"), str):  # an older run has a single file
            settings["data_path"] = [settings["data_path"]]
        settings = check_types(EvaluateConfig, settings)
        EvaluateConfig(**settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{flag}: the settings of its run cannot be read from {file} ({reason}); move the model out of the run's "
            "folder, and pass --data-path, --prompt-path, --reward and the --sampling flags"
        ) from error
    for name in ("prompt_path", "system_prompt_path"):
        if settings.get(name) is not None:
            settings[name] = _find_file(settings[name], started_in)
    if "data_path" in settings:
        settings["data_path"] = tuple(_find_set(entry, started_in) for entry in settings["data_path"])
    for name in ("reward", "rollout"):
        where, colon, function = (settings.get(name) or "").rpartition(":")
        if where.endswith(".py"):
            settings[name] = f"{_find_file(where, started_in)}{colon}{function}"
    return settings


def _find_file(path: str, started_in: object) -> str:
    """Return a path of a run's settings as it must be written here."""
    if not isinstance(started_in, str):  # an older run has not logged it
        return path
    there = Path(started_in) / path
    is_elsewhere = there.exists() and there.resolve() != repository_path(path).resolve()
    return str(there) if is_elsewhere else path


def _find_set(entry: str, started_in: object) -> str:
    """Return an entry of --data-path, with or without a name, as it must be written here."""
    name, path = split_name(entry)
    found = _find_file(path, started_in)
    return found if name is None else f"{name}={found}"


def _is_given(name: str, arguments: Sequence[str]) -> bool:
    """Return whether a flag sets the setting."""
    words = name.replace("_", "-")
    return any(flag_given(arguments, flag) is not None for flag in (f"--{words}", f"--no-{words}"))


def _is_part_of_given(name: str, arguments: Sequence[str]) -> bool:
    """Return whether a flag replaces the setting that this one belongs to."""
    return name in _PARTS and flag_given(arguments, _PARTS[name]) is not None


def _warn_of_other_run(config: EvaluateConfig, arguments: Sequence[str]) -> None:
    """Name the settings in which the run of the other model differs from this evaluation, flags excepted."""
    run = None if config.compare_to is None else find_run(config.compare_to)
    if run is None:
        return
    other = take_settings(f"--compare-to {config.compare_to}", run)
    spelled = {name: spell_flag(name, getattr(config, name)) for name in other}
    differing = [
        f"{spell_flag(name, value)} (here {spelled[name].partition(' ')[2] or spelled[name]})"
        for name, value in other.items()
        if value != getattr(config, name) and not (_is_given(name, arguments) or _is_part_of_given(name, arguments))
    ]
    if differing:
        print_line(
            f"warning: --compare-to {config.compare_to}: its run has {', '.join(differing)}; both models are asked "
            "and graded with the settings here",
            sys.stderr,
        )
