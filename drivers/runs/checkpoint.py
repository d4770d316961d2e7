"""A checkpoint: a model in Hugging Face format, with what training goes on from, and sums of all its files."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
from drivers.policy import fsdp
from drivers.policy.lora import adapter_weights, save_adapter
from drivers.policy.weights import PolicyWeights

FACTS, TENSORS, MANIFEST = "trainer_state.json", "trainer_state", "manifest.json"


FORMAT = 1


WRITE_ERRORS = (OSError, SafetensorError)
"""What the libraries raise that write, where the disk refuses."""


def save_checkpoint(
    policy: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """`folder`, as transformers and vLLM load it, with what training goes on from where `tensors` are given.

    Written beside its final name and renamed at the end: whatever ends the program earlier leaves a folder whose name
    begins with a dot, which nothing takes for a checkpoint. A finished checkpoint is never replaced: FileExistsError.
    Nothing in it can execute: safetensors and JSON. All ranks take part, each writes its own shards.
    """
    unfinished = folder.parent / f"{UNFINISHED}{folder.name}"
    distributed.run_on_rank_zero(partial(_begin, folder, unfinished))
    if tensors is not None:
        write_tensors(unfinished / TENSORS, tensors)
    weights, adapter = _whole_weights(policy), adapter_weights(policy)
    dtype = fsdp.computing_dtype(policy)
    distributed.run_on_rank_zero(
        partial(_finish, policy, tokenizer, folder, unfinished, weights, adapter, dtype, facts)
    )
    return folder


def _whole_weights(policy: nn.Module) -> dict[str, Tensor]:
    """What the Hugging Face format holds; on the first rank, copies (gathered, or merged) in host memory."""
    weights = {}
    own = {parameter.data_ptr() for parameter in policy.parameters()} if distributed.size() == 1 else set()
    for name, weight in PolicyWeights(policy, fsdp.computing_dtype(policy)):
        if distributed.is_rank_zero():
            weights[name] = weight if weight.data_ptr() in own else weight.cpu()
    lasting = policy.state_dict()
    return weights | {name: buffer for name, buffer in policy.named_buffers() if name in lasting}


def _begin(folder: Path, unfinished: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already, and a checkpoint is never replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _finish(
    policy: Any,
    tokenizer: Any,
    folder: Path,
    unfinished: Path,
    weights: dict[str, Tensor],
    adapter: dict[str, Tensor],
    dtype: torch.dtype,
    facts: Mapping[str, Any],
) -> None:
    policy.save_pretrained(unfinished, state_dict=weights)
    if adapter:
        save_adapter(policy, adapter, unfinished / "adapter")
    try:
        tokenizer.save_pretrained(unfinished)
    except Exception as error:  # of a full disk, tokenizers makes a plain Exception
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    settings = json.loads((unfinished / "config.json").read_text(encoding="utf-8"))
    # Shards are in float32, and so transformers takes the model to be.
    write_json(unfinished / "config.json", settings | {"dtype": str(dtype).removeprefix("torch.")})
    write_text(unfinished / FACTS, json.dumps(facts) + "\n")
    write_manifest(unfinished)
    commit_directory(unfinished, folder)


def precision_of(checkpoint: Path) -> str | None:
    """In which its run computes, as its model says."""
    try:
        dtype = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("dtype")
    except (OSError, ValueError, AttributeError):
        return None
    return dtype if dtype in ("float32", "bfloat16") else None


def publish_model(checkpoint: Path, folder: Path) -> None:
    """The model of `checkpoint` as `folder`, without what training goes on from. Weights are linked, not copied."""
    unfinished = folder.parent / f"{UNFINISHED}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, copy_function=_link, ignore=lambda *_: {TENSORS})
    write_text(unfinished / FACTS, json.dumps({"step": read_facts(checkpoint)["step"]}) + "\n")
    known = {name: entry for name, entry in _read_manifest(checkpoint).items() if name.endswith(".safetensors")}
    write_manifest(unfinished, known)
    rename_superseded(folder)
    commit_directory(unfinished, folder)


def _link(source: str, target: str) -> None:
    try:
        if not source.endswith(".safetensors"):
            raise OSError("a person may edit it")
        os.link(source, target)
    except OSError:  # or a file system without links
        shutil.copy2(source, target)


# --- what was written is what is read --------------------------------------------------------------------------------
def write_manifest(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Size and SHA-256 of each file in `folder`; of those in `known` as it says."""
    names = [name for name in _files(folder) if name != MANIFEST]
    new = [name for name in names if name not in (known or {})]
    entries = dict(known or {}) | dict(zip(new, _fingerprints([folder / name for name in new]), strict=True))
    write_json(folder / MANIFEST, {"format": FORMAT, "files": {name: entries[name] for name in names}})


def find_damage(folder: Path) -> str | None:
    """Why `folder` is not, file for file, what `save_checkpoint` has written; None if it is."""
    try:
        entries = _read_manifest(folder)
        sizes = {name: entry["bytes"] for name, entry in entries.items()}
        sums = {name: entry["sha256"] for name, entry in entries.items()}
        facts = read_facts(folder)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}: it is not finished, or nothing that this program has written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or {FACTS} cannot be read ({type(error).__name__}: {error})"
    if not isinstance(facts, dict) or not isinstance(facts.get("step"), int):
        return f"{FACTS} holds no step"
    try:
        return _find_difference(folder, sizes, sums)
    except OSError as error:
        return f"it cannot be read ({error})"


def _find_difference(folder: Path, sizes: Mapping[str, Any], sums: Mapping[str, Any]) -> str | None:
    found = _files(folder)
    for name in sizes:
        if name not in found:
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != sizes[name]:
            return f"{name} has {size} bytes, {sizes[name]} were written"
    foreign = [name for name in found if name.startswith(f"{TENSORS}/") and name not in sizes]
    if foreign:  # whoever reads the folder would read it too
        return f"{foreign[0]} is not of this checkpoint"
    for name, entry in zip(sizes, _fingerprints([folder / name for name in sizes]), strict=True):
        if entry["sha256"] != sums[name]:
            return f"{name} is not as it was written: its SHA-256 is another"
    return None


def drop_tensors(folder: Path) -> None:
    """Of a checkpoint the model alone is kept."""
    kept = {name: entry for name, entry in _read_manifest(folder).items() if not name.startswith(f"{TENSORS}/")}
    remove_directory(folder / TENSORS)
    write_manifest(folder, kept)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format is {manifest['format']!r}; {FORMAT} is what this version reads")
    files: dict[str, dict[str, Any]] = manifest["files"]
    return files


def _files(folder: Path) -> list[str]:
    """Names of all files in it, those of folders with a slash."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprints(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Of many at once: hashing large parts of a file leaves Python's lock to others."""

    def of(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(of, files))


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file for each rank, with its part of each tensor."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _plain_checkpointing():
        save(dict(tensors), storage_writer=writer, no_dist=distributed.size() == 1)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Into `tensors`, however many ranks wrote them. A ValueError where names or shapes are others."""
    reader = HuggingFaceStorageReader(str(folder))
    written = reader.read_metadata().state_dict_metadata
    found = {name: tuple(value.size) for name, value in written.items() if isinstance(value, TensorStorageMetadata)}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, value in written.items():
        if isinstance(value, TensorStorageMetadata):
            held = sum(chunk.sizes.numel() for chunk in value.chunks)
            if held != value.size.numel():
                raise ValueError(
                    f"its files hold {held} of the {value.size.numel()} values of {name}: one of them is missing"
                )
    if found != wanted:
        other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{len(other)} of its {len(found)} tensors do not fit this model's {len(wanted)}: {', '.join(other[:3])}"
        )
    with _plain_checkpointing():
        load(dict(tensors), storage_reader=reader, no_dist=distributed.size() == 1)


@contextmanager
def _plain_checkpointing() -> Iterator[None]:
    """Without warnings of torch about what is as meant: one process that is not distributed. Failures as they are.

    torch catches whatever is raised, Ctrl-C and mistakes of a program too, and raises an exception of its own, the
    same on all ranks; what is no refusal of the disk must not pass for one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        raised = [failure for failure, _ in error.failures.values()]
        raise next((one for one in raised if not isinstance(one, WRITE_ERRORS)), raised[0]) from error
