"""Expert iteration imitates right responses token by token and nothing else; it learns and resumes."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from drivers import expert_iteration as program
from drivers.common.errors import TrainingAbortedError
from drivers.expert_iteration import main
from drivers.runs.folder import find_checkpoint
from drivers.settings.command_line import parse_settings
from drivers.settings.imitation import QUICKSTARTS, ExpertIterationConfig
from drivers.training import update as update_step
from drivers.training.batch import imitation_batch
from tests.drivers.helpers.letters import flatten_weights, make_tiny_parts
from tests.drivers.helpers.processes import call_program
from tests.drivers.helpers.runs import (
    IMITATION_FLAGS,
    SCHEDULED,
    TINY_EXPERT_ITERATION,
    assert_same_state,
    read_logged_numbers,
    read_rows,
    run_expert_iteration,
)
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.medium
def test_expert_iteration_learns_the_letter(tmp_path):
    run_expert_iteration(tmp_path, n_ei_steps=12, eval_steps=12)
    before, after = (row["accuracy"] for row in read_rows(tmp_path, "eval"))
    assert before < 0.25
    assert after >= 0.75
    steps = read_rows(tmp_path, "train")
    assert steps[0]["reward"] < 0.3
    assert steps[-1]["reward"] > 0.7


def test_expert_iteration_imitates_sampled_tokens_of_right_responses(tmp_path, monkeypatch):
    """Each right response is trained on once per epoch, after its own prompt and with advantage 1."""
    trained = []
    original = program.update

    def recorded(config, policy, batch, *others):
        assert torch.equal(batch.advantages, torch.ones(len(batch), 1))
        trained.extend(batch.completions)
        return original(config, policy, batch, *others)

    monkeypatch.setattr(program, "update", recorded)
    *_, sampled = run_expert_iteration(tmp_path, n_ei_steps=1)
    rollouts = max(sampled, key=len)
    right = [one for one in rollouts if "a" in one.text]
    assert 0 < len(right) < len(rollouts)

    def tokens(completions):
        return sorted((one.prompt_token_ids, one.token_ids) for one in completions)

    assert tokens(trained) == sorted(2 * tokens(right))
    assert trained[: len(right)] != trained[len(right) :]  # each epoch has its own order
    (step,) = read_rows(tmp_path, "train")
    assert step["right_responses"] == len(right)
    assert step["reward"] == pytest.approx(len(right) / 64)
    assert step["trained_tokens"] == 2 * sum(len(one.token_ids) for one in right)


def test_expert_iteration_imitates_what_conversations_sampled(tmp_path, monkeypatch):
    trained = []
    original = program.update

    def recorded(config, policy, batch, *others):
        trained.append(batch)
        return original(config, policy, batch, *others)

    monkeypatch.setattr(program, "update", recorded)
    function = "tests.drivers.helpers.conversations:interrupt"
    run_expert_iteration(tmp_path, n_ei_steps=1, rollout=function, sampling_max_tokens=8)
    (step,) = read_rows(tmp_path, "train")
    assert step["inserted_tokens"] == 2
    assert step["trained_tokens"] == sum(int(batch.response_mask.sum()) for batch in trained) > 0
    assert all((~one.response_mask).sum() >= 2 * len(one) for one in trained)


def test_expert_iteration_loss_ignores_sampling_temperature(tmp_path, monkeypatch):
    """The loss of the first batch equals -log pi by hand, at temperature 1."""
    seen = {}
    compute = update_step.accumulate_gradients

    def recorded(policy, train_batch, *arguments):
        if not seen:
            with torch.no_grad():
                rows = [one.prompt_token_ids + one.token_ids for one in train_batch.completions]
                logits = [policy(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for row in rows]
                seen["expected"] = [
                    -log_probs[torch.arange(len(log_probs)), row[1:]][-len(one.token_ids) :].sum().item()
                    for log_probs, row, one in zip(logits, rows, train_batch.completions, strict=True)
                ]
            seen["tokens"] = train_batch.n_response_tokens
            seen["loss"] = compute(policy, train_batch, *arguments)
            return seen["loss"]
        return compute(policy, train_batch, *arguments)

    monkeypatch.setattr(update_step, "accumulate_gradients", recorded)
    run_expert_iteration(tmp_path, n_ei_steps=1, sampling_temperature=0.5)
    assert seen["loss"].item() == pytest.approx(sum(seen["expected"]) / seen["tokens"], rel=1e-5)
    (step,) = read_rows(tmp_path, "train")
    assert "sampler_log_prob_diff" not in step
    assert not read_rows(tmp_path, "anomaly")


def test_expert_iteration_partial_reward_is_not_right(tmp_path):
    """A reward of 1 is right; a half and an unscored response are not."""

    def half(response, ground_truth):
        return None if "b" in response else 0.5

    before = flatten_weights(make_tiny_parts().policy)
    after, *_ = run_expert_iteration(tmp_path, half, n_ei_steps=1)
    assert torch.equal(after, before)


def test_expert_iteration_nothing_right_changes_no_weight(tmp_path, capsys):
    before = flatten_weights(make_tiny_parts().policy)
    after, moments, _ = run_expert_iteration(tmp_path, lambda *_: 0.0, n_ei_steps=2)
    assert torch.equal(after, before)
    assert not any(moment.any() for name, moment in moments.items() if "exp_avg" in name)
    assert [(row["kind"], row["step"]) for row in read_rows(tmp_path, "anomaly")] == [
        ("none_right", 1),
        ("none_right", 2),
    ]
    assert [row["right_responses"] for row in read_rows(tmp_path, "train")] == [0, 0]
    assert not {"loss", "grad_norm"} & read_rows(tmp_path, "train")[0].keys()
    with pytest.raises(TrainingAbortedError, match="no response is correct"):
        run_expert_iteration(tmp_path / "strict", lambda *_: 0.0, on_anomaly="stop")


@pytest.mark.slow
def test_expert_iteration_stopped_and_resumed_is_bit_identical(tmp_path):
    settings = {"eval_steps": 1, "checkpoint_steps": 1, **SCHEDULED}
    *whole, sampled = run_expert_iteration(tmp_path / "whole", **settings)
    folder = tmp_path / "stopped"
    run_expert_iteration(folder, stop_at=len(sampled) - 1, **settings)
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    assert_same_state(run_expert_iteration(folder, checkpoint=checkpoint, **settings), whole)
    assert read_logged_numbers(folder) == read_logged_numbers(tmp_path / "whole")


def test_imitation_batch_groups_may_differ_in_size():
    parts = make_tiny_parts()
    sampled = parts.engine.generate(
        [question.prompt_token_ids for question in parts.questions],
        ExpertIterationConfig(**TINY_EXPERT_ITERATION).as_grpo().sampling,
        seed=0,
    )
    kept = [*sampled[:3], sampled[16], *sampled[32:34]]
    batch = imitation_batch(kept)
    assert batch.group_sizes == [3, 1, 2]
    shuffled = batch.shuffled(torch.Generator().manual_seed(0))
    assert sorted(shuffled.group_sizes) == [1, 2, 3]
    assert sorted(one.token_ids for one in shuffled.completions) == sorted(one.token_ids for one in kept)


def test_expert_iteration_flags_are_fixed():
    own = ["n_ei_steps", "question_batch_size", "group_size", "epochs", "rollout", "rollout_deadline_s"]
    assert sorted(field.name for field in fields(ExpertIterationConfig)) == sorted([*IMITATION_FLAGS, *own])
    config = ExpertIterationConfig(model_path="m").as_grpo()
    assert (config.n_grpo_steps, config.n_prompts_per_rollout_batch, config.group_size) == (5, 512, 8)
    assert config.sampling.stop == ("</answer>",)


def test_expert_iteration_without_flags_runs_quickstart(capsys):
    bare = parse_settings(ExpertIterationConfig, [])
    assert "quickstart" in capsys.readouterr().out
    own = QUICKSTARTS[ExpertIterationConfig]
    assert {name: getattr(bare, name) for name in own} == own


def test_expert_iteration_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in fields(ExpertIterationConfig):
        assert "--" + field.name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n-ei-steps 0", "--n-ei-steps 0: must be greater than 0"),
        ("--group-size 0", "--group-size 0: must be greater than 0"),
        ("--epochs 0", "--epochs 0: must be greater than 0"),
        ("--question-batch-size 5000", "has 1304 questions, but a step needs 5000 different ones"),
        ("--data-path nowhere.jsonl", "--data-path nowhere.jsonl: no such file"),
        ("--loss-type gspo", "loss-type"),
        ("--resume {sft}", "--resume sft: is a run of sft.py"),
    ],
)
def test_expert_iteration_invalid_flags_exit_with_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft").mkdir()
    Path("sft/metrics.jsonl").touch()
    Path("sft/config.json").write_text('{"program": "sft.py", "config": {"seed": 1}}')
    with pytest.raises(SystemExit) as ended:
        main(arguments.format(sft="sft").split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    output = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_expert_iteration_program_runs_and_resumes(tmp_path, monkeypatch, capsys):
    """On the tiny model, which is never right."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    flags = (
        "--model-path tiny --data-path data/wordadd/train.jsonl --val-data-path data/wordadd/validation.jsonl "
        "--prompt-path data/prompts/wordadd.prompt --engine hf --dtype float32 --question-batch-size 2 --group-size 2 "
        "--sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 4 --n-ei-steps 1 --save-dir out "
        "--wandb-project None"
    )
    call_program("expert_iteration", flags, capsys)
    call_program("expert_iteration", "--resume out --n-ei-steps 2", capsys)
    said = call_program("expert_iteration", "--resume out", capsys)
    assert "out/final_model/ is already complete (2/2 steps). Increase --n-ei-steps to continue." in said
    assert [row["step"] for row in read_rows(tmp_path / "out", "train")] == [1, 2]
    assert json.loads((tmp_path / "out/config.json").read_text())["program"] == "expert_iteration.py"
