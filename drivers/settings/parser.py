"""The command line's parser: flags under headings, and their help from the settings' docstrings."""

import ast
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from drivers.common.arguments import parse_arguments
from drivers.common.errors import UsageError
from drivers.settings.base import Settings
from drivers.settings.tables import ADVANTAGES, OBJECTIVES, AdvantageName, ObjectiveName

Config = TypeVar("Config", bound=Settings)
MOST_USED = (
    "recipe", "model_path", "data_path", "val_data_path", "prompt_path", "reward", "n_grpo_steps", "n_ei_steps",
    "epochs", "learning_rate", "rollout_batch_size", "question_batch_size", "group_size", "train_batch_size",
    "n_examples", "n_samples", "loss_type", "advantage", "kl_coef", "sampling_max_tokens", "engine", "seed",
    "save_dir", "output_dir", "resume", "compare_to", "show",
)  # fmt: skip
"""Flags that stand first in `--help`, under their own heading."""
HEADINGS = (
    "most used", "model", "data", "grading", "sampling", "objective", "importance correction", "KL and entropy",
    "teacher", "optimizer", "evaluation", "engine", "run", "safety",
)  # fmt: skip
SHOWN = {
    str | None: "STR",  # None is a default, and not worth a place in `--help`
    int | None: "INT",
    float | None: "FLOAT",
    tuple[str, ...] | None: "[STR [STR ...]]",
    tuple[str, ...]: "STR ...",
    ObjectiveName: f"{{{','.join(OBJECTIVES)}}}",  # any other text is allowed too
    AdvantageName: f"{{{','.join(ADVANTAGES)}}}",
}
"""Values of flags, where `--help` shows them otherwise than tyro."""


def parse(kind: type[Config], arguments: Sequence[str], defaults: Config) -> Config:
    """Return the settings that the arguments give over `defaults`.

    A parser of the given flags alone is made in a tenth of the time. An error needs the others, to suggest one.
    """
    every = {setting.name for setting in fields(kind)}
    try:
        values = _parse_flags(kind, arguments, defaults, _find_given(every, arguments))
    except UsageError:
        values = _parse_flags(kind, arguments, defaults, every)
    return replace(defaults, **values)


def _find_given(every: Collection[str], arguments: Sequence[str]) -> Collection[str]:
    """Return the settings whose flags are among the arguments, or every setting if a flag is of none, like --help."""
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    words = [flag.removeprefix("--").replace("-", "_") for flag in flags]
    given = {word if word in every else word.removeprefix("no_") for word in words}
    return given if given and given <= set(every) else every


def _parse_flags(
    kind: type[Config], arguments: Sequence[str], defaults: Config, names: Collection[str]
) -> dict[str, Any]:
    """Return the values of the named settings; the arguments have no other flags."""
    nested, description = _nest_by_heading(kind, defaults, names), inspect.getdoc(kind)
    parsed = parse_arguments(nested, arguments, description=description, config=(tyro.conf.OmitArgPrefixes,))
    return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}


def _nest_by_heading(kind: type[Config], defaults: Config, names: Collection[str]) -> type[Any]:
    """Return a dataclass of dataclasses with the named settings: tyro makes one heading of each nested dataclass."""
    hints, texts = get_type_hints(kind), read_help(kind)
    nested: list[tuple[str, Any, Any]] = []
    for heading, members in sort_by_heading(kind).items():
        values = {name: getattr(defaults, name) for name in members if name in names}
        if not values:
            continue
        flags: list[tuple[str, Any, Any]] = [
            (name, Annotated[hints[name], _describe(texts[name], hints[name], value)], field(default=value))
            for name, value in values.items()
        ]
        group = make_dataclass("Group", flags, frozen=True)
        named = Annotated[group, tyro.conf.arg(name=heading, help="")]  # type: ignore[valid-type]
        nested.append((heading.replace(" ", "_"), named, field(default=group())))
    return make_dataclass("Parsed", nested, frozen=True)


def sort_by_heading(kind: type[Settings]) -> dict[str, list[str]]:
    """Return the names of the settings by heading: of the group that defines them, or "most used"."""
    groups = [group for group in reversed(kind.__mro__) if issubclass(group, Settings)]
    names: dict[str, list[str]] = {heading: [] for heading in HEADINGS}
    for setting in fields(kind):
        heading = next(group.heading for group in groups if setting.name in inspect.get_annotations(group))
        names["most used" if setting.name in MOST_USED else heading].append(setting.name)
    names["most used"].sort(key=MOST_USED.index)
    return {heading: members for heading, members in names.items() if members}


def read_help(kind: type[Settings]) -> Mapping[str, str]:
    """Return the help of each setting: the docstring under its field, or the one that it inherits."""
    texts: dict[str, str] = {}
    for group in reversed(kind.__mro__):
        if issubclass(group, Settings):
            texts |= _read_docstrings(inspect.getfile(group)).get(group.__name__, {})
    return texts


@cache
def _read_docstrings(file: str) -> Mapping[str, Mapping[str, str]]:
    """Return the docstrings under the fields of each class of a file, as one line each."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                above.target.id: " ".join(below.value.value.split())
                for above, below in pairwise(node.body)
                if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(below.value.value, str)
            }
    return found


def _describe(text: str, hint: Any, value: Any) -> object:
    """Return how `--help` shows a flag: its effect, then its default, in words if the docstring has some."""
    effect, _, words = text.partition("Default: ")
    if isinstance(value, bool):
        words = "on." if value else "off."
    elif value not in (None, ()) or not words:
        words = f"{' '.join(map(str, value)) if isinstance(value, tuple) else value}."
    return tyro.conf.arg(help=effect.strip(), help_behavior_hint=f"Default: {words}", metavar=SHOWN.get(hint))
