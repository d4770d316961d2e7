"""Files and folders that appear whole or not at all, and are never lost to one that takes their name."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

UNFINISHED = ".unfinished-"
"""What a name begins with until all that belongs there is on the disk."""


def write_json(path: Path, value: Any) -> None:
    """Indented JSON that replaces the file at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object per line; replaces the file at once."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Beside its final name first, then renamed: the file is the old one or the new one, never half of it."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    flush_to_disk(unfinished)
    unfinished.replace(path)


def flush_to_disk(path: Path) -> None:
    """What was written to this file, or to the names in this folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_directory(unfinished: Path, folder: Path) -> None:
    """Give a folder its final name, all in it being on the disk."""
    for file in (*sorted(unfinished.rglob("*"), reverse=True), unfinished):
        flush_to_disk(file)
    unfinished.rename(folder)
    flush_to_disk(folder.parent)


def remove_directory(folder: Path) -> None:
    """Remove a folder; whoever looks meanwhile finds it whole or not."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Take away what earlier processes left half done, here and in the folders in it."""
    for left in (*folder.glob(f"{UNFINISHED}*"), *folder.glob(f"*/{UNFINISHED}*")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)  # gone with the unfinished folder that it was in


def rename_superseded(path: Path) -> None:
    """Another name for what is there, if anything is: it stays, and what comes in its place has its name."""
    if path.exists():
        path.rename(free_path(path.with_name(f"superseded-{path.name}")))


def free_path(path: Path) -> Path:
    """`path`, or where something is there already, `path-2` and so on."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(one for one in chain([path], numbered) if not one.exists())
