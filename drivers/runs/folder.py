"""Run folders, and the checkpoints in them: create, find and prune."""

import errno
import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from drivers.common.atomic_files import UNFINISHED, remove_directory
from drivers.common.errors import UsageError
from drivers.runs.checkpoint import STATE_TENSORS, STATE_VALUES, drop_tensors, find_damage, read_state_values
from drivers.runs.lock import LOCK

BEST = "best_checkpoint"

RESULTS = ("metrics.jsonl", "results.json", "completions.jsonl")
"""Files of a run or an evaluation that a new one must not overwrite."""

N_RESUMABLE = 2
"""Checkpoints that keep the training state: if the newest is damaged, a run resumes from the one before."""

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)(-stopped)?(-\d+)?")
"""Names that the programs give. Files and folders with other names belong to the user."""


def create_run_folder(flag: str, path: str | None, name: str, *, marker: str) -> Path:
    """Create the folder and its `marker` file; raise a UsageError if it contains a run or an evaluation."""
    if path and Path(path).is_file():
        raise UsageError(f"{flag} {path}: is a file; pass a folder")
    folder = Path(path) if path else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:  # runs and evaluations would overwrite each other's
            if (folder / name).exists() and (folder / name).stat().st_size:
                raise FileExistsError(errno.EEXIST, "", name)
        (folder / marker).touch(exist_ok=False)  # if two runs start at the same moment, one gets the folder
    except FileExistsError as error:
        raise UsageError(
            f"{flag} {folder}: already contains a run ({error.filename}); choose another folder or delete it"
        ) from error
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be written to ({error.strerror or error})") from error
    return folder


def abandon_run_folder(folder: Path, marker: str) -> None:
    """Remove the empty `marker` of a run that did not begin, and the folder if it contains nothing else."""
    for name in (marker, LOCK):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def discard_run(folder: Path, marker: str) -> None:
    """Remove the files of a run that ended before its first result, so that the next try can have its folder."""
    for name in ("config.json", "completions.jsonl", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tensorboard", "wandb"):
        if (folder / name).exists():
            remove_directory(folder / name)
    abandon_run_folder(folder, marker)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run with their steps, oldest first."""
    dated = []
    for path in folder.glob("checkpoint-*"):
        name = _CHECKPOINT_NAME.fullmatch(path.name)
        if name is None or not path.is_dir():
            continue
        try:
            dated.append((int(read_state_values(path)["step"]), path))
        except (OSError, ValueError, KeyError, TypeError):  # it is damaged; its name contains the step too
            dated.append((int(name[1]), path))
    return sorted(dated)


def is_resumable(folder: Path) -> bool:
    """Return whether a checkpoint contains the training state; whether it is undamaged is not checked."""
    return (folder / STATE_VALUES).exists() and (folder / STATE_TENSORS).exists()


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest resumable checkpoint of a run."""
    return next((path for _, path in reversed(list_checkpoints(folder)) if is_resumable(path)), None)


def find_later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Return the checkpoints of a run that were written after `step`."""
    return [path for saved_step, path in list_checkpoints(folder) if saved_step > step]


def find_checkpoint(path: Path, say: Callable[[str], None] = print) -> Path | None:
    """Return an undamaged, resumable checkpoint: `path` itself, or the newest in a run folder; None if none exists.

    In a run folder, a damaged checkpoint gives a warning and the one before it is tried. If `path` itself is a
    checkpoint that cannot be used, the error is a UsageError.
    """
    if (path / STATE_VALUES).exists():
        reason = (
            find_damage(path) if is_resumable(path) else f"it has no folder {STATE_TENSORS}: only its model was kept"
        )
        if reason is not None:
            raise UsageError(f"--resume {path}: cannot resume from this checkpoint: {reason}")
        return path
    for _, checkpoint in reversed(list_checkpoints(path)):
        if (checkpoint / STATE_TENSORS).exists():
            reason = find_damage(checkpoint)
            if reason is None:
                return checkpoint
            say(f"warning: {checkpoint} is damaged and not used: {reason}")
    return None


def drop_old_states(folder: Path, keep: int) -> list[Path]:
    """Delete the training state of all checkpoints but the newest `keep`, and return those, oldest first."""
    resumable = [path for _, path in list_checkpoints(folder) if is_resumable(path)]
    n_dropped = max(0, len(resumable) - keep)
    for path in resumable[:n_dropped]:
        drop_tensors(path)
    return resumable[n_dropped:]


def prune_checkpoints(folder: Path, accuracies: Mapping[int, float], keep: int | None) -> Path | None:
    """Delete what is no longer needed, link the best checkpoint by held-out accuracy, and return it.

    The newest two keep the training state; older ones keep only the model, which is a seventh of the size. With
    `keep`, only the newest `keep`, the best, and the newest resumable checkpoint stay. Return None if none of them
    was evaluated.
    """
    resumable = drop_old_states(folder, N_RESUMABLE)
    dated = list_checkpoints(folder)
    # The weights of a stop inside a step are not the evaluated ones, so `checkpoint-N-stopped` is never the best.
    evaluated = [(step, path) for step, path in dated if path.name == f"checkpoint-{step}" and step in accuracies]
    best = max(evaluated, key=lambda pair: accuracies[pair[0]], default=(0, None))[1]
    for _, path in dated[:-keep] if keep is not None else ():
        if path != best and path not in resumable[-1:]:  # newer checkpoints of stops may not be resumable
            remove_directory(path)
    if best is not None:
        link = folder / f"{UNFINISHED}{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(best.name)
        link.replace(folder / BEST)
    return best
