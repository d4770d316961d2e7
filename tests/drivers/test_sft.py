"""Fine-tuning on demonstrations: the loss, the choice of demonstrations, and resumes."""

import json
import re
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from drivers import sft as sft_program
from drivers import train as train_program
from drivers.common.errors import UsageError
from drivers.grading.verdicts import Graded
from drivers.runs.folder import find_checkpoint
from drivers.settings.command_line import parse_settings
from drivers.settings.imitation import QUICKSTARTS, SftConfig
from drivers.sft import choose_demonstrations, main, select_batch
from drivers.tasks.demonstrations import load_demonstrations, make_demonstrations
from drivers.tasks.questions import Prompt, fit_context
from drivers.tasks.wordadd import WRONG_SHARE
from drivers.tasks.wordadd import make_demonstrations as make_wordadd_demonstrations
from drivers.training import update as update_step
from grpo_core import tokenize_prompt_and_output
from tests.drivers.helpers.processes import call_program, run_program
from tests.drivers.helpers.runs import (
    IMITATION_FLAGS,
    LETTER_RESPONSES,
    SCHEDULED,
    assert_same_state,
    make_letter_demonstrations,
    read_logged_numbers,
    read_rows,
    run_sft,
)
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

ROOT = Path(__file__).resolve().parents[2]
DATA = " --data-path data/wordadd/sft.jsonl --val-data-path data/wordadd/validation.jsonl"


def compute_likelihood(demonstrations, aggregation):
    """Return the mean of -log softmax in float64, computed token by token, and its gradients."""
    policy = make_tiny_policy().double()
    responses = []
    for one in demonstrations:
        ids = [*one.prompt_token_ids, *one.response_token_ids]
        logits = policy(input_ids=torch.tensor([ids])).logits[0]
        terms = []
        for place in range(len(one.prompt_token_ids), len(ids)):
            scores = logits[place - 1]
            terms.append(torch.log(torch.exp(scores - scores.max()).sum()) + scores.max() - scores[ids[place]])
        responses.append(terms)
    if aggregation == "token_mean":
        loss = sum(sum(terms) for terms in responses) / sum(len(terms) for terms in responses)
    elif aggregation == "sequence_mean":
        loss = sum(sum(terms) / len(terms) for terms in responses) / len(responses)
    else:
        loss = sum(sum(terms) for terms in responses) / len(responses)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.medium
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_sft_loss_is_mean_negative_log_likelihood(tmp_path, monkeypatch, aggregation):
    """The sampling temperature and the micro-batches do not matter."""
    demonstrations, seen = make_letter_demonstrations(*LETTER_RESPONSES), {}
    compute = update_step.accumulate_gradients

    def recorded(policy, *arguments):
        loss = compute(policy, *arguments)
        seen["loss"] = loss.item()
        seen["gradients"] = {name: p.grad.clone() for name, p in policy.named_parameters()}
        return loss

    monkeypatch.setattr(update_step, "accumulate_gradients", recorded)
    run_sft(tmp_path, demonstrations, train_batch_size=10, aggregation=aggregation, sampling_temperature=0.5)
    loss, gradients = compute_likelihood(demonstrations, aggregation)
    assert seen["loss"] == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        assert_close(seen["gradients"][name].double(), expected, rtol=1e-4, atol=1e-6)
    (step,) = read_rows(tmp_path, "train")
    tokens = sum(len(one.response_token_ids) for one in demonstrations)
    assert step["trained_tokens"] == tokens
    assert step["nll"] == pytest.approx(compute_likelihood(demonstrations, "token_mean")[0], rel=1e-5)


def test_sft_learns_its_demonstrations(tmp_path):
    run_sft(tmp_path, make_letter_demonstrations(*["aaaaaa"] * 12), epochs=6, eval_steps=6)
    accuracies = [row["accuracy"] for row in read_rows(tmp_path, "eval")]
    assert accuracies[0] < 0.15
    assert accuracies[-1] > 0.9
    steps = read_rows(tmp_path, "train")
    assert steps[-1]["nll"] < 0.3 < steps[0]["nll"]
    assert [row["step"] for row in read_rows(tmp_path, "eval")] == [0, 6, 12, 18]
    assert "sampler_log_prob_diff" not in {
        row["kind"] for row in read_rows(tmp_path, "anomaly")
    }  # nothing was sampled


@pytest.mark.slow
def test_sft_stopped_and_resumed_is_bit_identical(tmp_path):
    settings = {"epochs": 2, "train_batch_size": 6, "eval_steps": 1, "checkpoint_steps": 1, **SCHEDULED}
    *whole, answers = run_sft(tmp_path / "whole", make_letter_demonstrations(*LETTER_RESPONSES), **settings)
    folder = tmp_path / "stopped"
    run_sft(folder, make_letter_demonstrations(*LETTER_RESPONSES), stop_at=answers - 1, **settings)  # in epoch 2
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    assert_same_state(run_sft(folder, make_letter_demonstrations(*LETTER_RESPONSES), checkpoint, **settings), whole)
    assert read_logged_numbers(folder) == read_logged_numbers(tmp_path / "whole")


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 5)])
def test_select_batch_each_epoch_is_a_permutation(n, size):
    steps = -(-n // size)
    passes = [
        [i for step in range(1, steps + 1) for i in select_batch(n, size, 7, epoch * steps + step)]
        for epoch in range(20)
    ]
    assert all(sorted(order) == list(range(n)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert select_batch(n, size, 7, 1) != select_batch(n, size, 8, 1) or n < 5


def test_demonstration_ends_like_a_sample():
    """It ends with the stop string or else with the end token; its tokens are those of grpo_core's function."""
    tokenizer = make_tiny_tokenizer()
    (stopped,) = make_letter_demonstrations("5 </answer>")
    (plain,) = make_letter_demonstrations("5 <answer>")
    (without,) = make_letter_demonstrations("5 </answer>", stop=())
    assert tokenizer.decode(stopped.response_token_ids) == "5 </answer>"
    assert plain.response_token_ids[-1] == tokenizer.eos_token_id
    assert without.response_token_ids == (*stopped.response_token_ids, tokenizer.eos_token_id)
    expected = tokenize_prompt_and_output(["say it ! "], ["5 </answer>"], tokenizer)
    assert (*stopped.prompt_token_ids, *stopped.response_token_ids)[1:] == tuple(expected["labels"][0].tolist())


def test_demonstration_question_is_formatted_and_prompt_is_not(tmp_path):
    path = write_lines(
        tmp_path, {"question": "1?", "response": "x", "answer": 1}, {"prompt": "{question} 1", "response": "y"}
    )
    asked, whole = load_demonstrations("--data-path", path)
    assert (asked.answer, whole.answer, whole.source) == ("1", "", f"{path}:2")
    made = make_demonstrations([asked, whole], Prompt("Q: {question}"), (), make_tiny_tokenizer())
    assert [make_tiny_tokenizer().decode(one.prompt_token_ids) for one in made] == ["Q: 1?", "{question} 1"]
    with pytest.raises(UsageError, match=r"1 of 2 questions do not fit .* context of 13 .*/sft.jsonl:2, needs 14"):
        fit_context(made, max_new_tokens=1, context=13, long_prompts="refuse")


@pytest.mark.medium
def test_sft_leaves_out_long_demonstrations_before_it_counts_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"{k} ", "response": "1" * (600 if k % 3 else 2)} for k in range(9)]
    main(
        f"--model-path tiny --data-path {write_lines(tmp_path, *rows)} --val-data-path data/wordadd/validation.jsonl "
        "--prompt-path data/prompts/wordadd.prompt --engine hf --dtype float32 --train-batch-size 2 --epochs 2 "
        "--sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 2 --long-prompts drop --save-dir out "
        "--wandb-project None".split()
    )
    assert "--long-prompts drop: 6 of 9 questions do not fit" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in read_rows(tmp_path / "out", "train")] == [1, 2, 3, 4]


def write_lines(folder, *rows):
    path = folder / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.medium
def test_load_demonstrations_reads_assignment_format(tmp_path):
    """The format has prompt, response and ground_truth; `answer` of our own layout has precedence."""
    row = {"prompt": "User: 1?\nAssistant: <think>", "response": " </think> <answer> 2 </answer>"}
    path = write_lines(
        tmp_path, row | {"ground_truth": "2"}, row | {"ground_truth": 0}, row | {"answer": 3, "ground_truth": 2}
    )
    examples = load_demonstrations("--data-path", path)
    assert [example.answer for example in examples] == ["2", "0", "3"]
    assert all(example.has_prompt and example.question == row["prompt"] for example in examples)
    assert (
        len(choose_demonstrations(SftConfig(model_path="tiny", data_path=path, correct_only=True), lambda _: None))
        == 1
    )


def test_choose_demonstrations_smaller_subset_is_prefix(tmp_path):
    rows = [{"question": f"{k}?", "response": "x"} for k in range(20)]
    settings = SftConfig(model_path="tiny", data_path=write_lines(tmp_path, *rows))
    chosen = {n: choose_demonstrations(replace(settings, n_examples=n)) for n in (5, 10, 20)}
    assert chosen[5] == chosen[10][:5]
    assert chosen[10] == chosen[20][:10]
    assert chosen[20] == choose_demonstrations(settings) != load_demonstrations("-", settings.data_path)
    assert choose_demonstrations(replace(settings, seed=1, n_examples=5)) != chosen[5]
    with pytest.raises(UsageError, match="--n-examples 21: only 20 demonstrations are available"):
        choose_demonstrations(replace(settings, n_examples=21))


@pytest.mark.slow
def test_choose_demonstrations_correct_only_keeps_right_demonstrations(capsys):
    settings = SftConfig(data_path="data/wordadd/sft.jsonl", correct_only=True)
    messages = []
    right = choose_demonstrations(settings, messages.append)
    assert messages == [f"--correct-only: {len(right)} of 1304 demonstrations are correct"]
    assert len(right) == 1304 - round(WRONG_SHARE * 1304)
    for one in right:
        a, b = map(int, re.findall(r"\d+", one.question))
        assert one.response == f" {a} + {b} = {a + b} </think> <answer> {a + b} </answer>"
    assert choose_demonstrations(replace(settings, n_examples=128)) == right[:128]


def test_choose_demonstrations_correct_only_takes_rewards_of_one(tmp_path, monkeypatch):
    """A partial reward and a response that could not be scored are not correct."""
    path = write_lines(tmp_path, *({"question": f"{n}?", "response": f"{n}", "answer": n} for n in range(1, 5)))
    rewards = {"1": 1.0, "2": 0.5, "3": None, "4": 1.0}

    def grade(responses, ground_truths, questions):
        assert [*zip(responses, ground_truths, questions, strict=True)] == [(n, n, f"{n}?") for n in rewards]
        return [Graded({"reward": rewards[response]}, "parsed") for response in responses]

    monkeypatch.setattr(sft_program, "start_grading", lambda *_: nullcontext(grade))
    settings, said = SftConfig(model_path="m", data_path=str(path), correct_only=True), []
    assert sorted(one.response for one in choose_demonstrations(settings, said.append)) == ["1", "4"]
    assert said == ["--correct-only: 2 of 4 demonstrations are correct"]
    everything = replace(settings, correct_only=False)
    assert sorted(one.response for one in choose_demonstrations(everything, said.append)) == ["1", "2", "3", "4"]


def test_shipped_demonstrations_equal_script_output():
    lines = [json.loads(line) for line in (ROOT / "data/wordadd/train.jsonl").read_text().splitlines()]
    shipped = [json.loads(line) for line in (ROOT / "data/wordadd/sft.jsonl").read_text().splitlines()]
    assert shipped == make_wordadd_demonstrations(lines)


def test_sft_flags_are_fixed():
    assert sorted(field.name for field in fields(SftConfig)) == sorted(
        [*IMITATION_FLAGS, "epochs", "n_examples", "correct_only"]
    )
    config = SftConfig(model_path="m", epochs=2).as_grpo(129)
    assert (config.n_grpo_steps, config.rollout_batch_size, config.train_batch_size) == (6, 64, 64)


def test_sft_without_flags_runs_quickstart(capsys):
    bare = parse_settings(SftConfig, [])
    assert "quickstart" in capsys.readouterr().out
    assert {name: getattr(bare, name) for name in QUICKSTARTS[SftConfig]} == QUICKSTARTS[SftConfig]
    own = parse_settings(SftConfig, ["--model-path", "m"])
    assert (own.data_path, own.learning_rate, own.correct_only) == ("data/math/sft.jsonl", 2e-5, False)


def test_sft_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(SftConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "Number of demonstrations to train on" in text
    assert "Learning rate of AdamW" in text


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs 0: must be greater than 0"),
        ("--train-batch-size 0", "--train-batch-size 0: must be greater than 0"),
        ("--n-examples 0", "--n-examples 0: must be greater than 0"),
        ("--n-examples 2000 --no-correct-only", "--n-examples 2000: only 1304 demonstrations are available"),
        ("--learning-rate nan", "--learning-rate nan"),
        ("--data-path nowhere.jsonl", "--data-path nowhere.jsonl: no such file"),
        ("--n-examples 1000", "--n-examples 1000: only 913 demonstrations are available"),
        ("--data-path {empty}", "contains no demonstrations"),
        ("--data-path {no_response}", "no_response.jsonl:1: `response` must be"),
        ("--data-path {no_question}", "no_question.jsonl:1: `question` must be"),
        ("--data-path {no_answer}", "--correct-only: no_answer.jsonl:1 has no `answer`"),
        ("--data-path {wrong}", "--correct-only: no demonstration of wrong.jsonl is correct"),
        ("--group-size 4", "group-size"),
        ("--model-path ./nowhere {data}", "--model-path ./nowhere: no such folder"),
        (
            "--model-path {tiny} --n-examples 4 --sampling-max-tokens 500",
            "4 of 4 questions do not fit",
        ),
        ("--resume {grpo}", "--resume grpo: is a run of train.py"),
    ],
)
def test_sft_invalid_flags_exit_with_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = {
        "empty": "\n",
        "no_response": '{"question": "q"}\n',
        "no_question": '{"response": "r"}\n',
        "no_answer": '{"question": "q", "response": "r"}\n',
        "wrong": '{"question": "q", "response": "r", "answer": "1"}\n',
    }
    for name, text in lines.items():
        Path(f"{name}.jsonl").write_text(text)
    Path("grpo").mkdir()
    Path("grpo/metrics.jsonl").touch()
    Path("grpo/config.json").write_text('{"config": {"seed": 1}}')
    if "{tiny}" in arguments:
        save_tiny(tmp_path / "tiny")
        arguments += DATA
    files = {name: f"{name}.jsonl" for name in lines}
    with pytest.raises(SystemExit) as ended:
        main(arguments.format(**files, grpo="grpo", tiny="tiny", data=DATA).split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    output = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in output
    assert "Traceback" not in output
    assert not list(Path().glob("runs/*/metrics.jsonl"))


def test_sft_resume_uses_saved_settings_and_own_program(tmp_path):
    saved = parse_settings(SftConfig, ["--seed", "7", "--n-examples", "128", "--correct-only", "--sampling-stop", "."])
    written = {"program": "sft.py", "config": asdict(saved)}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "metrics.jsonl").touch()
    resume = ["--resume", str(tmp_path)]
    assert parse_settings(SftConfig, resume) == replace(saved, resume=str(tmp_path))
    assert parse_settings(SftConfig, [*resume, "--epochs", "3"]).epochs == 3
    with pytest.raises(UsageError, match=r"is a run of sft.py"):
        train_program.parse_train_config(resume)


@pytest.mark.slow
@pytest.mark.curves
def test_sft_program_runs_and_resumes(tmp_path, monkeypatch, capsys):
    """On the tiny model: the files it leaves, and its resume."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"{k} ", "response": f"{k} </answer>"} for k in range(10)]
    flags = (
        f"--model-path tiny --data-path {write_lines(tmp_path, *rows)} --val-data-path data/wordadd/validation.jsonl "
        "--prompt-path data/prompts/wordadd.prompt --engine hf --dtype float32 --train-batch-size 4 "
        "--sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 4 --checkpoint-steps 1 --save-dir out "
        "--wandb-project None"
    )
    call_program("sft", flags, capsys)
    call_program("sft", "--resume out --epochs 2", capsys)
    said = call_program("sft", "--resume out", capsys)
    assert "out/final_model/ is already complete (6/6 steps). Increase --epochs to continue." in said
    assert [row["step"] for row in read_rows(tmp_path / "out", "train")] == [1, 2, 3, 4, 5, 6]
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["program"], written["config"]["epochs"]) == ("sft.py", 2)
    assert (tmp_path / "out/curves.png").exists()


@pytest.mark.vllm
@pytest.mark.nightly
def test_sft_quickstart_learns(tmp_path):
    """The real model learns like the tiny one."""
    flags = "--n-examples 32 --train-batch-size 8 --n-val-examples 32 --eval-steps 100 --wandb-project None"
    flags += f" --learning-rate 5e-5 --save-dir {tmp_path}/run"
    run_program("sft", flags)
    before, *_, after = (row["accuracy"] for row in read_rows(tmp_path / "run", "eval"))
    assert before < 0.35
    assert after > before + 0.15
