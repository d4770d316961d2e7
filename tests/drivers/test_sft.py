"""Fine-tuning on demonstrations: the loss is what it says, on the demonstrations that were asked for, and resumes."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from drivers import train as train_program
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.engines.hf import HFReplica
from drivers.policy.weights import PolicyWeights
from drivers.runs.folder import find_checkpoint
from drivers.settings.command_line import parse_settings
from drivers.settings.imitation import QUICKSTARTS, SftConfig
from drivers.sft import batch_of_step, choose, fine_tune, main
from drivers.tasks.demonstrations import WorkedExample, load_demonstrations, make_demonstrations
from drivers.tasks.questions import Prompt
from drivers.tasks.wordadd import WRONG_SHARE
from drivers.tasks.wordadd import make_demonstrations as make_wordadd_demonstrations
from drivers.training import update as update_step
from drivers.training.launch import save_on_abort
from drivers.training.run import Run
from grpo_core import tokenize_prompt_and_output
from tests.drivers.parts import letter_grader, tiny_parts
from tests.drivers.test_resume import Stop, assert_same, numbers
from tests.drivers.test_train import weights
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

ROOT = Path(__file__).resolve().parents[2]
SHARED = [
    "model_path",
    "data_path",
    "val_data_path",
    "prompt_path",
    "reward",
    "learning_rate",
    "train_batch_size",
    "micro_batch_tokens",
    "aggregation",
    "max_grad_norm",
    "sampling_temperature",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "sampling_stop",
    "eval_steps",
    "n_val_examples",
    "n_logged_completions",
    "checkpoint_steps",
    "keep_checkpoints",
    "save_dir",
    "wandb_project",
    "wandb_run_name",
    "engine",
    "policy_device",
    "rollout_device",
    "rollout_process",
    "rollout_url",
    "engine_deadline_s",
    "dtype",
    "attention",
    "gradient_checkpointing",
    "gpu_memory_utilization",
    "self_check_tolerance",
    "lora_rank",
    "lora_alpha",
    "reward_mix",
    "grader_workers",
    "grader_deadline_s",
    "on_anomaly",
    "deterministic",
    "chat_template",
    "system_prompt_path",
    "seed",
    "resume",
]
DATA = " --data-path data/wordadd/sft.jsonl --val-data-path data/wordadd/validation.jsonl"
TINY = {
    "model_path": "tiny",
    "learning_rate": 1e-2,
    "train_batch_size": 4,
    "micro_batch_tokens": 40,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 6,
    "eval_steps": 100,
    "checkpoint_steps": 100,
    "wandb_project": None,
    "engine": "hf",
    "dtype": "float32",
}


def shown(*responses, stop=("</answer>",)):
    """One demonstration of each response, to prompts of different lengths."""
    examples = [
        WorkedExample(f"say it {'!' * (1 + k % 3)} ", "a", f"shown:{k}", response, has_prompt=True)
        for k, response in enumerate(responses)
    ]
    return make_demonstrations(
        examples, Prompt("{question}"), stop, make_tiny_tokenizer(), max_new_tokens=6, context=None
    )


LETTERS = [letter * n for letter, n in zip("abcde" * 2, (6, 2, 4, 1, 7, 3, 5, 2, 6, 4), strict=True)]


def go(folder, demonstrations, checkpoint=None, stop_at=None, **changes):
    """`stop_at`: how many times the engine answers before it ends the run."""
    settings = SftConfig(**(TINY | changes))
    config, parts = settings.of(len(demonstrations)), tiny_parts()
    engine = HFReplica(tiny_parts().policy, parts.tokenizer, PolicyWeights(parts.policy, torch.float32))
    answer, answered = engine.generate, []

    def generate(*arguments, **named):
        answered.append(1)
        if stop_at is not None and len(answered) > stop_at:
            raise Stop
        return answer(*arguments, **named)

    engine.generate = generate
    folder.mkdir(exist_ok=True)
    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True), checkpoint, settings)
    try:
        fine_tune(config, parts.policy, engine, letter_grader, demonstrations, parts.questions, run)
    except Stop:
        save_on_abort(run, parts.policy)
    finally:
        run.finish()
    moments = {name: tensor.clone() for name, tensor in run.state.tensors().items()}
    return weights(parts.policy), moments, len(answered)


def rows_of(folder, phase):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def likelihood_by_hand(demonstrations, aggregation):
    """-log softmax in float64, one sequence at a time and token by token; and its gradients."""
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


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_step_descends_the_mean_of_minus_log_pi(tmp_path, monkeypatch, aggregation):
    """Whatever the temperature of evaluations, however the batch is cut: of the model as it is."""
    demonstrations, seen = shown(*LETTERS), {}
    compute = update_step.accumulate_gradients

    def recorded(policy, train_batch, config, entropy_coef, metrics):
        loss = compute(policy, train_batch, config, entropy_coef, metrics)
        seen["loss"] = loss.item()
        seen["gradients"] = {name: p.grad.clone() for name, p in policy.named_parameters()}
        return loss

    monkeypatch.setattr(update_step, "accumulate_gradients", recorded)
    go(tmp_path, demonstrations, train_batch_size=10, aggregation=aggregation, sampling_temperature=0.5)
    loss, gradients = likelihood_by_hand(demonstrations, aggregation)
    assert seen["loss"] == pytest.approx(loss, rel=1e-5)
    for name, expected in gradients.items():
        assert_close(seen["gradients"][name].double(), expected, rtol=1e-4, atol=1e-6)
    (step,) = rows_of(tmp_path, "train")
    tokens = sum(len(one.response_token_ids) for one in demonstrations)
    assert step["trained_tokens"] == tokens
    assert step["nll"] == pytest.approx(likelihood_by_hand(demonstrations, "token_mean")[0], rel=1e-5)


def test_it_learns_what_it_is_shown(tmp_path):
    go(tmp_path, shown(*["aaaaaa"] * 12), epochs=6, eval_steps=6)
    accuracies = [row["accuracy"] for row in rows_of(tmp_path, "eval")]
    assert accuracies[0] < 0.15
    assert accuracies[-1] > 0.9
    steps = rows_of(tmp_path, "train")
    assert steps[-1]["nll"] < 0.3 < steps[0]["nll"]
    assert [row["step"] for row in rows_of(tmp_path, "eval")] == [0, 6, 12, 18]
    assert "sampler_log_prob_diff" not in {row["kind"] for row in rows_of(tmp_path, "anomaly")}  # nobody sampled


@pytest.mark.slow
def test_stopped_anywhere_and_gone_on_with_it_is_the_same_to_the_last_bit(tmp_path):
    settings = {"epochs": 2, "train_batch_size": 6, "eval_steps": 1, "checkpoint_steps": 1}
    *whole, answers = go(tmp_path / "whole", shown(*LETTERS), **settings)
    folder = tmp_path / "stopped"
    go(folder, shown(*LETTERS), stop_at=answers - 1, **settings)  # in the second pass
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    assert_same(go(folder, shown(*LETTERS), checkpoint, **settings), whole)
    assert numbers(folder) == numbers(tmp_path / "whole")


@pytest.mark.parametrize(("n", "size"), [(10, 4), (8, 4), (3, 5)])
def test_each_pass_takes_each_demonstration_once_in_an_order_of_its_own(n, size):
    steps = -(-n // size)
    passes = [
        [i for step in range(1, steps + 1) for i in batch_of_step(n, size, 7, epoch * steps + step)]
        for epoch in range(20)
    ]
    assert all(sorted(order) == list(range(n)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert batch_of_step(n, size, 7, 1) != batch_of_step(n, size, 8, 1) or n < 5


def test_a_response_ends_as_a_sampled_one_does():
    """With the stop string, or else with the end token; its tokens are those of the library's own function."""
    tokenizer = make_tiny_tokenizer()
    (stopped,) = shown("5 </answer>")
    (plain,) = shown("5 <answer>")
    (without,) = shown("5 </answer>", stop=())
    assert tokenizer.decode(stopped.response_token_ids) == "5 </answer>"
    assert plain.response_token_ids[-1] == tokenizer.eos_token_id
    assert without.response_token_ids == (*stopped.response_token_ids, tokenizer.eos_token_id)
    expected = tokenize_prompt_and_output(["say it ! "], ["5 </answer>"], tokenizer)
    assert (*stopped.prompt_token_ids, *stopped.response_token_ids)[1:] == tuple(expected["labels"][0].tolist())


def test_a_question_gets_the_form_of_the_prompt_and_a_prompt_is_the_whole(tmp_path):
    path = write(
        tmp_path, {"question": "1?", "response": "x", "answer": 1}, {"prompt": "{question} 1", "response": "y"}
    )
    asked, whole = load_demonstrations("--data-path", path)
    assert (asked.answer, whole.answer, whole.source) == ("1", "", f"{path}:2")
    made = make_demonstrations(
        [asked, whole], Prompt("Q: {question}"), (), make_tiny_tokenizer(), max_new_tokens=1, context=99
    )
    assert [make_tiny_tokenizer().decode(one.prompt_token_ids) for one in made] == ["Q: 1?", "{question} 1"]
    with pytest.raises(UsageError, match=r"sft.jsonl:2: its prompt is 12 tokens and its response 2; .* context of 13"):
        make_demonstrations(
            [asked, whole], Prompt("Q: {question}"), (), make_tiny_tokenizer(), max_new_tokens=1, context=13
        )


def write(folder, *rows):
    path = folder / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_the_assignment_is_read_as_it_is(tmp_path):
    """Prompt, response and ground_truth; an answer of our own layout goes first."""
    row = {"prompt": "User: 1?\nAssistant: <think>", "response": " </think> <answer> 2 </answer>"}
    path = write(
        tmp_path, row | {"ground_truth": "2"}, row | {"ground_truth": 0}, row | {"answer": 3, "ground_truth": 2}
    )
    examples = load_demonstrations("--data-path", path)
    assert [example.answer for example in examples] == ["2", "0", "3"]
    assert all(example.has_prompt and example.question == row["prompt"] for example in examples)
    assert len(choose(SftConfig(model_path="tiny", data_path=path, correct_only=True), lambda _: None)) == 1


def test_smaller_subsets_are_parts_of_larger_ones(tmp_path):
    rows = [{"question": f"{k}?", "response": "x"} for k in range(20)]
    settings = SftConfig(model_path="tiny", data_path=write(tmp_path, *rows))
    chosen = {n: choose(replace(settings, n_examples=n)) for n in (5, 10, 20)}
    assert chosen[5] == chosen[10][:5]
    assert chosen[10] == chosen[20][:10]
    assert chosen[20] == choose(settings) != load_demonstrations("-", settings.data_path)
    assert choose(replace(settings, seed=1, n_examples=5)) != chosen[5]
    with pytest.raises(UsageError, match="--n-examples 21: there are 20 to choose from"):
        choose(replace(settings, n_examples=21))


@pytest.mark.slow
def test_only_what_is_graded_right_is_kept_where_that_is_asked(capsys):
    settings = SftConfig(data_path="data/wordadd/sft.jsonl", correct_only=True)
    said = []
    right = choose(settings, said.append)
    assert said == [f"--correct-only: {len(right)} of 1304 demonstrations are graded right"]
    assert len(right) == 1304 - round(WRONG_SHARE * 1304)
    for one in right:
        a, b = map(int, re.findall(r"\d+", one.question))
        assert one.response == f" {a} + {b} = {a + b} </think> <answer> {a + b} </answer>"
    assert choose(replace(settings, n_examples=128)) == right[:128]


def test_shipped_demonstrations_are_what_the_script_makes():
    lines = [json.loads(line) for line in (ROOT / "data/wordadd/train.jsonl").read_text().splitlines()]
    shipped = [json.loads(line) for line in (ROOT / "data/wordadd/sft.jsonl").read_text().splitlines()]
    assert shipped == make_wordadd_demonstrations(lines)


def test_the_flags_are_these_and_no_others():
    assert [field.name for field in fields(SftConfig)] == [*SHARED, "epochs", "n_examples", "correct_only"]
    config = SftConfig(model_path="m", epochs=2).of(129)
    assert (config.n_grpo_steps, config.rollout_batch_size, config.train_batch_size) == (6, 64, 64)


def test_the_bare_command_is_the_quickstart_and_says_so(capsys):
    bare = parse_settings(SftConfig, [])
    assert "quickstart" in capsys.readouterr().out
    assert {name: getattr(bare, name) for name in QUICKSTARTS[SftConfig]} == QUICKSTARTS[SftConfig]
    own = parse_settings(SftConfig, ["--model-path", "m"])
    assert (own.data_path, own.learning_rate, own.correct_only) == ("data/math/sft.jsonl", 2e-5, False)


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(SftConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "Train on so many demonstrations" in text
    assert "Of AdamW, constant" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "epochs=0 must be greater than 0"),
        ("--train-batch-size 0", "train_batch_size=0 must be greater than 0"),
        ("--n-examples 0", "n_examples=0 must be greater than 0"),
        ("--n-examples 2000 --no-correct-only", "--n-examples 2000: there are 1304 to choose from"),
        ("--learning-rate nan", "learning_rate=nan"),
        ("--data-path nowhere.jsonl", "--data-path nowhere.jsonl: no such file"),
        ("--n-examples 1000", "--n-examples 1000: there are 913 to choose from"),
        ("--data-path {empty}", "holds no demonstration"),
        ("--data-path {no_response}", "no_response.jsonl:1: `response` must be"),
        ("--data-path {no_question}", "no_question.jsonl:1: `question` must be"),
        ("--data-path {no_answer}", "--correct-only: no_answer.jsonl:1 has no `answer`"),
        ("--data-path {wrong}", "--correct-only: no demonstration of wrong.jsonl is graded right"),
        ("--group-size 4", "group-size"),
        ("--model-path ./nowhere {data}", "--model-path ./nowhere: no such folder"),
        ("--model-path {tiny} --n-examples 4 --sampling-max-tokens 500", "more than the model's context of 512"),
        ("--resume {grpo}", "--resume grpo: a run of train.py, and sft.py cannot go on with it"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, tmp_path, capsys, monkeypatch):
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
    told = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in told
    assert "Traceback" not in told
    assert not list(Path().glob("runs/*/metrics.jsonl"))


def test_a_run_is_gone_on_with_by_its_own_settings_and_its_own_program(tmp_path):
    saved = parse_settings(SftConfig, ["--seed", "7", "--n-examples", "128", "--correct-only", "--sampling-stop", "."])
    written = {"program": "sft.py", "config": asdict(saved)}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "metrics.jsonl").touch()
    resume = ["--resume", str(tmp_path)]
    assert parse_settings(SftConfig, resume) == replace(saved, resume=str(tmp_path))
    assert parse_settings(SftConfig, [*resume, "--epochs", "3"]).epochs == 3
    with pytest.raises(UsageError, match=r"a run of sft.py, and train.py cannot go on with it"):
        train_program.parse_train_config(resume)


@pytest.mark.slow
def test_the_program_runs_and_goes_on(tmp_path):
    """A subprocess, on the tiny model: what it leaves behind, and the same run gone on with."""
    save_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"{k} ", "response": f"{k} </answer>"} for k in range(10)]
    flags = (
        f"--model-path tiny --data-path {write(tmp_path, *rows)} --val-data-path data/wordadd/validation.jsonl "
        "--prompt-path data/prompts/wordadd.prompt --engine hf --dtype float32 --train-batch-size 4 "
        "--sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 4 --checkpoint-steps 1 --save-dir out "
        "--wandb-project None"
    )
    for arguments in (flags.split(), ["--resume", "out", "--epochs", "2"], ["--resume", "out"]):
        command = [sys.executable, ROOT / "drivers/sft.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Nothing is left to do: out/final_model/ has all 6 steps; more: --epochs." in done.stdout
    assert [row["step"] for row in rows_of(tmp_path / "out", "train")] == [1, 2, 3, 4, 5, 6]
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["program"], written["config"]["epochs"]) == ("sft.py", 2)
    assert (tmp_path / "out/curves.png").exists()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.xdist_group("vllm")
def test_the_quickstart_learns(tmp_path):
    flags = "--n-examples 32 --train-batch-size 8 --n-val-examples 64 --eval-steps 100 --wandb-project None"
    flags += f" --learning-rate 5e-5 --save-dir {tmp_path}/run"
    command = [sys.executable, ROOT / "drivers/sft.py", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, *_, after = (row["accuracy"] for row in rows_of(tmp_path / "run", "eval"))
    assert before < 0.35
    assert after > before + 0.15
