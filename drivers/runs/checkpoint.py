"""Checkpoints: a model in Hugging Face format, the training state, and a manifest with checksums of all files."""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from drivers.common import distributed
from drivers.common.atomic_files import (
    UNFINISHED,
    commit_directory,
    remove_directory,
    rename_superseded,
    write_json,
    write_text,
)
from drivers.common.errors import UsageError, first_line
from drivers.policy import fsdp
from drivers.policy.lora import adapter_weights, save_adapter
from drivers.policy.weights import PolicyWeights, persistent_buffers

STATE_VALUES, STATE_TENSORS, MANIFEST = "trainer_state.json", "trainer_state", "manifest.json"

FORMAT = 1
"""Version of the manifest."""

WRITE_ERRORS = (OSError, SafetensorError)
"""Errors of the writing libraries when the disk refuses."""


def save_checkpoint(
    policy: Any,
    tokenizer: Any,
    folder: Path,
    *,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint that transformers and vLLM load; with `tensors`, training can resume from it.

    A checkpoint appears whole or not at all, and is never replaced: FileExistsError. It contains only safetensors and
    JSON, so nothing in it can execute. All ranks take part; each writes its own shards.
    """
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")

    def begin() -> None:
        if folder.exists():
            raise FileExistsError(f"{folder}: already exists, and a checkpoint is never replaced")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        policy.save_pretrained(unfinished, state_dict=weights)
        if adapter:
            save_adapter(policy, adapter, unfinished / "adapter")
        try:
            tokenizer.save_pretrained(unfinished)
        except Exception as error:  # tokenizers raises a plain Exception if the disk is full
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        model_config = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
        # FSDP shards are float32, so transformers would write float32 for a bfloat16 model.
        write_json(unfinished / "config.json", model_config | {"dtype": dtype})
        write_text(unfinished / STATE_VALUES, json.dumps(values) + "\n")
        write_manifest(unfinished)
        commit_directory(unfinished, folder)

    distributed.run_on_rank_zero(begin)
    if tensors is not None:
        write_tensors(unfinished / STATE_TENSORS, tensors)
    weights, adapter = _whole_weights(policy), adapter_weights(policy)
    dtype = str(fsdp.computing_dtype(policy)).removeprefix("torch.")
    distributed.run_on_rank_zero(finish)
    return folder


def check_saving(model_path: str, policy: Any, tokenizer: Any) -> None:
    """Save configurations, tokenizer and one tensor; raise a UsageError if a checkpoint could not be written."""
    name, smallest = min(policy.named_parameters(), key=lambda item: item[1].numel())
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy.save_pretrained(folder, state_dict={name: torch.zeros(smallest.shape)})
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the libraries raise errors of every kind for settings that they do not accept
        raise UsageError(
            f"--model-path {model_path}: the trained model could not be saved ({type(error).__name__}: "
            f"{first_line(error)}); correct the files of the model"
        ) from error


def _whole_weights(policy: nn.Module) -> dict[str, Tensor]:
    """Return the weights in Hugging Face names; gathered or merged ones are copied to the host memory of rank 0."""
    weights = {}
    uncopied = {parameter.data_ptr() for parameter in policy.parameters()} if distributed.size() == 1 else set()
    for name, weight in PolicyWeights(policy, fsdp.computing_dtype(policy), as_files=False):  # the saver renames them
        if distributed.is_rank_zero():
            weights[name] = weight if weight.data_ptr() in uncopied else weight.cpu()
    return weights | persistent_buffers(policy)


def read_dtype(checkpoint: Path) -> str | None:
    """Return the dtype in which the run of this checkpoint computes, or None if it is unknown."""
    try:
        dtype = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("dtype")
    except (OSError, ValueError, AttributeError):
        return None
    return dtype if dtype in ("float32", "bfloat16") else None


def publish_model(checkpoint: Path, folder: Path) -> None:
    """Copy the model of `checkpoint` to `folder`, without the training state. Weights are hard links."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, copy_function=_link, ignore=lambda *_: {STATE_TENSORS})
    write_text(unfinished / STATE_VALUES, json.dumps({"step": read_state_values(checkpoint)["step"]}) + "\n")
    known = {name: entry for name, entry in _read_manifest(checkpoint).items() if name.endswith(".safetensors")}
    write_manifest(unfinished, known)
    rename_superseded(folder)
    commit_directory(unfinished, folder)


def _link(source: str, target: str) -> None:
    if source.endswith(".safetensors"):  # small files are copied: a user may edit them
        with suppress(OSError):  # file systems without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


# --- verification ----------------------------------------------------------------------------------------------------
def write_manifest(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the size and SHA-256 of each file in `folder`; entries in `known` are not computed again."""
    names = [name for name in _files(folder) if name != MANIFEST]
    new = [name for name in names if name not in (known or {})]
    entries = dict(known or {}) | dict(zip(new, _fingerprints([folder / name for name in new]), strict=True))
    write_json(folder / MANIFEST, {"format": FORMAT, "files": {name: entries[name] for name in names}})


def find_damage(folder: Path) -> str | None:
    """Return why `folder` differs from what `save_checkpoint` wrote, or None if every file is unchanged."""
    try:
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in _read_manifest(folder).items()}
        values = read_state_values(folder)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}: it is incomplete, or was not written by this program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or {STATE_VALUES} cannot be read ({type(error).__name__}: {error})"
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return f"{STATE_VALUES} contains no step"
    try:
        return _find_difference(folder, entries)
    except OSError as error:
        return f"it cannot be read ({error})"


def _find_difference(folder: Path, entries: Mapping[str, tuple[Any, Any]]) -> str | None:
    names = _files(folder)
    for name, (n_bytes, _) in entries.items():
        if name not in names:
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != n_bytes:
            return f"{name} has {size} bytes instead of {n_bytes}"
    foreign = [name for name in names if name.startswith(f"{STATE_TENSORS}/") and name not in entries]
    if foreign:  # the reader of the folder would read this file too
        return f"{foreign[0]} does not belong to this checkpoint"
    for name, entry in zip(entries, _fingerprints([folder / name for name in entries]), strict=True):
        if entry["sha256"] != entries[name][1]:
            return f"{name} has changed since it was written: its SHA-256 differs"
    return None


def drop_tensors(folder: Path) -> None:
    """Delete the training state of a checkpoint and keep its model."""
    kept = {name: entry for name, entry in _read_manifest(folder).items() if not name.startswith(f"{STATE_TENSORS}/")}
    remove_directory(folder / STATE_TENSORS)
    write_manifest(folder, kept)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}; this version reads format {FORMAT}")
    return manifest["files"]  # type: ignore[no-any-return]


def _files(folder: Path) -> list[str]:
    """Return the relative paths of all files below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprints(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the size and SHA-256 of each file, computed in threads: hashing releases the interpreter lock."""

    def fingerprint(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(fingerprint, files))


def read_state_values(folder: Path) -> dict[str, Any]:
    """Return the content of trainer_state.json."""
    return json.loads((folder / STATE_VALUES).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file per rank with its shard of each tensor."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_checkpointing():
        save(dict(tensors), storage_writer=writer, no_dist=distributed.size() == 1)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` from files of any number of ranks; raise a ValueError if names or shapes differ."""
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    written = {name: value for name, value in metadata.items() if isinstance(value, TensorStorageMetadata)}
    for name, value in written.items():
        n_values = sum(chunk.sizes.numel() for chunk in value.chunks)
        if n_values != value.size.numel():
            raise ValueError(
                f"its files contain {n_values} of the {value.size.numel()} values of {name}: a file is missing"
            )
    stored = {name: tuple(value.size) for name, value in written.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stored != expected:
        names = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
        raise ValueError(
            f"{len(names)} of its {len(stored)} tensors do not fit this model's {len(expected)}: "
            f"{', '.join(names[:3])}"
        )
    with _plain_checkpointing():
        load(dict(tensors), storage_reader=reader, no_dist=distributed.size() == 1)


@contextmanager
def _plain_checkpointing() -> Iterator[None]:
    """Suppress torch's warnings about a single process, and raise the original error of a failure.

    torch wraps every exception in its own, Ctrl-C and bugs included. Only errors of the disk may pass for errors of
    the disk.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if not isinstance(cause, WRITE_ERRORS)), causes[0]) from error
