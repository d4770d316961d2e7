"""Lock a run folder, so that only one process trains in it."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from drivers.common.errors import UsageError

LOCK = "run.lock"
"""Locked by the process that trains in the folder. Its one line names the process and the host."""

_locks: dict[Path, FileLock] = {}


def acquire_run_lock(flag: str, folder: Path) -> None:
    """Lock the run folder for this process, or raise a UsageError if another process trains in it.

    Without the lock, a requeued job and its predecessor would replace each other's files. The operating system
    releases the lock when the process ends, no matter how. Where the folder is not writable or the file system has
    no locks, nothing is locked: the first write reports the error if there is one.
    """
    path = (folder / LOCK).resolve()
    if path in _locks:
        return
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"{flag} {folder}: {_read_holder(path)} is training in this folder; stop it first, or wait until it ends"
        ) from error
    except (OSError, NotImplementedError):  # this file system has no locks; the run goes without one
        return
    with suppress(OSError):  # on a full disk the lock holds without its line
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    _locks[path] = lock


def release_run_lock(folder: Path) -> None:
    """Release the lock. The file stays: if it were removed, two processes could each lock a file of that name."""
    lock = _locks.pop((folder / LOCK).resolve(), None)
    if lock is not None:
        lock.release()


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
