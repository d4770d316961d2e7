"""Plan the runs of a sweep."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any, Literal

import tyro

from drivers.common.atomic_files import write_json
from drivers.common.errors import UsageError
from drivers.settings.command_line import flag_given, parse_settings, parse_train_config
from drivers.settings.groups import TrainingSettings
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.sweeps.presets import SHORT, SWEEPS, Base, Variant
from drivers.tasks.questions import read_jsonl

OF_THE_SWEEP = ("seed", "save_dir", "resume")
"""Settings that it gives each run itself."""


_GIVEN = "is given to each run by the sweep; --seeds and --save-dir are its own flags"


@dataclass(frozen=True)
class SweepConfig:
    """Make several runs and compare them.

    What is unknown here is a flag of every run: --model-path, say. What a sweep varies it varies around that flag.
    """

    sweep: tyro.conf.Positional[str | None] = None
    """A ready-made sweep (--list tells them), or a .jsonl file: a line per run with `label`, `program` (train, sft or
    expert_iteration) and `flags`, an object."""
    grid: tuple[str, ...] = ()
    """In its place: settings of --program and their values, `learning_rate=1e-5,3e-5`; all combinations are run."""
    program: Literal["train", "sft", "expert_iteration"] = "train"
    """What --grid is of."""
    seeds: tuple[int, ...] = (0,)
    """Each run is made with each of these; tables and reports show their mean and range."""
    devices: tuple[str, ...] = ()
    """CUDA devices, as in `0 1` (two runs at once) or `0,1 2,3` (two runs at once, two GPUs each). Left out: one run
    after the other, on whatever it finds."""
    save_dir: str | None = None
    """Folder of the sweep. Left out: runs/sweep-NAME. The same command again goes on where it ended."""
    list: bool = False
    """Tell the ready-made sweeps, or with one's name its commands, and end."""


@dataclass(frozen=True)
class Planned:
    """A run, as it will be started."""

    variant: Variant
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


# --- what to run -----------------------------------------------------------------------------------------------------
def plan(config: SweepConfig, shared: Sequence[str]) -> list[Planned]:
    """Every run, its flags already understood by its own program: a mistake costs no run."""
    for flag in OF_THE_SWEEP:
        if flag_given(shared, _flag(flag)) is not None:
            raise UsageError(f"{_flag(flag)}: {_GIVEN}")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, config.seeds))}: different seeds are required, at least one")
    is_own = config.sweep not in SWEEPS or flag_given(shared, "--model-path") is not None

    def flags_of(program: str, own: Mapping[str, Any]) -> list[str]:
        """From the weakest to the strongest: the last one of a name holds."""
        return [*as_flags({} if is_own else SHORT[program]), *shared, *as_flags(own)]

    planned = []
    for variant in _variants(config, lambda program: parse_program_flags(program, flags_of(program, {}))):
        own = [name for name in OF_THE_SWEEP if name in variant.flags]
        if own:  # it would lose against the sweep's, and the run have a name that says otherwise
            raise UsageError(f"{config.sweep or '--grid'}, {variant.label}: {own[0]} {_GIVEN}")
        for seed in config.seeds:
            flags = flags_of(variant.program, variant.flags | {"seed": seed})
            parse_program_flags(variant.program, flags)
            folder = folder_of(config) / f"{variant.label}-seed{seed}"
            program = str(Path(__file__).parents[1] / f"{variant.program}.py")
            command = (sys.executable, program, *flags, "--save-dir", str(folder), "--resume", "auto")
            planned.append(Planned(variant, seed, folder, command))
    return planned


def folder_of(config: SweepConfig) -> Path:
    name = Path(config.sweep).stem if config.sweep else f"{config.program}-grid"
    return Path(config.save_dir or f"runs/sweep-{name}")


def parse_program_flags(program: str, flags: Sequence[str]) -> TrainingSettings:
    """The settings that the program makes of these flags. What it cannot make anything of ends this program too."""
    with redirect_stdout(StringIO()):  # what it takes for granted each run tells anew
        match program:
            case "sft":
                return parse_settings(SftConfig, flags)
            case "expert_iteration":
                return parse_settings(ExpertIterationConfig, flags)
            case _:
                return parse_train_config(flags)


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """As they are written on a command line."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(_flag(name) if value else _flag(f"no_{name}"))
        else:
            flags += [_flag(name), *map(str, value if isinstance(value, list | tuple) else (value,))]
    return flags


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variants(config: SweepConfig, base: Base) -> list[Variant]:
    if (config.sweep is None) == (not config.grid):
        raise UsageError(
            "the name of a sweep, a .jsonl file or --grid is required, one of them, before flags for the runs: see "
            "--list"
        )
    if config.sweep is None:
        variants = _of_grid(config)
    elif config.sweep in SWEEPS:
        variants = SWEEPS[config.sweep](base)
    elif config.sweep.endswith(".jsonl"):
        variants = [_of_line(f"{config.sweep}:{number}", row) for number, row in read_jsonl(Path(config.sweep))]
    else:
        raise UsageError(f"{config.sweep}: no ready-made sweep, and no .jsonl file; there are {', '.join(SWEEPS)}")
    labels = [variant.label for variant in variants]
    if not labels or len(set(labels)) < len(labels):
        raise UsageError(
            f"{config.sweep or '--grid'}: runs need names of their own, and one is the least; got {labels}"
        )
    return variants


def _of_grid(config: SweepConfig) -> list[Variant]:
    """All combinations. Values stay as they were written: the program reads them."""
    axes = []
    for entry in config.grid:
        name, is_one, values = entry.partition("=")
        if not is_one or not all(values.split(",")):
            raise UsageError(f"--grid {entry}: a setting and its values are required, like learning_rate=1e-5,3e-5")
        axes.append([(name.replace("-", "_"), value) for value in values.split(",")])
    return [
        Variant("-".join(value.replace("/", ".") for _, value in point), config.program, dict(map(_switch, point)))
        for point in product(*axes)
    ]


def _switch(setting: tuple[str, str]) -> tuple[str, Any]:
    """`true` and `false` are switches, --name and --no-name."""
    name, value = setting
    return name, {"true": True, "false": False}.get(value.lower(), value)


def _of_line(where: str, row: Mapping[str, Any]) -> Variant:
    label, program, flags = row.get("label"), row.get("program", "train"), row.get("flags", {})
    if not isinstance(label, str) or not label or "/" in label or program not in SHORT or not isinstance(flags, dict):
        raise UsageError(
            f"{where}: `label` (a name without a slash), `program` ({', '.join(SHORT)}) and `flags` (an object) are "
            f"required, got {dict(row)}"
        )
    return Variant(label, program, {name.replace("-", "_"): value for name, value in flags.items()})


def keep_plan(folder: Path, planned: Sequence[Planned]) -> None:
    """In sweep.json, which may grow: by seeds, by values. Runs of another sweep would be mixed up with these."""
    new = {one.name: shlex.join(one.command[1:]) for one in planned}
    file = folder / "sweep.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        earlier = {str(entry["folder"]): str(entry["command"]) for entry in kept}
        same = new.keys() & earlier.keys()
        # Not where the program lies: a clone may have moved.
        other = next((name for name in sorted(same) if _flags_of(new[name]) != _flags_of(earlier[name])), None)
        if other or (earlier and not same):
            what = f"{other} was made by another command" if other else f"none of these {len(new)} runs is in it"
            raise UsageError(f"--save-dir {folder}: holds another sweep ({what}: sweep.json); name another folder")
        write_json(file, [{"folder": name, "command": command} for name, command in (earlier | new).items()])
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--save-dir {folder}: cannot be used ({error})") from error


def _flags_of(command: str) -> list[str]:
    program, *flags = shlex.split(command)
    return [Path(program).name, *flags]
