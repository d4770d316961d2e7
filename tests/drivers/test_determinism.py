"""`--deterministic`: the same command twice gives the same bytes, except for times."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from drivers import train as program
from tests.drivers.helpers.runs import read_logged_numbers, read_rows, run_grpo
from tests.tiny import save_tiny

FLAGS = (
    "--recipe quickstart --n-grpo-steps 2 --rollout-batch-size 16 --group-size 4 --train-batch-size 8 "
    "--sampling-max-tokens 8 --n-val-examples 8 --checkpoint-steps 1 --wandb-project None --deterministic"
)


def read_without_times(folder: Path) -> dict[str, bytes]:
    """Return the log without times, and every completion, as bytes."""
    rows = read_rows(folder)
    timed = ("time_", "rollout_tokens_per_s", "update_tokens_per_s")
    kept = [json.dumps({k: v for k, v in row.items() if not k.startswith(timed)}) for row in rows]
    return {"metrics": "\n".join(kept).encode(), "completions": (folder / "completions.jsonl").read_bytes()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
# test_resume_with_vllm_is_bit_identical also starts one command twice.
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.nightly])])
def test_deterministic_same_command_gives_same_bytes(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    found = []
    for name in ("one", "two"):
        program.main([*FLAGS.split(), "--model-path", "tiny", "--engine", engine, "--save-dir", name])
        torch.rand(7)  # other draws in this process must not matter
        found.append(read_without_times(tmp_path / name))
    assert found[0] == found[1]
    assert found[0]["metrics"].count(b'"phase": "train"') == 2
    if engine == "hf":
        program.main([*FLAGS.split(), "--model-path", "tiny", "--engine", "hf", "--save-dir", "other", "--seed", "1"])
        assert read_without_times(tmp_path / "other") != found[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"max_refills": 2, "train_batch_size": 16, "loss_type": "grpo_clip"}])
def test_train_ignores_global_generators(tmp_path, kind):
    """A run also leaves torch's global generator as it was."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        runs.append(run_grpo(tmp_path / str(seed), n_grpo_steps=3, **kind))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0][0], runs[1][0])
    assert read_logged_numbers(tmp_path / "1") == read_logged_numbers(tmp_path / "2")
