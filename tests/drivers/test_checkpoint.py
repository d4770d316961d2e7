"""Checkpoints are complete or absent, and other programs load them."""

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drivers.common import distributed
from drivers.common.atomic_files import remove_unfinished, write_json
from drivers.common.errors import UsageError
from drivers.policy.optimizer import PolicyOptimizer
from drivers.runs import checkpoint
from drivers.runs.checkpoint import (
    MANIFEST,
    STATE_TENSORS,
    STATE_VALUES,
    copy_content,
    find_damage,
    save_checkpoint,
)
from drivers.runs.folder import (
    BEST,
    find_checkpoint,
    find_later_checkpoints,
    find_newest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)
from drivers.runs.lock import LOCK, release_run_lock
from drivers.runs.resume import find_finished_model, open_run_folder
from drivers.settings.groups import OptimizerSettings
from drivers.training.memory import checkpoint_copy_bytes
from tests.drivers.helpers.letters import make_tiny_config
from tests.drivers.helpers.processes import limit_file_size
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def save(folder, step, seed=0, **more):
    tensors = {"weight.a": torch.arange(6.0).view(2, 3) + step, "exp_avg.a": torch.zeros(2, 3)}
    values = {"step": step, **more}
    content = copy_content(make_tiny_policy(seed), make_tiny_tokenizer(), values=values, tensors=tensors)
    return save_checkpoint(content, folder / f"checkpoint-{step}")


def save_model(policy, folder, step=1):
    return save_checkpoint(copy_content(policy, make_tiny_tokenizer(), values={"step": step}), folder)


def test_checkpoint_loaded_by_transformers_is_bit_identical(tmp_path):
    policy, tokenizer = make_tiny_policy(5), make_tiny_tokenizer()
    folder = save_model(policy, tmp_path / "checkpoint-3", 3)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for (name, ours), (other, theirs) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(folder).encode("1+1") == tokenizer.encode("1+1")
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 3}


def test_checkpoint_bfloat16_keeps_dtype(tmp_path):
    save_model(make_tiny_policy().bfloat16(), tmp_path / "c")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy_content_is_independent_of_the_policy(tmp_path, dtype):
    """The next step changes weights, moments and buffers in place while a thread writes the copy."""
    policy = make_tiny_policy(3).to(dtype)
    policy.register_buffer("balance", torch.arange(4.0))
    optimizer = PolicyOptimizer(policy, OptimizerSettings())
    live = {**policy.state_dict(), **optimizer.tensors()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    content = copy_content(policy, make_tiny_tokenizer(), values={"step": 1}, tensors=optimizer.tensors())
    copies = {tensor.data_ptr(): tensor for tensor in (*content.weights.values(), *content.shards.values())}
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in copies.values())
    assert n_bytes == checkpoint_copy_bytes(policy) + 16  # the buffer
    with torch.no_grad():
        for tensor in live.values():
            tensor.fill_(7)
    folder = save_checkpoint(content, tmp_path / "c")
    for file in (folder / "model.safetensors", *(folder / STATE_TENSORS).iterdir()):
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, before[name]), name


def test_write_files_of_several_ranks_are_committed_together(tmp_path, monkeypatch):
    """Rank 0 takes the entries of files that it did not write, and hashes those that it has not got."""
    policy, whole = make_tiny_policy(), torch.arange(6.0).view(3, 2)
    content = copy_content(policy, make_tiny_tokenizer(), values={"step": 4}, tensors={"weight.a": whole})
    parts = [
        replace(content, shards={"weight.a": whole[begin:end]}, offsets={"weight.a": (begin, 0)})
        for begin, end in ((0, 2), (2, 3))
    ]
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for knows_other in (True, False):
        folder, entries = tmp_path / f"checkpoint-{knows_other}", {}
        checkpoint.begin_checkpoint(folder)
        for rank, part in enumerate(parts):
            assert not checkpoint.has_all_shards(folder)
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            of_rank = checkpoint.write_files(part, folder)
            assert len(of_rank) > 4 if rank == 0 else list(of_rank) == [f"{STATE_TENSORS}/{checkpoint.shard_name(1)}"]
            entries |= of_rank if knows_other or rank == 0 else {}
        assert checkpoint.has_all_shards(folder)
        checkpoint.commit_checkpoint(folder, entries)
        assert find_damage(folder) is None
        found = torch.zeros(3, 2)
        monkeypatch.setattr(distributed, "size", lambda: 1)
        checkpoint.read_tensors(folder / STATE_TENSORS, {"weight.a": found})
        monkeypatch.setattr(distributed, "size", lambda: 2)
        assert torch.equal(found, whole)


def test_save_checkpoint_error_leaves_nothing_and_can_be_retried(tmp_path, monkeypatch):
    policy, folder = make_tiny_policy(), tmp_path / "checkpoint-1"
    monkeypatch.setattr(checkpoint, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_model(policy, folder, 2)
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    save_model(policy, folder, 2)
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_save_checkpoint_existing_folder_raises(tmp_path):
    folder = save_model(make_tiny_policy(1), tmp_path / "c")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="never replaced"):
        save_model(make_tiny_policy(2), folder, 2)
    assert (folder / "model.safetensors").read_bytes() == before


def test_write_json_error_keeps_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Else a power loss could leave a whole name with half a file."""
    done, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file)))
    for name in ("rename", "replace"):
        move = getattr(os, name)
        monkeypatch.setattr(os, name, lambda old, new, move=move: (done.append(Path(new)), move(old, new)))
    folder, text = save(tmp_path, 1), tmp_path / "a.json"
    named = done.index(folder)
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= set(done[:named])
    assert tmp_path.stat().st_ino in done[named:]
    write_json(text, {"x": 1})
    assert text.stat().st_ino in done[: done.index(text)]


def list_files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def append_byte(path):
    with path.open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, "has changed since it was written: its SHA-256 differs"),
        (truncate, " bytes instead of "),
        (append_byte, " bytes instead of "),
        (lambda path: path.unlink(), ""),
    ],
    ids=["flipped", "short", "longer", "gone"],
)
def test_find_damage_changed_file_is_named(tmp_path, damage, message):
    whole = save(tmp_path, 1)
    assert find_damage(whole) is None
    names = [path.relative_to(whole) for path in list_files(whole)]
    assert len(names) >= 6
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / name)
        reason = find_damage(copy)
        assert reason is not None
        assert name.name in reason
        assert message in reason or name.name == STATE_VALUES
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (MANIFEST, "{", "cannot be read"),
        (MANIFEST, "[]", "cannot be read"),
        (MANIFEST, '{"format": 1, "files": {"config.json": 3}}', "cannot be read"),
        (MANIFEST, '{"format": 2, "files": {}}', "its format is 2; this version reads format 1"),
        (STATE_VALUES, "[1]", "contains no step"),
        (STATE_VALUES, '{"step": "9"}', "contains no step"),
        (f"{STATE_TENSORS}/more.safetensors", "", "more.safetensors does not belong to this checkpoint"),
    ],
)
def test_find_damage_foreign_content_is_named(tmp_path, name, text, message):
    folder = save(tmp_path, 1)
    (folder / name).write_text(text)
    assert message in find_damage(folder)
    (folder / MANIFEST).unlink()
    assert find_damage(folder).startswith(f"it has no {MANIFEST}")


def test_find_checkpoint_damaged_falls_back_and_warns(tmp_path):
    messages = []
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, messages.append).name == "checkpoint-3"
    flip_bit(next((tmp_path / "checkpoint-3" / STATE_TENSORS).iterdir()))
    (tmp_path / "checkpoint-2" / STATE_VALUES).write_text("{")
    assert find_checkpoint(tmp_path, messages.append).name == "checkpoint-1"
    assert "checkpoint-3 is damaged and not used: trainer_state/" in messages[0]
    assert "checkpoint-2 is damaged" in messages[1]
    with pytest.raises(
        UsageError, match=r"--resume .*checkpoint-3: cannot resume from this checkpoint: trainer_state/"
    ):
        find_checkpoint(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert find_checkpoint(tmp_path, messages.append) is None


def test_save_checkpoint_full_disk_loses_nothing(tmp_path):
    """The kernel refuses a tensor, the model or a text. Earlier files stay, and the space is freed."""
    first = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in list_files(tmp_path)}
    sizes = sorted({path.stat().st_size for path in list_files(first)})
    for limit in (0, *(size - 1 for size in sizes)):
        with (
            pytest.raises(BaseException, match=r".") as failed,
            limit_file_size(limit),
        ):  # three libraries raise different errors
            save(tmp_path, 2)
        assert isinstance(failed.value, checkpoint.WRITE_ERRORS)
        assert not (tmp_path / "checkpoint-2").exists()
        assert find_newest_checkpoint(tmp_path) == first
    save(tmp_path, 2)
    assert {path: path.read_bytes() for path in before} == before
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_prune_checkpoints_keeps_newest_and_best(tmp_path):
    """By default the newest two stay resumable; with a number, that many and the best one stay."""
    accuracies = {0: 0.9, 1: 0.1, 2: 0.7, 3: 0.7, 5: 0.2}
    for step in range(1, 6):
        save(tmp_path, step, seed=step)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4-stopped")
    assert prune_checkpoints(tmp_path, accuracies, None).name == "checkpoint-2"
    assert (tmp_path / BEST).resolve() == tmp_path / "checkpoint-2"
    whole = {path.name for path in tmp_path.glob("checkpoint-*") if (path / STATE_TENSORS).exists()}
    assert whole == {"checkpoint-4-stopped", "checkpoint-5"}
    assert all(find_damage(path) is None for path in tmp_path.glob("checkpoint-*"))
    assert prune_checkpoints(tmp_path, accuracies, 2).name == "checkpoint-2"
    names = {"checkpoint-2", "checkpoint-4-stopped", "checkpoint-5"}
    assert {path.name for path in tmp_path.iterdir()} == names | {BEST}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / BEST)
    save(tmp_path, 6)
    assert prune_checkpoints(tmp_path, accuracies | {6: 0.8}, 1).name == "checkpoint-6"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", BEST}
    assert prune_checkpoints(tmp_path, {}, None) is None  # there was no evaluation


def test_prune_checkpoints_leaves_foreign_files(tmp_path):
    """An archive or a renamed copy is not removed, renamed or taken for the newest checkpoint."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1-for-the-paper")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-stopped-2")
    (tmp_path / "checkpoint-9.tar.gz").write_text("an archive")
    (tmp_path / "checkpoint-8").write_text("a note")
    assert [one.name for _, one in list_checkpoints(tmp_path)] == [
        *("checkpoint-1", "checkpoint-2", "checkpoint-2-stopped-2", "checkpoint-3")
    ]
    prune_checkpoints(tmp_path, {}, 1)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        *("checkpoint-1-for-the-paper", "checkpoint-3", "checkpoint-8", "checkpoint-9.tar.gz")
    }
    assert (tmp_path / "checkpoint-1-for-the-paper" / STATE_TENSORS).exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_checkpoints_stopped_ones_do_not_count(tmp_path, keep):
    """A stop inside a step leaves only a model, which does not replace a resumable checkpoint."""
    save(tmp_path, 3)
    for name in ("checkpoint-3-stopped", "checkpoint-3-stopped-2", "checkpoint-4-stopped"):
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / name)
        checkpoint.drop_tensors(tmp_path / name)
    prune_checkpoints(tmp_path, {}, keep)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_find_checkpoint_unreadable_file_falls_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    newer = save(tmp_path, 2)

    def read(paths):
        if any(newer in path.parents for path in paths):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(paths[0]))
        return fingerprints(paths)

    fingerprints = checkpoint._fingerprints
    monkeypatch.setattr(checkpoint, "_fingerprints", read)
    messages = []
    assert find_checkpoint(tmp_path, messages.append).name == "checkpoint-1"
    assert "it cannot be read ([Errno 5] Input/output error" in messages[0]


def test_save_checkpoint_tokenizer_error_is_a_write_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(make_tiny_tokenizer()), "save_pretrained", refuse)
    with pytest.raises(checkpoint.WRITE_ERRORS, match="No space left"):
        save(tmp_path, 1)


def test_open_run_folder_all_damaged_starts_over_and_warns(tmp_path):
    """Damaged checkpoints are renamed: otherwise they would pass for newer than those of the new run."""
    for step in (5, 6):
        flip_bit(next((save(tmp_path, step) / STATE_TENSORS).iterdir()))
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "completions.jsonl").write_text("{}")
    messages = []
    settings = make_tiny_config(save_dir=str(tmp_path), resume="auto")
    assert open_run_folder(settings, messages.append) == (tmp_path, None)
    assert [f"cannot resume from {tmp_path}/checkpoint-{n}" in messages[n - 3] for n in (5, 6)] == [True, True]
    release_run_lock(tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"metrics.jsonl", LOCK}
    assert names == {
        f"superseded-{name}" for name in ("checkpoint-5", "checkpoint-6", "metrics.jsonl", "completions.jsonl")
    }


def test_list_checkpoints_is_in_order_of_steps(tmp_path):
    names = ("checkpoint-10", "checkpoint-2", "checkpoint-9-stopped")
    for name in names:
        (tmp_path / name).mkdir()
        step = int(name.split("-")[1])
        (tmp_path / name / STATE_VALUES).write_text(json.dumps({"step": step}))
    listed = [(2, "checkpoint-2"), (9, "checkpoint-9-stopped"), (10, "checkpoint-10")]
    assert [(step, path.name) for step, path in list_checkpoints(tmp_path)] == listed
    assert [path.name for path in find_later_checkpoints(tmp_path, 9)] == ["checkpoint-10"]


def test_find_finished_model_has_all_steps(tmp_path):
    final = tmp_path / "run" / "final_model"
    for resume, save_dir in ((str(final.parent), None), ("auto", str(final.parent))):
        config = make_tiny_config(n_grpo_steps=5, resume=resume, save_dir=save_dir)
        assert find_finished_model(config) is None
        final.mkdir(parents=True, exist_ok=True)
        for step, found in ((4, None), (5, final), (6, final)):
            (final / STATE_VALUES).write_text(json.dumps({"step": step}))
            assert find_finished_model(config) == found
        shutil.rmtree(final)
    assert find_finished_model(make_tiny_config(n_grpo_steps=5)) is None


def test_find_finished_model_unreadable_raises_usage_error(tmp_path):
    (tmp_path / "final_model").mkdir()
    settings = make_tiny_config(save_dir=str(tmp_path), resume="auto")
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "final_model" / STATE_VALUES).write_text(text)
        with pytest.raises(UsageError, match="final_model cannot be read"):
            find_finished_model(settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_dtype_is_dtype_of_run(tmp_path, dtype):
    """A second measurement for `--dtype auto` might choose another dtype and so another run."""
    policy = make_tiny_policy().to(dtype)
    folder = save_model(policy, tmp_path / "checkpoint-1")
    assert checkpoint.read_dtype(folder) == str(dtype).removeprefix("torch.")
    assert checkpoint.read_dtype(tmp_path) is None


def test_checkpoint_holds_no_code(tmp_path):
    """A checkpoint is safetensors, JSON and the tokenizer's text: no pickle and no code."""
    folder = save(tmp_path, 1)
    assert {path.suffix for path in list_files(folder)} <= {".safetensors", ".json", ".jinja", ".txt"}
    for source in [*(ROOT / "drivers").rglob("*.py"), *(ROOT / "grpo_core").rglob("*.py")]:
        found = re.findall(
            r"trust_remote_code|torch\.load\b|from torch import.* load\b|\bpickle\.|(import|from) pickle|allow_pickle",
            source.read_text(),
        )
        assert not found, source


def test_remove_unfinished_nested_files_are_removed(tmp_path):
    """A kill while the state of a checkpoint is written leaves such files."""
    for name in (".unfinished-checkpoint-3/.unfinished-values.json", "checkpoint-2/.unfinished-values.json", "kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
    (tmp_path / ".unfinished-best_checkpoint").symlink_to("checkpoint-2")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-2", "kept"]
