"""Rows of data sets as they are published: jsonl, JSON, csv and parquet files, folders of them, and the hub."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError, first_line
from drivers.tasks.questions import parse_json, read_jsonl

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
Row = tuple[str, Mapping[str, Any]]
"""`file:line` and the values by key."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file or of every file of a folder."""
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES):
            yield from read_rows(file)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _read_table(path, "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a list, of a list or objects within an object, or of the one object that is a row itself."""
    try:
        loaded = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # jsonl under another name
            yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))
            return
        raise UsageError(f"{path}: cannot be read as JSON ({error})") from error
    within = list(loaded.values()) if isinstance(loaded, dict) else []
    if within and all(isinstance(value, dict) for value in within):
        loaded = within
    elif len(within) == 1 and isinstance(within[0], list):
        (loaded,) = within
    if not isinstance(loaded, list):  # Hendrycks MATH has a file per problem
        loaded = [loaded]
    for number, row in enumerate(loaded, start=1):
        is_chat = isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row)
        if not isinstance(row, dict) and not is_chat:
            raise UsageError(f"{path}: entry {number} is {type(row).__name__}; expected an object")
        # A row of Open-Reasoner-Zero is a chat without a key.
        yield (f"{path}[{number}]" if len(loaded) > 1 else str(path)), {"conversations": row} if is_chat else row


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the lines of a table whose first line has the keys."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in lines:
                if None in row:
                    raise UsageError(f"{path}:{lines.line_num}: has more values than the first line has keys")
                yield f"{path}:{lines.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a table ({first_line(error)})") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: parquet files need the package pyarrow: pip install pyarrow") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}[{number}]", row
    except (OSError, ValueError, NotImplementedError) as error:  # what pyarrow's own errors are
        raise UsageError(f"{path}: cannot be read as parquet ({first_line(error)})") from error


def read_hub(name: str, subsets: Sequence[str], split: str) -> Iterator[Row]:
    """Yield the rows of a dataset on the hub, or of a folder in its layout."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            "--hub needs the package datasets; in this clone, run: .venv/bin/pip install -e '.[hub]'"
        ) from error
    for subset in subsets or (None,):
        try:
            loaded = load_dataset(name, subset, split=split)
        except Exception as error:  # the hub client raises many kinds of errors
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UsageError(f"--hub {name} (subset {subset}, split {split}): {reason}") from error
        for number, row in enumerate(loaded, start=1):
            yield f"{name}{f'/{subset}' if subset else ''}:{number}", row
