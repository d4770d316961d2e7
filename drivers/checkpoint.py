"""Checkpoints in Hugging Face format, which appear whole or not at all."""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from drivers import ranks
from drivers.lora import adapter_weights, save_adapter
from drivers.weights import PolicyWeights

UNFINISHED = ".unfinished-"
FACTS, TENSORS = "trainer_state.json", "trainer_state"


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
    ranks.lead(partial(_begin, folder, unfinished))
    if tensors is not None:
        write_tensors(unfinished / TENSORS, tensors)
    weights, adapter = _whole_weights(policy), adapter_weights(policy)
    ranks.lead(partial(_finish, policy, tokenizer, folder, unfinished, weights, adapter, facts))
    return folder


def _whole_weights(policy: nn.Module) -> dict[str, Tensor]:
    """What the Hugging Face format holds; on the first rank, in host memory where they had to be gathered."""
    weights = {}
    for name, weight in PolicyWeights(policy, ranks.computing_dtype(policy)):
        if ranks.is_first():
            weights[name] = weight.cpu() if ranks.size() > 1 else weight
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
    facts: Mapping[str, Any],
) -> None:
    policy.save_pretrained(unfinished, state_dict=weights)
    if adapter:
        save_adapter(policy, adapter, unfinished / "adapter")
    tokenizer.save_pretrained(unfinished)
    write_text(unfinished / FACTS, json.dumps(facts) + "\n")
    for file in sorted(unfinished.rglob("*"), reverse=True):
        _flush_to_disk(file)
    unfinished.rename(folder)
    _flush_to_disk(folder.parent)


def find_checkpoint(path: Path) -> Path | None:
    """A checkpoint that training can go on from: `path`, or of a run's folder the newest; None if it has none."""
    if is_resumable(path):
        return path
    found = {}
    for folder in path.glob("checkpoint-*"):
        if is_resumable(folder):
            found[folder] = int(read_facts(folder)["step"])
    return max(found, key=lambda folder: found[folder], default=None)


def is_resumable(folder: Path) -> bool:
    return (folder / FACTS).exists() and (folder / TENSORS).exists()


def read_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def drop_older_tensors(run_folder: Path, newest: Path) -> None:
    """Of all checkpoints but the newest the model alone is kept: the rest is six times as large."""
    for folder in run_folder.glob("checkpoint-*"):
        if folder != newest and (folder / TENSORS).exists():
            old = folder / f"{UNFINISHED}{TENSORS}"
            (folder / TENSORS).rename(old)
            shutil.rmtree(old)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file for each rank, with its part of each tensor."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet_checkpointing():
        save(dict(tensors), storage_writer=writer, no_dist=ranks.size() == 1)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Into `tensors`, however many ranks wrote them. A ValueError where names or shapes are others."""
    reader = HuggingFaceStorageReader(str(folder))
    written = reader.read_metadata().state_dict_metadata
    found = {name: tuple(value.size) for name, value in written.items() if isinstance(value, TensorStorageMetadata)}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{len(other)} of its {len(found)} tensors do not fit this model's {len(wanted)}: {', '.join(other[:3])}"
        )
    with _quiet_checkpointing():
        load(dict(tensors), storage_reader=reader, no_dist=ranks.size() == 1)


@contextmanager
def _quiet_checkpointing() -> Iterator[None]:
    """Without warnings of torch about what is as meant: one process that is not distributed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
