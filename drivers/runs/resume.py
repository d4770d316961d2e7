"""Open a run folder, new or resumed."""

from collections.abc import Callable
from pathlib import Path

from drivers.common.atomic_files import rename_superseded
from drivers.common.errors import UsageError
from drivers.runs.checkpoint import FACTS, TENSORS, read_facts
from drivers.runs.folder import acquire_run_lock, checkpoints, create_run_folder, find_checkpoint
from drivers.settings.grpo import GrpoConfig

RUN_MARKER = "metrics.jsonl"


FINAL = "final_model"


def open_run_folder(config: GrpoConfig, say: Callable[[str], None]) -> tuple[Path, Path | None]:
    """The run's folder, held by this process, and the checkpoint in it to go on from, if there is one."""
    name = config.recipe or Path(str(config.model_path)).name
    if config.resume is None:
        folder = create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
        acquire_run_lock("--save-dir", folder)
        return folder, None
    if config.resume != "auto":
        path = Path(config.resume)
        acquire_run_lock("--resume", path.parent if (path / FACTS).exists() else path)
        checkpoint = find_checkpoint(path, say)
        if checkpoint is None:
            raise UsageError(
                f"--resume {config.resume}: a checkpoint with a folder {TENSORS}, or a run that has one, is required"
            )
        return checkpoint.parent, checkpoint
    assert config.save_dir is not None  # the settings refuse that
    folder = Path(config.save_dir)
    acquire_run_lock("--save-dir", folder)
    checkpoint = find_checkpoint(folder, say)
    if checkpoint is None:
        if (folder / FINAL).exists():
            raise UsageError(
                f"--resume auto: {folder} has a {FINAL}, and no checkpoint with a folder {TENSORS} to go on from: "
                f"pass a new --save-dir, and --model-path {folder / FINAL} to begin from its weights"
            )
        for _, useless in checkpoints(folder):
            say(f"warning: nothing can go on from {useless}; it is set aside, and the run begins again")
            rename_superseded(useless)
        for file in (RUN_MARKER, "completions.jsonl"):  # it ended before its first one
            rename_superseded(folder / file)
        create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
        acquire_run_lock("--save-dir", folder)
    return folder, checkpoint


def finished_model(config: GrpoConfig) -> Path | None:
    """Of the run that is to be gone on with, if all its steps are made."""
    if config.resume is None:
        return None
    final = Path(str(config.save_dir) if config.resume == "auto" else config.resume) / FINAL
    try:
        return final if final.exists() and read_facts(final)["step"] >= config.n_grpo_steps else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--resume: {final} cannot be read ({type(error).__name__}: {error}); move it away, and the run is gone "
            "on with from its last checkpoint"
        ) from error
