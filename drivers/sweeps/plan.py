"""Plan the runs of a sweep."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tyro

from drivers.common.atomic_files import write_json
from drivers.common.errors import UsageError, suggest
from drivers.settings.base import spell_flag
from drivers.settings.command_line import flag_given, names_model, parse_settings, parse_train_config
from drivers.settings.groups import TrainingSettings
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.sweeps.presets import SEEDS, SHORT, SWEEPS, Base, Variant
from drivers.tasks.questions import read_jsonl

SWEEP_SETTINGS = ("seed", "save_dir", "resume")
"""Settings that the sweep sets for each run."""
_IS_SET = "is set by the sweep for each run; use --seeds and --save-dir"


@dataclass(frozen=True)
class SweepConfig:
    """Make several runs and compare them.

    Unrecognized flags are passed to every run.
    """

    sweep: tyro.conf.Positional[str | None] = None
    """A preset (--list shows them), or a .jsonl file with a line per run: `label`, `program` (train, sft or
    expert_iteration) and `flags`, an object."""
    grid: tuple[str, ...] = ()
    """Settings of --program with their values, `learning_rate=1e-5,3e-5`, instead of a preset. All combinations are
    run."""
    program: Literal["train", "sft", "expert_iteration"] = "train"
    """The program that --grid runs."""
    seeds: tuple[int, ...] | None = None
    """Repeat each run with each of these seeds. Tables and reports show the mean and the range. Default: 0, or 0 1 2 3
    for `variants` and `off-policy-32`."""
    devices: tuple[str, ...] = ()
    """CUDA devices: `0 1` makes two runs at once, `0,1 2,3` two runs at once on two GPUs each. Default: one run at a
    time, on the devices that it finds."""
    save_dir: str | None = None
    """Folder of the sweep. Default: runs/sweep-NAME. The same command resumes a stopped sweep."""
    list: bool = False
    """Print the presets, or the commands of the given sweep, and exit."""


@dataclass(frozen=True)
class PlannedRun:
    """A run with the command that starts it."""

    variant: Variant
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


# --- planning --------------------------------------------------------------------------------------------------------
def plan(config: SweepConfig, shared: Sequence[str]) -> list[PlannedRun]:
    """Return all runs. Check their flags first, so that a mistake in one of them stops the sweep before any run."""
    for flag in map(_flag, SWEEP_SETTINGS):
        if flag_given(shared, flag) is not None:
            raise UsageError(f"{flag}: {_IS_SET}")
    seeds = SEEDS.get(config.sweep or "", (0,)) if config.seeds is None else config.seeds
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"{spell_flag('seeds', seeds)}: pass at least one seed, and each seed once")
    is_short = config.sweep in SWEEPS and not names_model(shared)

    def flags_of(program: str, own: Mapping[str, Any]) -> list[str]:
        """Return all flags of a run. The last flag of a name wins: those of the run are the strongest."""
        return [*as_flags(SHORT[program] if is_short else {}), *shared, *as_flags(own)]

    @cache
    def base(program: str) -> TrainingSettings:
        return parse_program_flags(program, flags_of(program, {}))

    planned = []
    for variant in _variants(config, base):
        for name in SWEEP_SETTINGS:  # the flag of the sweep would override it and contradict the label
            if name in variant.flags:
                raise UsageError(f"{config.sweep or '--grid'}, {variant.label}: {_flag(name)} {_IS_SET}")
        for seed in seeds:
            flags = flags_of(variant.program, variant.flags | {"seed": seed})
            try:
                parse_program_flags(variant.program, flags)
            except UsageError as error:
                raise UsageError(f"{config.sweep or '--grid'}, {variant.label}: {error}") from error
            folder = folder_of(config) / f"{variant.label}-seed{seed}"
            program = str(Path(__file__).parents[1] / f"{variant.program}.py")
            command = (sys.executable, program, *flags, "--save-dir", str(folder), "--resume", "auto")
            planned.append(PlannedRun(variant, seed, folder, command))
    return planned


def folder_of(config: SweepConfig) -> Path:
    """Return the folder of the sweep."""
    name = Path(config.sweep).stem if config.sweep else f"{config.program}-grid"
    return Path(config.save_dir or f"runs/sweep-{name}")


def parse_program_flags(program: str, flags: Sequence[str]) -> TrainingSettings:
    """Parse the flags as their program does. An invalid flag also ends this program."""
    kinds = {"sft": SftConfig, "expert_iteration": ExpertIterationConfig}
    with redirect_stdout(StringIO()):  # each run prints these notes itself
        return parse_settings(kinds[program], flags) if program in kinds else parse_train_config(flags)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of a command line."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(_flag(name if value else f"no_{name}"))
        else:
            flags += [_flag(name), *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- variants --------------------------------------------------------------------------------------------------------
def _variants(config: SweepConfig, base: Base) -> list[Variant]:
    if (config.sweep is None) == (not config.grid):
        raise UsageError("give a preset (see --list), a .jsonl file or --grid, one of them, before flags for the runs")
    if config.sweep is None:
        variants = _read_grid(config)
    elif config.sweep in SWEEPS:
        variants = SWEEPS[config.sweep](base)
    elif config.sweep.endswith(".jsonl"):
        variants = [_read_line(f"{config.sweep}:{number}", row) for number, row in read_jsonl(Path(config.sweep))]
    else:
        hint = suggest(config.sweep, SWEEPS)
        raise UsageError(f"{config.sweep}: not a preset or a .jsonl file; the presets are {', '.join(SWEEPS)}{hint}")
    labels = [variant.label for variant in variants]
    if not labels or len(set(labels)) < len(labels):
        raise UsageError(
            f"{config.sweep or '--grid'}: give at least one run, and each a different label; got {labels}"
        )
    return variants


def _read_grid(config: SweepConfig) -> list[Variant]:
    """Return all combinations of the values, which stay text: the program parses them."""
    axes = []
    for entry in config.grid:
        name, has_values, values = entry.partition("=")
        if not has_values or not all(values.split(",")):
            raise UsageError(f"--grid {entry}: give a setting and its values, like learning_rate=1e-5,3e-5")
        axes.append([(name.replace("-", "_"), value) for value in values.split(",")])
    switches = {"true": True, "false": False}
    variants = []
    for settings in product(*axes):
        label = "-".join(value.replace("/", ".") for _, value in settings)
        flags = {name: switches.get(value.lower(), value) for name, value in settings}
        variants.append(Variant(label, config.program, flags))
    return variants


def _read_line(place: str, row: Mapping[str, Any]) -> Variant:
    """Return the run of one line of a .jsonl file."""
    label, program, flags = row.get("label"), row.get("program", "train"), row.get("flags", {})
    is_valid_label = isinstance(label, str) and label and "/" not in label
    if not is_valid_label or program not in [*SHORT] or not isinstance(flags, dict):
        raise UsageError(
            f"{place}: `label` (a name without a slash), `program` ({', '.join(SHORT)}) and `flags` (an object) are "
            f"required, got {dict(row)}"
        )
    return Variant(str(label), program, {name.replace("-", "_"): value for name, value in flags.items()})


# --- sweep.json ------------------------------------------------------------------------------------------------------
def keep_plan(folder: Path, planned: Sequence[PlannedRun]) -> None:
    """Add the runs to sweep.json. Raise UsageError if the folder holds another sweep, whose runs would be mixed in."""
    commands = {run.name: shlex.join(run.command[1:]) for run in planned}
    file = folder / "sweep.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        kept = {str(row["folder"]): str(row["command"]) for row in rows}
        shared = commands.keys() & kept.keys()
        for name in sorted(shared):
            if _without_path(commands[name]) != _without_path(kept[name]):
                raise UsageError(
                    f"--save-dir {folder}: {name} was made by another command (see sweep.json); give another folder"
                )
        if kept and not shared:
            raise UsageError(
                f"--save-dir {folder}: holds another sweep without any of these {len(commands)} runs (see "
                "sweep.json); give another folder"
            )
        write_json(file, [{"folder": name, "command": command} for name, command in (kept | commands).items()])
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--save-dir {folder}: cannot be used ({error})") from error


def _without_path(command: str) -> list[str]:
    """Return a command without the folder of its program, because the clone may have moved."""
    program, *flags = shlex.split(command)
    return [Path(program).name, *flags]
