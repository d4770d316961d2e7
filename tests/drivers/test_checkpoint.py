"""Checkpoints: whole or not at all, and loadable by others."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drivers import checkpoint
from drivers.checkpoint import save_checkpoint, write_json
from tests.tiny import make_tiny_policy, make_tiny_tokenizer


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
