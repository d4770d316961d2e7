"""Expert iteration: what is right is imitated token for token, and nothing else is; it learns, and resumes."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from drivers import expert_iteration as program
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError
from drivers.engines.hf import HFReplica
from drivers.expert_iteration import iterate, main
from drivers.grading.verdicts import make_inline_grader
from drivers.policy.weights import PolicyWeights
from drivers.runs.folder import find_checkpoint
from drivers.settings.command_line import parse_settings
from drivers.settings.imitation import QUICKSTARTS, ExpertIterationConfig
from drivers.training import update as update_step
from drivers.training.batch import imitation_batch
from drivers.training.launch import save_on_abort
from drivers.training.run import Run
from tests.drivers.parts import tiny_parts
from tests.drivers.test_resume import Stop, assert_same, numbers
from tests.drivers.test_sft import SHARED, rows_of
from tests.drivers.test_train import weights
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_path": "tiny",
    "learning_rate": 1e-2,
    "n_ei_steps": 3,
    "question_batch_size": 4,
    "group_size": 16,
    "train_batch_size": 8,
    "epochs": 2,
    "micro_batch_tokens": 60,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 6,
    "eval_steps": 100,
    "checkpoint_steps": 100,
    "wandb_project": None,
    "engine": "hf",
    "dtype": "float32",
}


def has_letter(response: str, ground_truth: str) -> float:
    """Right is a response with the letter in it: one in eight of the first ones."""
    return float(ground_truth in response)


def go(folder, reward=has_letter, checkpoint=None, stop_at=None, **changes):
    """`stop_at`: how many times the engine answers before it ends the run. All its answers come back."""
    settings, parts, sampled = ExpertIterationConfig(**(TINY | changes)), tiny_parts(), []
    engine = HFReplica(tiny_parts().policy, parts.tokenizer, PolicyWeights(parts.policy, torch.float32))
    answer = engine.generate

    def generate(*arguments, **named):
        if stop_at is not None and len(sampled) >= stop_at:
            raise Stop
        sampled.append(answer(*arguments, **named))
        return sampled[-1]

    engine.generate = generate
    folder.mkdir(exist_ok=True)
    run = Run(settings.of(), folder, parts.tokenizer, Display(1, quiet=True), checkpoint, settings)
    try:
        iterate(settings, parts.policy, engine, make_inline_grader(reward), parts.questions, parts.questions, run)
    except Stop:
        save_on_abort(run, parts.policy)
    finally:
        run.finish()
    moments = {name: tensor.clone() for name, tensor in run.state.tensors().items()}
    return weights(parts.policy), moments, sampled


def test_it_learns_the_letter(tmp_path):
    go(tmp_path, n_ei_steps=6, eval_steps=6)
    before, after = (row["accuracy"] for row in rows_of(tmp_path, "eval"))
    assert before < 0.25
    assert after >= 0.75
    steps = rows_of(tmp_path, "train")
    assert steps[0]["reward"] < 0.3
    assert steps[-1]["reward"] > 0.7


def test_exactly_the_right_responses_are_imitated_each_token_as_it_was_sampled(tmp_path, monkeypatch):
    """Each once in a pass, to the prompt that it was sampled for; and with advantage 1."""
    trained = []
    original = program.update

    def recorded(config, policy, batch, *others):
        assert torch.equal(batch.advantages, torch.ones(len(batch), 1))
        trained.extend(batch.completions)
        return original(config, policy, batch, *others)

    monkeypatch.setattr(program, "update", recorded)
    *_, sampled = go(tmp_path, n_ei_steps=1)
    rollouts = max(sampled, key=len)
    right = [one for one in rollouts if "a" in one.text]
    assert 0 < len(right) < len(rollouts)

    def tokens(completions):
        return sorted((one.prompt_token_ids, one.token_ids) for one in completions)

    assert tokens(trained) == sorted(2 * tokens(right))
    assert trained[: len(right)] != trained[len(right) :]  # each pass has an order of its own
    (step,) = rows_of(tmp_path, "train")
    assert step["right_responses"] == len(right)
    assert step["reward"] == pytest.approx(len(right) / 64)
    assert step["trained_tokens"] == 2 * sum(len(one.token_ids) for one in right)


def test_what_is_imitated_is_the_model_as_it_is_whatever_the_temperature_of_sampling(tmp_path, monkeypatch):
    """-log pi of the first batch, by hand."""
    seen = {}
    compute = update_step.accumulate_gradients

    def recorded(policy, train_batch, config, entropy_coef, metrics):
        if not seen:
            with torch.no_grad():
                rows = [one.prompt_token_ids + one.token_ids for one in train_batch.completions]
                logits = [policy(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for row in rows]
                seen["expected"] = [
                    -log_probs[torch.arange(len(log_probs)), row[1:]][-len(one.token_ids) :].sum().item()
                    for log_probs, row, one in zip(logits, rows, train_batch.completions, strict=True)
                ]
            seen["tokens"] = train_batch.n_response_tokens
            seen["loss"] = compute(policy, train_batch, config, entropy_coef, metrics)
            return seen["loss"]
        return compute(policy, train_batch, config, entropy_coef, metrics)

    monkeypatch.setattr(update_step, "accumulate_gradients", recorded)
    go(tmp_path, n_ei_steps=1, sampling_temperature=0.5)
    assert seen["loss"].item() == pytest.approx(sum(seen["expected"]) / seen["tokens"], rel=1e-5)
    (step,) = rows_of(tmp_path, "train")
    assert "sampler_log_prob_diff" not in step
    assert not rows_of(tmp_path, "anomaly")


def test_a_share_of_a_reward_is_not_right(tmp_path):
    """1 is; half of it is not, and neither is what could not be scored."""

    def half(response, ground_truth):
        return None if "b" in response else 0.5

    before = weights(tiny_parts().policy)
    after, *_ = go(tmp_path, half, n_ei_steps=1)
    assert torch.equal(after, before)


def test_with_nothing_right_no_weight_changes_and_the_run_goes_on(tmp_path, capsys):
    before = weights(tiny_parts().policy)
    after, moments, _ = go(tmp_path, lambda *_: 0.0, n_ei_steps=2)
    assert torch.equal(after, before)
    assert not any(moment.any() for name, moment in moments.items() if "exp_avg" in name)
    assert [(row["kind"], row["step"]) for row in rows_of(tmp_path, "anomaly")] == [
        ("none_right", 1),
        ("none_right", 2),
    ]
    assert [row["right_responses"] for row in rows_of(tmp_path, "train")] == [0, 0]
    assert not {"loss", "grad_norm"} & rows_of(tmp_path, "train")[0].keys()
    with pytest.raises(TrainingAbortedError, match="no response has a reward of 1"):
        go(tmp_path / "strict", lambda *_: 0.0, on_anomaly="stop")


@pytest.mark.slow
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_to_the_last_bit(tmp_path):
    settings = {"eval_steps": 1, "checkpoint_steps": 1}
    *whole, sampled = go(tmp_path / "whole", **settings)
    folder = tmp_path / "stopped"
    go(folder, stop_at=len(sampled) - 1, **settings)
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    assert_same(go(folder, checkpoint=checkpoint, **settings), whole)
    assert numbers(folder) == numbers(tmp_path / "whole")


def test_groups_may_be_of_any_size():
    parts = tiny_parts()
    sampled = parts.engine.generate(
        [question.prompt_token_ids for question in parts.questions],
        ExpertIterationConfig(**TINY).of().sampling,
        seed=0,
    )
    kept = [*sampled[:3], sampled[16], *sampled[32:34]]
    batch = imitation_batch(kept)
    assert batch.group_sizes == [3, 1, 2]
    shuffled = batch.shuffled(torch.Generator().manual_seed(0))
    assert sorted(shuffled.group_sizes) == [1, 2, 3]
    assert sorted(one.token_ids for one in shuffled.completions) == sorted(one.token_ids for one in kept)


def test_the_flags_are_these_and_no_others():
    own = ["n_ei_steps", "question_batch_size", "group_size", "epochs"]
    assert [field.name for field in fields(ExpertIterationConfig)] == [*SHARED, *own]
    config = ExpertIterationConfig(model_path="m").of()
    assert (config.n_grpo_steps, config.n_prompts_per_rollout_batch, config.group_size) == (5, 512, 8)
    assert config.sampling.stop == ("</answer>",)


def test_the_bare_command_is_the_quickstart_and_says_so(capsys):
    bare = parse_settings(ExpertIterationConfig, [])
    assert "quickstart" in capsys.readouterr().out
    own = QUICKSTARTS[ExpertIterationConfig]
    assert {name: getattr(bare, name) for name in own} == own


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in fields(ExpertIterationConfig):
        assert "--" + field.name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n-ei-steps 0", "n_ei_steps=0 must be greater than 0"),
        ("--group-size 0", "group_size=0 must be greater than 0"),
        ("--epochs 0", "epochs=0 must be greater than 0"),
        ("--question-batch-size 5000", "holds 1304 questions, and a step asks 5000 different ones"),
        ("--data-path nowhere.jsonl", "--data-path nowhere.jsonl: no such file"),
        ("--loss-type gspo", "loss-type"),
        ("--resume {sft}", "--resume sft: a run of sft.py, and expert_iteration.py cannot go on with it"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft").mkdir()
    Path("sft/metrics.jsonl").touch()
    Path("sft/config.json").write_text('{"program": "sft.py", "config": {"seed": 1}}')
    with pytest.raises(SystemExit) as ended:
        main(arguments.format(sft="sft").split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    told = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_the_program_runs_and_goes_on(tmp_path):
    """A subprocess, on the tiny model, which is never right."""
    save_tiny(tmp_path / "tiny")
    flags = (
        "--model-path tiny --data-path data/wordadd/train.jsonl --val-data-path data/wordadd/validation.jsonl "
        "--prompt-path data/prompts/wordadd.prompt --engine hf --dtype float32 --question-batch-size 2 --group-size 2 "
        "--sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 4 --n-ei-steps 1 --save-dir out "
        "--wandb-project None"
    )
    for arguments in (flags.split(), ["--resume", "out", "--n-ei-steps", "2"], ["--resume", "out"]):
        command = [sys.executable, ROOT / "drivers/expert_iteration.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Nothing is left to do: out/final_model/ has all 2 steps; more: --n-ei-steps." in done.stdout
    assert [row["step"] for row in rows_of(tmp_path / "out", "train")] == [1, 2]
    assert json.loads((tmp_path / "out/config.json").read_text())["program"] == "expert_iteration.py"
