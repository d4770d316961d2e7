"""--deterministic: the same command twice gives the same bytes, but for times."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from drivers import train as program
from tests.drivers.test_resume import go, numbers
from tests.tiny import save_tiny

FLAGS = (
    "--recipe quickstart --n-grpo-steps 2 --rollout-batch-size 16 --group-size 4 --train-batch-size 8 "
    "--sampling-max-tokens 8 --n-val-examples 8 --checkpoint-steps 1 --wandb-project None --deterministic"
)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The log without its times, key by key and digit by digit, and every completion."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time_", "rollout_tokens_per_s", "update_tokens_per_s")
    kept = [json.dumps({k: v for k, v in row.items() if not k.startswith(timed)}) for row in rows]
    return {"metrics": "\n".join(kept).encode(), "completions": (folder / "completions.jsonl").read_bytes()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "engine", ["hf", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.xdist_group("vllm")])]
)
def test_the_same_command_twice_gives_the_same_bytes(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    found = []
    for name in ("one", "two"):
        program.main([*FLAGS.split(), "--model-path", "tiny", "--engine", engine, "--save-dir", name])
        torch.rand(7)  # what else this process draws is nobody's business
        found.append(bytes_of(tmp_path / name))
    assert found[0] == found[1]
    assert found[0]["metrics"].count(b'"phase": "train"') == 2
    program.main([*FLAGS.split(), "--model-path", "tiny", "--engine", "hf", "--save-dir", "other", "--seed", "1"])
    assert bytes_of(tmp_path / "other") != found[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"max_refills": 2, "train_batch_size": 16, "loss_type": "grpo_clip"}])
def test_no_global_generator_is_read(tmp_path, kind):
    """Nor is torch's moved: whoever uses the functions and the loop draws as before."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        runs.append(go(tmp_path / str(seed), n_grpo_steps=3, **kind))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0][0], runs[1][0])
    assert numbers(tmp_path / "1") == numbers(tmp_path / "2")
