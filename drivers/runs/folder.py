"""The folder of a run, and the checkpoints in it: which one to go on from, which ones to keep."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from drivers.common.atomic_files import UNFINISHED, remove_directory
from drivers.common.errors import UsageError
from drivers.runs.checkpoint import FACTS, TENSORS, drop_tensors, find_damage, read_facts

BEST = "best_checkpoint"


LOCK = "run.lock"
"""Held by the process that trains in the folder; it names it."""


_held: dict[Path, int] = {}


N_RESUMABLE = 2
"""So many checkpoints keep what training goes on from: should the newest be damaged, there is the one before."""


def create_run_folder(flag: str, path: str | None, name: str, *, marker: str) -> Path:
    """An existing, writable folder that holds no other run, and no evaluation; `marker` is the file that says so."""
    folder = Path(path) if path else Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        responses = folder / "completions.jsonl"
        if responses.exists() and responses.stat().st_size:  # of either: each would write its own over the other's
            raise FileExistsError(errno.EEXIST, "", "completions.jsonl")
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
    for name in (marker, LOCK):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def acquire_run_lock(flag: str, folder: Path) -> None:
    """No other process may train there until `let_go`, or the end of this one, however it ends: a UsageError there.

    Two that go on with one run, as a job that is queued anew before the first has ended, would take each other's files
    away. It is a lock of the process: a child that lives on does not have it. Without a file system that has locks,
    or a folder that can be written to, nothing is held.
    """
    path = (folder / LOCK).resolve()
    if path in _held:
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # who writes there tells why it cannot be
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UsageError(
                f"{flag} {folder}: {holder} is training in it; end that one first, or wait until it has ended"
            ) from error
        return
    with suppress(OSError):  # a full disk
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[path] = file


def release_run_lock(folder: Path) -> None:
    """Others may train there. The file stays: taken away, two might hold one of that name each."""
    file = _held.pop((folder / LOCK).resolve(), None)
    if file is not None:
        os.close(file)


_OWN = re.compile(r"checkpoint-(\d+)(-stopped)?(-\d+)?")
"""What `Run.save` gives, with what `free_name` adds; any other name is a person's."""


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Those of a run with the steps that they hold, oldest first."""
    found = []
    for one in folder.glob("checkpoint-*"):
        name = _OWN.fullmatch(one.name)
        if name is None or not one.is_dir():
            continue
        try:
            found.append((int(read_facts(one)["step"]), one))
        except (OSError, ValueError, KeyError, TypeError):  # damaged; its name says it too
            found.append((int(name[1]), one))
    return sorted(found)


def is_resumable(folder: Path) -> bool:
    """Whether it was written for that; not whether it is undamaged."""
    return (folder / FACTS).exists() and (folder / TENSORS).exists()


def newest_checkpoint(folder: Path) -> Path | None:
    """Of those that training can go on from."""
    return next((one for _, one in reversed(checkpoints(folder)) if is_resumable(one)), None)


def find_checkpoint(path: Path, say: Callable[[str], None] = print) -> Path | None:
    """A checkpoint to go on from, each file of it as it was written: `path`, or the newest of a run's folder.

    A damaged one is not used, and its reason is said: in a run's folder the one before it is looked at, and a `path`
    that is one is a UsageError. None if there is none at all.
    """
    if (path / FACTS).exists():
        reason = find_damage(path) if is_resumable(path) else f"it has no folder {TENSORS}: its model alone was kept"
        if reason is not None:
            raise UsageError(f"--resume {path}: cannot be gone on from: {reason}")
        return path
    for _, one in reversed(checkpoints(path)):
        if (one / TENSORS).exists():
            reason = find_damage(one)
            if reason is None:
                return one
            say(f"warning: {one} is damaged and not used: {reason}")
    return None


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Those of a run of steps beyond `step`."""
    return [one for held, one in checkpoints(folder) if held > step]


def prune_checkpoints(folder: Path, accuracies: Mapping[int, float], keep: int | None) -> Path | None:
    """Keep what is worth its room, and name the best by held-out accuracy; returns that, if any was evaluated.

    Of the newest two all is kept, of older ones the model alone: the rest is six times as large. With `keep`, only the
    newest so many, the best, and the newest that training can go on from are kept at all.
    """
    held = checkpoints(folder)
    resumable = [one for _, one in held if is_resumable(one)]
    for one in resumable[:-N_RESUMABLE]:
        drop_tensors(one)
    # Of a stop in mid-step, the weights are not those that were evaluated.
    whole = [(step, one) for step, one in held if one.name == f"checkpoint-{step}" and step in accuracies]
    best = max(whole, key=lambda pair: accuracies[pair[0]], default=(0, None))[1]
    for _, one in held[:-keep] if keep is not None else ():
        if one != best and one not in resumable[-1:]:  # newer ones may be of stops, and nothing goes on from those
            remove_directory(one)
    if best is not None:
        link = folder / f"{UNFINISHED}{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(best.name)
        link.replace(folder / BEST)
    return best
