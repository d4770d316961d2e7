"""Several runs and one table: `python drivers/sweep.py --list`, `python drivers/sweep.py learning-rates`."""

# isort: off
from drivers import environment  # noqa: F401  before torch: OpenMP reads its settings once

# isort: on
import json
import os
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import tyro

from drivers.config import Settings, exit_with, flag_given, parse_train_config
from drivers.data import read_jsonl
from drivers.errors import UsageError
from drivers.files import write_json, write_text
from drivers.interrupts import terminate_as_interrupt
from drivers.report import write_report
from drivers.series import Recorded
from drivers.sft_config import ExpertIterationConfig, SftConfig, parse_settings
from drivers.sweeps import SHORT, SWEEPS, Base, Variant

PATIENCE_S = 120.0
"""For a run that is told to stop: it writes a checkpoint first."""
STOPPED = 130
"""Exit status of a run that was told to stop."""
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
    for variant in _variants(config, lambda program: understood(program, flags_of(program, {}))):
        own = [name for name in OF_THE_SWEEP if name in variant.flags]
        if own:  # it would lose against the sweep's, and the run have a name that says otherwise
            raise UsageError(f"{config.sweep or '--grid'}, {variant.label}: {own[0]} {_GIVEN}")
        for seed in config.seeds:
            flags = flags_of(variant.program, variant.flags | {"seed": seed})
            understood(variant.program, flags)
            folder = folder_of(config) / f"{variant.label}-seed{seed}"
            program = str(Path(__file__).with_name(f"{variant.program}.py"))
            command = (sys.executable, program, *flags, "--save-dir", str(folder), "--resume", "auto")
            planned.append(Planned(variant, seed, folder, command))
    return planned


def folder_of(config: SweepConfig) -> Path:
    name = Path(config.sweep).stem if config.sweep else f"{config.program}-grid"
    return Path(config.save_dir or f"runs/sweep-{name}")


def understood(program: str, flags: Sequence[str]) -> Settings:
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


# --- running it ------------------------------------------------------------------------------------------------------


class Runner:
    """Starts runs, one per device at a time, and tells what they say of their steps."""

    def __init__(self, planned: Sequence[Planned], devices: Sequence[str]) -> None:
        self.planned, self.devices = planned, devices or (None,)
        self.status: dict[str, int] = {}
        """Exit status by name, of the runs that have ended."""
        self._waiting = deque(planned)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._is_stopped = False

    def run(self) -> None:
        """All of them. Ctrl-C and SIGTERM are handed to those that are running, which keep what they have made."""
        with ThreadPoolExecutor(len(self.devices)) as threads, terminate_as_interrupt():
            working = [threads.submit(self._work, device) for device in self.devices]
            try:
                for one in working:
                    one.result()
            except BaseException:
                self._stop()
                raise

    def _work(self, device: str | None) -> None:
        while True:
            with self._lock:
                if self._is_stopped or not self._waiting:
                    return
                one = self._waiting.popleft()
                number = len(self.planned) - len(self._waiting)
                where = f" on device {device}" if device else ""
                print(f"[{number}/{len(self.planned)}] {one.name}{where}: {shlex.join(one.command[1:])}", flush=True)
                one.folder.parent.mkdir(parents=True, exist_ok=True)
                process = subprocess.Popen(
                    one.command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {}),
                    start_new_session=True,  # a Ctrl-C comes to it from here, once
                )
                self._running.add(process)
            last = self._follow(one, process)
            with self._lock:
                self._running.discard(process)
                # Whom the signal met before it could answer, or did not, has the status of a signal.
                status = STOPPED if self._is_stopped and process.returncode < 0 else process.returncode
                self.status[one.name] = status
            if status not in (0, STOPPED):
                print(f"  {one.name}: failed with exit status {status}: {last}", flush=True)

    def _follow(self, one: Planned, process: "subprocess.Popen[str]") -> str:
        """Until it ends: what it says goes to a file beside its folder, steps to the screen. Returns the last line."""
        last = ""
        assert process.stdout is not None
        with process, Path(f"{one.folder}.log").open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                last = line.strip() or last
                if line.startswith(("step ", "eval at", "Done", "Nothing is left", "Going on", "warning")):
                    print(f"  {one.name}: {line.rstrip()}", flush=True)
        return last

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()  # not Ctrl-C, which whoever was started in the background ignores
        for process in running:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


# --- what came of it -------------------------------------------------------------------------------------------------


def results_of(one: Planned, status: int | None) -> dict[str, Any]:
    """A run in numbers; those of a run that has not come so far are left out."""
    row: dict[str, Any] = {"label": one.variant.label, "seed": one.seed, "folder": one.folder.name}
    row |= {"program": one.variant.program, "flags": one.variant.flags}
    is_failed = status not in (None, 0, STOPPED)
    row["state"] = "finished" if (one.folder / "final_model").exists() else "failed" if is_failed else "not finished"
    if not (one.folder / "metrics.jsonl").is_file():
        return row
    run = Recorded(one.folder, one.name)
    if run.accuracies:
        last, best = max(run.accuracies), max(run.accuracies, key=lambda step: run.accuracies[step].value)
        row |= {
            f"accuracy{end}": value for end, value in zip(("", "_low", "_high"), run.accuracies[last], strict=True)
        }
        row |= {"step": last, "best_accuracy": run.accuracies[best].value, "best_step": best}
        row |= {"accuracy_before": run.accuracies[0].value} if 0 in run.accuracies else {}
    for name in ("reward", "rollout_entropy", "response_tokens"):
        found = run.values("train", name)
        row |= {name: found[max(found)]} if found else {}
    if run.steps[0]:
        row["minutes"] = run.wall_clock / 60
    return row


COLUMNS = {
    "accuracy_before": ("before", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "best_accuracy": ("best", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
    "rollout_entropy": ("entropy", "{:.3f}"),
    "response_tokens": ("tokens", "{:.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, a line per label: means over seeds; accuracy with its range over seeds, or its 95 % interval.

    Of the seeds of a label those that came farthest: before the last step another number is another thing.
    """
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["run", *(COLUMNS[name][0] for name in shown), "state"]]
    for label in dict.fromkeys(row["label"] for row in rows):
        same = [row for row in rows if row["label"] == label]
        farthest = max((row["step"] for row in same if "step" in row), default=None)
        compared = [row for row in same if row.get("step") == farthest]
        cells = [label]
        for name in shown:
            values = [row[name] for row in compared if name in row]
            cell = COLUMNS[name][1].format(fmean(values)) if values else ""
            if name == "accuracy" and values:
                ends = values if len(values) > 1 else [compared[0]["accuracy_low"], compared[0]["accuracy_high"]]
                cell += f" ({min(ends):.3f} to {max(ends):.3f})" if None not in ends else ""
            cells.append(cell)
        states = [row["state"] for row in same]
        cells.append(", ".join(f"{states.count(s)} {s}" if len(same) > 1 else s for s in dict.fromkeys(states)))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write_results(folder: Path, planned: Sequence[Planned], status: Mapping[str, int]) -> str:
    """summary.md, summary.json and the report of all runs that have logged anything; returns the table."""
    rows = [results_of(one, status.get(one.name)) for one in planned]
    write_json(folder / "summary.json", rows)
    table = table_of(rows)
    write_text(folder / "summary.md", table + "\n")
    logged = [one.folder for one, row in zip(planned, rows, strict=True) if "minutes" in row]
    if logged:
        write_report(logged, folder, folder.name)
    return table


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


def tell_sweeps() -> None:
    """What there is, by name."""
    for name, variants in SWEEPS.items():
        print(f"{name:22} {(variants.__doc__ or '').strip()}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: plan, runs, table."""
    try:
        config, shared = tyro.cli(
            SweepConfig, args=None if arguments is None else list(arguments), return_unknown_args=True
        )
        # tyro 1.0 takes an empty list for the name that is not given, where there are flags that it does not know.
        config = replace(config, sweep=None if config.sweep == "[]" else config.sweep)
        if config.list and config.sweep is None and not config.grid:
            tell_sweeps()
            return
        planned = plan(config, shared)
        if config.list:
            print("\n".join(shlex.join(one.command[1:]) for one in planned))
            return
        folder = folder_of(config)
        keep_plan(folder, planned)
        runner = Runner(planned, config.devices)
        try:
            runner.run()
        finally:
            print(write_results(folder, planned, runner.status))
        print(f"Written to {folder}/: summary.md, summary.json, report.html")
        if any(runner.status.values()):
            raise SystemExit(1)
    except UsageError as error:
        exit_with("sweep.py", error, status=2)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
