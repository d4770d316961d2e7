"""Checkpoints in Hugging Face format, which appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

UNFINISHED = ".unfinished-"


def save_checkpoint(policy: nn.Module, tokenizer: Any, folder: Path, *, step: int) -> Path:
    """`folder`, as transformers and vLLM load it, with the step in `trainer_state.json`.

    Written beside its final name and renamed at the end: whatever ends the program earlier leaves a folder whose name
    begins with a dot, which nothing takes for a checkpoint. A finished checkpoint is never replaced: FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already, and a checkpoint is never replaced")
    unfinished = folder.parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    policy.save_pretrained(unfinished)  # type: ignore[operator]
    tokenizer.save_pretrained(unfinished)
    write_json(unfinished / "trainer_state.json", {"step": step})
    for file in unfinished.iterdir():
        _flush_to_disk(file)
    unfinished.rename(folder)
    _flush_to_disk(folder.parent)
    return folder


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
    unfinished.replace(path)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
