"""Open a run folder, new or resumed."""

from collections.abc import Callable
from pathlib import Path

from drivers.common.atomic_files import rename_superseded
from drivers.common.errors import UsageError
from drivers.runs.checkpoint import STATE_TENSORS, STATE_VALUES, read_state_values
from drivers.runs.folder import create_run_folder, find_checkpoint, list_checkpoints
from drivers.runs.lock import acquire_run_lock
from drivers.settings.grpo import GrpoConfig

RUN_MARKER = "metrics.jsonl"

FINAL = "final_model"


def open_run_folder(config: GrpoConfig, say: Callable[[str], None]) -> tuple[Path, Path | None]:
    """Create or find the folder of the run and lock it; return it with the checkpoint to resume from, if any."""
    if config.resume is None:
        return _create_locked_folder(config), None
    if config.resume != "auto":
        checkpoint = _find_named_checkpoint(config.resume, say)
        return checkpoint.parent, checkpoint
    folder = Path(str(config.save_dir))  # the settings require it with `--resume auto`
    acquire_run_lock("--save-dir", folder)
    latest = find_checkpoint(folder, say)
    if latest is None:
        _restart_run(folder, say)
        _create_locked_folder(config)
    return folder, latest


def _create_locked_folder(config: GrpoConfig) -> Path:
    name = config.recipe or Path(str(config.model_path)).name
    folder = create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
    acquire_run_lock("--save-dir", folder)
    return folder


def _find_named_checkpoint(resume: str, say: Callable[[str], None]) -> Path:
    path = Path(resume)
    acquire_run_lock("--resume", path.parent if (path / STATE_VALUES).exists() else path)
    checkpoint = find_checkpoint(path, say)
    if checkpoint is None:
        raise UsageError(
            f"--resume {resume}: no checkpoint to resume from; pass a checkpoint with a folder {STATE_TENSORS}, or "
            "a run folder that contains one"
        )
    return checkpoint


def _restart_run(folder: Path, say: Callable[[str], None]) -> None:
    """Rename what an earlier process left in a folder without a usable checkpoint, so that the run can start over."""
    if (folder / FINAL).exists():
        raise UsageError(
            f"--resume auto: {folder} has a {FINAL} but no checkpoint with a folder {STATE_TENSORS} to resume from: "
            f"pass a new --save-dir, and --model-path {folder / FINAL} to start from its weights"
        )
    for _, damaged in list_checkpoints(folder):
        say(f"warning: cannot resume from {damaged}; it is renamed, and the run starts over")
        rename_superseded(damaged)
    for name in (RUN_MARKER, "completions.jsonl"):  # the process ended before its first checkpoint
        rename_superseded(folder / name)


def find_finished_model(config: GrpoConfig) -> Path | None:
    """Return the final model of the run to resume if it already has all its steps, and None otherwise."""
    if config.resume is None:
        return None
    final = Path(str(config.save_dir) if config.resume == "auto" else config.resume) / FINAL
    try:
        return final if final.exists() and read_state_values(final)["step"] >= config.n_grpo_steps else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--resume: {final} cannot be read ({type(error).__name__}: {error}); move it away to resume from the "
            "last checkpoint"
        ) from error
