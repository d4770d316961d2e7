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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from drivers.common import distributed
from drivers.common.atomic_files import (
    UNFINISHED,
    commit_directory,
    flush_to_disk,
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

Entries = Mapping[str, Mapping[str, Any]]
"""Size and SHA-256 of files, by their paths in a checkpoint."""


@dataclass(frozen=True)
class CheckpointContent:
    """Content of a checkpoint, copied to host memory because the next step may change the policy during the write."""

    policy: Any
    """Its configuration is written, not its weights."""
    tokenizer: Any
    values: Mapping[str, Any]
    dtype: str
    weights: dict[str, Tensor]
    """The whole model, on rank 0."""
    adapter: dict[str, Tensor]
    shards: dict[str, Tensor] | None
    """This rank's shard of each tensor of the training state; None in a checkpoint of the model alone."""
    offsets: dict[str, Sequence[int]]
    """Where each shard begins in its tensor."""


def copy_content(
    policy: Any, tokenizer: Any, *, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> CheckpointContent:
    """Copy the content of a checkpoint to host memory; with `tensors`, training can resume from it.

    All ranks gather the weights, and rank 0 keeps them. A float32 policy is its own master: one copy serves both.
    """
    shards: dict[str, Tensor] = {}
    offsets: dict[str, Sequence[int]] = {}
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in (tensors or {}).items():
        shard, offsets[name] = fsdp.local_shard(tensor)
        copies[shard.data_ptr(), shard.shape] = shards[name] = _copy(shard)
    weights: dict[str, Tensor] = {}
    for name, weight in PolicyWeights(policy, fsdp.computing_dtype(policy), as_files=False):  # the saver renames them
        if distributed.is_rank_zero():
            copy = copies.get((weight.data_ptr(), weight.shape))
            weights[name] = _copy(weight) if copy is None else copy
    adapter = adapter_weights(policy)
    if distributed.is_rank_zero():
        weights |= {name: _copy(buffer) for name, buffer in persistent_buffers(policy).items()}
    return CheckpointContent(
        policy=policy,
        tokenizer=tokenizer,
        values=values,
        dtype=str(fsdp.computing_dtype(policy)).removeprefix("torch."),
        weights=weights,
        adapter={name: _copy(weight) for name, weight in adapter.items()} if distributed.is_rank_zero() else {},
        shards=None if tensors is None else shards,
        offsets=offsets,
    )


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())  # on the host, and contiguous


def save_checkpoint(content: CheckpointContent, folder: Path) -> Path:
    """Write a checkpoint that transformers and vLLM load; one process does all of it, in any thread.

    A checkpoint appears whole or not at all, and is never replaced: FileExistsError. It contains only safetensors and
    JSON, so nothing in it can execute.
    """
    begin_checkpoint(folder)
    return commit_checkpoint(folder, write_files(content, folder))


def begin_checkpoint(folder: Path) -> None:
    """Create the folder that a checkpoint is written in; rank 0 does this before any rank writes."""
    if folder.exists():
        raise FileExistsError(f"{folder}: already exists, and a checkpoint is never replaced")
    shutil.rmtree(_unfinished(folder), ignore_errors=True)
    _unfinished(folder).mkdir(parents=True)


def write_files(content: CheckpointContent, folder: Path) -> Entries:
    """Write this rank's files of a checkpoint, flush them to the disk, and return their entries of the manifest."""
    names: list[str] = []
    unfinished = _unfinished(folder)
    if distributed.is_rank_zero():
        _write_model(content, unfinished)
        names += [name for name in _files(unfinished) if not name.startswith(f"{STATE_TENSORS}/")]
    if content.shards is not None:
        (unfinished / STATE_TENSORS).mkdir(exist_ok=True)
        names.append(f"{STATE_TENSORS}/{shard_name(distributed.rank())}")
        write_shards(unfinished / names[-1], content.shards, content.offsets)
    for name in names:
        flush_to_disk(unfinished / name)
    return dict(zip(names, _fingerprints([unfinished / name for name in names]), strict=True))


def _write_model(content: CheckpointContent, folder: Path) -> None:
    """Write everything but the training state."""
    content.policy.save_pretrained(folder, state_dict=dict(content.weights))
    if content.adapter:
        save_adapter(content.policy, content.adapter, folder / "adapter")
    try:
        content.tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception if the disk is full
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # FSDP shards are float32, so transformers would write float32 for a bfloat16 model.
    write_json(folder / "config.json", model_config | {"dtype": content.dtype})
    write_text(folder / STATE_VALUES, json.dumps(content.values) + "\n")


def commit_checkpoint(folder: Path, entries: Entries) -> Path:
    """Write the manifest and give a checkpoint its name. `entries` are those of its files that are known."""
    write_manifest(_unfinished(folder), entries)
    commit_directory(_unfinished(folder), folder)
    return folder


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{UNFINISHED}{folder.name}")


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
def write_manifest(folder: Path, known: Entries | None = None) -> None:
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


def shard_name(rank: int) -> str:
    """Return the name of a rank's file in the training state, as torch's distributed checkpointing gives it."""
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def has_all_shards(folder: Path) -> bool:
    """Return whether every rank has written its shard of the checkpoint that will be `folder`."""
    names = [shard_name(rank) for rank in range(distributed.size())]
    return all((_unfinished(folder) / STATE_TENSORS / name).exists() for name in names)


def write_shards(file: Path, shards: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]]) -> None:
    """Write a file of the training state; it appears under its name when it is whole.

    Its format is that of torch's distributed checkpointing, whose own writer waits for the other ranks.
    """
    places = {name: {"saved_offsets": list(place)} for name, place in offsets.items()}
    unfinished = file.with_name(f"{UNFINISHED}{file.name}")
    save_file(dict(shards), unfinished, metadata={"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})
    unfinished.rename(file)


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
