"""Files and folders that are written completely or not at all, and never overwritten by accident."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"
"""Prefix of a name until all of its content is on the disk."""


def write_json(path: Path, value: Any) -> None:
    """Replace the file atomically by indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file atomically by one JSON object per line."""
    write_texts(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Replace the file atomically by a text."""
    write_texts(path, [text])


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Replace the file atomically by texts in a row: write beside it, flush, then rename.

    If `texts` raises, the file stays as it was.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(texts)
        flush_to_disk(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_directory(unfinished: Path, folder: Path) -> None:
    """Flush everything in a folder to the disk, then give the folder its final name."""
    for file in (*sorted(unfinished.rglob("*"), reverse=True), unfinished):
        flush_to_disk(file)
    unfinished.rename(folder)
    flush_to_disk(folder.parent)


def remove_directory(folder: Path) -> None:
    """Remove a folder so that other processes see it complete or not at all."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Remove what earlier processes left unfinished in this folder and one level below."""
    for entry in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"*/{UNFINISHED}*")):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)  # may be gone with its unfinished parent


def rename_superseded(path: Path) -> None:
    """Move what exists at `path` out of the way, to a free name that starts with `superseded-`."""
    if path.exists():
        path.rename(free_path(path.with_name(f"superseded-{path.name}")))


def free_path(path: Path) -> Path:
    """Return `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())
