"""The real engine in the real loop, and the real model in the real program."""

import json
from pathlib import Path

import pytest
import torch

from drivers.train import train
from drivers.training.components import Components
from tests.drivers.helpers.architectures import make_architecture
from tests.drivers.helpers.engines import start_vllm
from tests.drivers.helpers.letters import letter_grader, make_run, make_tiny_config, make_tiny_parts
from tests.drivers.helpers.processes import call_program, run_program
from tests.drivers.helpers.runs import read_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_train_tiny_policy_with_vllm_learns(tmp_path):
    config, parts = make_tiny_config(engine="vllm"), make_tiny_parts()
    engine = start_vllm(tmp_path / "tiny", parts.policy)
    run = make_run(config, tmp_path / "run", parts.tokenizer)
    try:
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        engine.close()
        run.finish()
    rows = read_rows(tmp_path / "run")
    steps = [row for row in rows if row["phase"] == "train"]
    assert steps[0]["reward"] < 0.15
    assert sum(row["reward"] for row in steps[-3:]) / 3 > 0.9
    assert max(row["sampler_log_prob_diff"] for row in steps if "sampler_log_prob_diff" in row) < 1e-3
    assert [row["step"] for row in rows if row["phase"] == "check"] == [0, 1]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_train_tiny_policy_in_float16_with_vllm(tmp_path):
    """The default tolerance of the self-check holds, with weights that the first updates have changed too."""
    config, parts = make_tiny_config(engine="vllm", dtype="float16", n_grpo_steps=3), make_tiny_parts()
    parts.policy.half()
    engine = start_vllm(tmp_path / "tiny", parts.policy, dtype=torch.float16)
    run = make_run(config, tmp_path / "run", parts.tokenizer)
    try:
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        engine.close()
        run.finish()
    steps = read_rows(tmp_path / "run", "train")
    assert [row["skipped_updates"] for row in steps] == [0, 0, 0]
    assert [row["loss_scale"] for row in steps] == [2**16] * 3
    assert 1e-6 < max(row["sampler_log_prob_diff"] for row in steps) < 2e-3
    assert [row["step"] for row in read_rows(tmp_path / "run", "check")] == [0, 1]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_train_uses_vllm_log_probs_and_greedy_samples(tmp_path):
    """vLLM's log-probs serve as old policy and in importance weights, its greedy samples as a baseline.

    vLLM has no SmolLM3 of its own: it takes the class of transformers, which the policy is of too.
    """
    parts = make_tiny_parts()
    parts.policy = make_architecture("SmolLM3")
    engine = start_vllm(tmp_path / "tiny", parts.policy)
    short = {"engine": "vllm", "n_grpo_steps": 3, "learning_rate": 1e-3, "loss_type": "grpo_clip"}
    steps = {}
    try:
        for name, settings in {
            "bypass": {"old_policy": "sampler"},
            "corrected": {"importance": "truncate", "importance_level": "sequence", "advantage": "remax"},
            "narrow": {"sampling_top_p": 0.5},
        }.items():
            config = make_tiny_config(**short, **settings)
            run = make_run(config, tmp_path / name, parts.tokenizer)
            try:
                train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
            finally:
                run.finish()
            rows = read_rows(tmp_path / name)
            steps[name] = [row for row in rows if row["phase"] == "train"]
        served = engine._llm.apply_model(lambda model: type(model).__name__)
        assert served == ["TransformersForCausalLM"]
    finally:
        engine.close()
    assert all(row["mean_ratio"] == pytest.approx(1.0, abs=1e-4) for row in steps["bypass"] if "mean_ratio" in row)
    assert all(row["mismatch_max"] < 1e-3 for row in steps["corrected"])
    assert all(row["importance_ess"] > 0.9999 for row in steps["corrected"])
    assert all(0 <= row["greedy_reward"] <= 1 for row in steps["corrected"])
    # Renormalized over the likeliest half, a token is about twice as likely: log 2 between sampler and trainer.
    assert steps["narrow"][0]["sampler_log_prob_diff"] > 0.3


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_quickstart_learns_and_its_model_evaluates(tmp_path, capsys):
    """A few long steps on the real SmolLM2, of a quarter of the default batch; evaluate.py reads the final model."""
    flags = f"--n-grpo-steps 4 --eval-steps 5 --n-val-examples 32 --save-dir {tmp_path}/run --wandb-project None"
    flags += " --learning-rate 1e-4 --rollout-batch-size 64 --train-batch-size 64 --gradient-accumulation-steps 8"
    flags += " --dtype bfloat16"  # whatever a loaded machine measures as faster
    run_program("train", flags)
    rows = read_rows(tmp_path / "run")
    before, after = (row["accuracy"] for row in rows if row["phase"] == "eval")
    assert before < 0.35
    assert after > before + 0.15
    flags = f"--model-path {tmp_path}/run/final_model --n-examples 32 --sampling-max-tokens 32"
    call_program("evaluate", f"{flags} --output-dir {tmp_path}/eval", capsys)
    results = json.loads((tmp_path / "eval/results.json").read_text())["results"]["validation"]
    assert results["accuracy"] == pytest.approx(after, abs=0.2)
    assert len((tmp_path / "eval/completions.jsonl").read_text().splitlines()) == 32
