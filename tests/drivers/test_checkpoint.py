"""Checkpoints: whole or not at all, and loadable by others."""

import errno
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drivers.common.atomic_files import remove_unfinished, write_json
from drivers.common.errors import UsageError
from drivers.runs import checkpoint
from drivers.runs.checkpoint import FACTS, MANIFEST, TENSORS, find_damage, save_checkpoint
from drivers.runs.folder import (
    BEST,
    LOCK,
    checkpoints,
    find_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    release_run_lock,
)
from drivers.runs.resume import finished_model, open_run_folder
from tests.drivers.parts import tiny_config
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def no_file_beyond(size):
    """The kernel refuses to write more into one file, as a full disk does: what fails is what would fail then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(folder, step, seed=0, **more):
    tensors = {"weight.a": torch.arange(6.0).view(2, 3) + step, "exp_avg.a": torch.zeros(2, 3)}
    facts = {"step": step, **more}
    return save_checkpoint(
        make_tiny_policy(seed), make_tiny_tokenizer(), folder / f"checkpoint-{step}", facts=facts, tensors=tensors
    )


def test_a_checkpoint_loads_with_transformers_to_the_same_bits(tmp_path):
    policy, tokenizer = make_tiny_policy(5), make_tiny_tokenizer()
    folder = save_checkpoint(policy, tokenizer, tmp_path / "checkpoint-3", facts={"step": 3})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for (name, ours), (other, theirs) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(folder).encode("1+1") == tokenizer.encode("1+1")
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 3}


def test_a_bfloat16_policy_stays_bfloat16(tmp_path):
    save_checkpoint(make_tiny_policy().bfloat16(), make_tiny_tokenizer(), tmp_path / "c", facts={"step": 1})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").dtype == torch.bfloat16


def test_a_save_that_fails_leaves_no_checkpoint_and_can_be_tried_again(tmp_path, monkeypatch):
    policy, folder = make_tiny_policy(), tmp_path / "checkpoint-1"
    monkeypatch.setattr(checkpoint, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(policy, make_tiny_tokenizer(), folder, facts={"step": 2})
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    save_checkpoint(policy, make_tiny_tokenizer(), folder, facts={"step": 2})
    assert json.loads((folder / "trainer_state.json").read_text()) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_finished_checkpoint_is_never_replaced(tmp_path):
    folder = save_checkpoint(make_tiny_policy(1), make_tiny_tokenizer(), tmp_path / "c", facts={"step": 1})
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="never replaced"):
        save_checkpoint(make_tiny_policy(2), make_tiny_tokenizer(), folder, facts={"step": 2})
    assert (folder / "model.safetensors").read_bytes() == before


def test_json_replaces_the_file_at_once(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def make_longer(path):
    with path.open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is not as it was written: its SHA-256 is another"),
        (cut_short, "bytes, "),
        (make_longer, "bytes, "),
        (lambda path: path.unlink(), ""),
    ],
    ids=["flipped", "short", "longer", "gone"],
)
def test_any_file_that_is_not_as_it_was_written_is_noticed(tmp_path, damage, message):
    whole = save(tmp_path, 1)
    assert find_damage(whole) is None
    names = [path.relative_to(whole) for path in files_of(whole)]
    assert len(names) >= 6
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        damage(copy / name)
        reason = find_damage(copy)
        assert reason is not None
        assert name.name in reason
        assert message in reason or name.name == FACTS
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (MANIFEST, "{", "cannot be read"),
        (MANIFEST, "[]", "cannot be read"),
        (MANIFEST, '{"format": 1, "files": {"config.json": 3}}', "cannot be read"),
        (MANIFEST, '{"format": 2, "files": {}}', "its format is 2; 1 is what this version reads"),
        (FACTS, "[1]", "holds no step"),
        (FACTS, '{"step": "9"}', "holds no step"),
        (f"{TENSORS}/more.safetensors", "", "more.safetensors is not of this checkpoint"),
    ],
)
def test_what_this_program_has_not_written_is_refused(tmp_path, name, text, message):
    folder = save(tmp_path, 1)
    (folder / name).write_text(text)
    assert message in find_damage(folder)
    (folder / MANIFEST).unlink()
    assert find_damage(folder).startswith(f"it has no {MANIFEST}")


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_reason_told(tmp_path):
    said = []
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, said.append).name == "checkpoint-3"
    flip_a_bit(next((tmp_path / "checkpoint-3" / TENSORS).iterdir()))
    (tmp_path / "checkpoint-2" / FACTS).write_text("{")
    assert find_checkpoint(tmp_path, said.append).name == "checkpoint-1"
    assert "checkpoint-3 is damaged and not used: trainer_state/" in said[0]
    assert "checkpoint-2 is damaged" in said[1]
    with pytest.raises(UsageError, match=r"--resume .*checkpoint-3: cannot be gone on from: trainer_state/"):
        find_checkpoint(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert find_checkpoint(tmp_path, said.append) is None


def test_a_full_disk_loses_nothing(tmp_path):
    """Wherever the kernel refuses: in a tensor, in the model, in a text. What is there stays, and the room is free."""
    first = save(tmp_path, 1)
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    sizes = sorted({path.stat().st_size for path in files_of(first)})
    for limit in (0, *(size - 1 for size in sizes)):
        with pytest.raises(BaseException, match=r".") as failed, no_file_beyond(limit):  # of three libraries
            save(tmp_path, 2)
        assert isinstance(failed.value, checkpoint.WRITE_ERRORS)
        assert not (tmp_path / "checkpoint-2").exists()
        assert newest_checkpoint(tmp_path) == first
    save(tmp_path, 2)
    assert {path: path.read_bytes() for path in before} == before
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_what_is_kept(tmp_path):
    """The newest two whole; with a number, the newest so many and the best, which has a name of its own."""
    accuracies = {0: 0.9, 1: 0.1, 2: 0.7, 3: 0.7, 5: 0.2}
    for step in range(1, 6):
        save(tmp_path, step, seed=step)
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-4-stopped")
    assert prune_checkpoints(tmp_path, accuracies, None).name == "checkpoint-2"
    assert (tmp_path / BEST).resolve() == tmp_path / "checkpoint-2"
    whole = {path.name for path in tmp_path.glob("checkpoint-*") if (path / TENSORS).exists()}
    assert whole == {"checkpoint-4-stopped", "checkpoint-5"}
    assert all(find_damage(path) is None for path in tmp_path.glob("checkpoint-*"))
    assert prune_checkpoints(tmp_path, accuracies, 2).name == "checkpoint-2"
    names = {"checkpoint-2", "checkpoint-4-stopped", "checkpoint-5"}
    assert {path.name for path in tmp_path.iterdir()} == names | {BEST}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / BEST)
    save(tmp_path, 6)
    assert prune_checkpoints(tmp_path, accuracies | {6: 0.8}, 1).name == "checkpoint-6"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", BEST}
    assert prune_checkpoints(tmp_path, {}, None) is None  # nothing was evaluated


def test_what_a_person_puts_beside_them_is_left_alone(tmp_path):
    """An archive, a copy of another name: neither is removed, renamed, or taken for the newest."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1-for-the-paper")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-stopped-2")
    (tmp_path / "checkpoint-9.tar.gz").write_text("an archive")
    (tmp_path / "checkpoint-8").write_text("a note")
    assert [one.name for _, one in checkpoints(tmp_path)] == [
        *("checkpoint-1", "checkpoint-2", "checkpoint-2-stopped-2", "checkpoint-3")
    ]
    prune_checkpoints(tmp_path, {}, 1)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        *("checkpoint-1-for-the-paper", "checkpoint-3", "checkpoint-8", "checkpoint-9.tar.gz")
    }
    assert (tmp_path / "checkpoint-1-for-the-paper" / TENSORS).exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_stops_do_not_cost_the_checkpoint_that_training_goes_on_from(tmp_path, keep):
    """Of a stop in mid-step the model alone is kept, however new it is."""
    save(tmp_path, 3)
    for name in ("checkpoint-3-stopped", "checkpoint-3-stopped-2", "checkpoint-4-stopped"):
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / name)
        checkpoint.drop_tensors(tmp_path / name)
    prune_checkpoints(tmp_path, {}, keep)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    save(tmp_path, 1)
    newer = save(tmp_path, 2)

    def read(paths):
        if any(newer in path.parents for path in paths):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(paths[0]))
        return fingerprints(paths)

    fingerprints = checkpoint._fingerprints
    monkeypatch.setattr(checkpoint, "_fingerprints", read)
    said = []
    assert find_checkpoint(tmp_path, said.append).name == "checkpoint-1"
    assert "it cannot be read ([Errno 5] Input/output error" in said[0]


def test_a_tokenizer_that_finds_no_room_fails_as_the_others_do(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(make_tiny_tokenizer()), "save_pretrained", refuse)
    with pytest.raises(checkpoint.WRITE_ERRORS, match="No space left"):
        save(tmp_path, 1)


def test_a_run_without_a_usable_checkpoint_begins_again_and_says_so(tmp_path):
    """What was there gives way whole: left there, it would pass for newer than what is made now."""
    for step in (5, 6):
        flip_a_bit(next((save(tmp_path, step) / TENSORS).iterdir()))
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "completions.jsonl").write_text("{}")
    said = []
    settings = tiny_config(save_dir=str(tmp_path), resume="auto")
    assert open_run_folder(settings, said.append) == (tmp_path, None)
    assert [f"nothing can go on from {tmp_path}/checkpoint-{n}" in said[n - 3] for n in (5, 6)] == [True, True]
    release_run_lock(tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"metrics.jsonl", LOCK}
    assert names == {
        f"superseded-{name}" for name in ("checkpoint-5", "checkpoint-6", "metrics.jsonl", "completions.jsonl")
    }


def test_a_final_model_that_cannot_be_read_is_one_clear_line(tmp_path):
    (tmp_path / "final_model").mkdir()
    settings = tiny_config(save_dir=str(tmp_path), resume="auto")
    for text in (None, "{", "[]"):
        if text is not None:
            (tmp_path / "final_model" / FACTS).write_text(text)
        with pytest.raises(UsageError, match="final_model cannot be read"):
            finished_model(settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_knows_the_precision_of_its_run(tmp_path, dtype):
    """Measured anew, `--dtype auto` might be another, and the run not the one that was stopped."""
    policy = make_tiny_policy().to(dtype)
    folder = save_checkpoint(policy, make_tiny_tokenizer(), tmp_path / "checkpoint-1", facts={"step": 1})
    assert checkpoint.precision_of(folder) == str(dtype).removeprefix("torch.")
    assert checkpoint.precision_of(tmp_path) is None


def test_nothing_in_a_checkpoint_can_execute(tmp_path):
    """Safetensors, JSON and the tokenizer's text: no pickle, no code."""
    folder = save(tmp_path, 1)
    assert {path.suffix for path in files_of(folder)} <= {".safetensors", ".json", ".jinja", ".txt"}
    for source in [*(ROOT / "drivers").glob("*.py"), *(ROOT / "grpo_core").glob("*.py")]:
        text = source.read_text()
        assert not [word for word in ("trust_remote_code", "torch.load(", "pickle") if word in text], source


def test_what_is_half_done_within_what_is_half_done_goes_too(tmp_path):
    """A kill while the facts of a checkpoint are written."""
    for name in (".unfinished-checkpoint-3/.unfinished-facts.json", "checkpoint-2/.unfinished-facts.json", "kept"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{")
    (tmp_path / ".unfinished-best_checkpoint").symlink_to("checkpoint-2")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-2", "kept"]
