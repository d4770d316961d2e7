"""Whatever a user's model, file, flag or answer can cause is one line, and costs nothing that was finished.

Each class of wrong input is in COVERED, with the test that shows it, or has rows in WRONG, which are tried here.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drivers.common.errors import suggest
from drivers.engines.hf import HFEngine
from tests.tiny import make_tiny_policy, make_tiny_tokenizer, save_tiny

TESTS = Path(__file__).parents[1]
COVERED = {
    "model: weights that are missing or of other shapes": "test_program_missing_weights_exit_with_one_line",
    "model: cannot be saved": "test_train_model_that_cannot_be_saved_exits_before_first_step",
    "model: a token without an embedding": "test_check_token_ids_beyond_embedding_names_the_token",
    "model: no chat template, or an invalid one": "test_programs_chat_template_without_template_exit_with_one_line",
    "model: heads without a kernel in vLLM": "test_vllm_head_size_without_a_kernel_is_refused_before_the_start",
    "model: vLLM cannot start": "test_vllm_start_failure_raises_usage_error",
    "model: too large for the disk": "test_check_disk_warns_or_refuses_before_run",
    "data: lines that are not questions": "test_load_examples_bad_line_is_named",
    "data: any bytes": "test_a_data_file_is_read_or_refused_in_one_line",
    "data: layouts": "test_layout_that_is_not_understood_is_refused",
    "data: files of other formats": "test_convert_damaged_file_exits_with_one_line",
    "flags: combinations": "test_settings_are_whole_or_refused_in_one_line",
    "run: damaged checkpoints": "test_a_checkpoint_that_was_touched_is_refused",
    "run: other data": "test_train_resume_other_data_exits_before_model_is_loaded",
    "run: a full disk": "test_checkpoint_failure_warns_once_while_it_lasts",
    "reward: cannot be loaded": "test_train_unusable_reward_exits_before_model_is_loaded",
    "reward: fails on every response": "test_run_reward_that_always_fails_ends_before_first_step",
    "reward: returns something else": "test_read_return_invalid_values_raise",
    "answers: hang, crash or hide the grader": "test_run_with_failing_custom_reward_continues",
    "report: no run": "test_report_invalid_folder_exits_with_one_line",
}
"""Classes of wrong input that other tests show, with those tests."""

TINY = (
    "--model-path tiny --engine hf --dtype float32 --prompt-path q.prompt --data-path q.jsonl --sampling-max-tokens 4 "
    "--sampling-min-tokens 0 "
)
TRAIN = TINY + (
    "--val-data-path q.jsonl --rollout-batch-size 8 --group-size 4 --train-batch-size 8 --wandb-project None "
    "--gradient-accumulation-steps 2 --n-grpo-steps 1 --save-dir new "
)
WRONG = {
    "flags: unknown": [
        ("train", "--learing-rate 1", "--learing-rate: no such flag; did you mean --learning-rate?"),
        ("train", "--lr 1", "--lr: no such flag; did you mean --learning-rate?"),
        ("train", "--zebra 1", "--zebra: no such flag; --help lists the flags"),
        ("sft", "--recipe grpo", "--recipe: no such flag; --help lists the flags"),
        ("sft", "--epoch=2", "--epoch: no such flag; did you mean --epochs?"),
        ("expert_iteration", "--n-ei-step 1", "did you mean --n-ei-steps?"),
        ("evaluate", "--reward-mx a=1", "did you mean --reward-mix?"),
        ("sweep", "--grid learning_rat=1,2", "--grid, 1: --learning-rat: no such flag; did you mean --learning-rate?"),
        ("report", "--runs run", "--runs: no such flag; --help lists the flags"),
        ("convert_dataset", "q.jsonl --question-ky a", "did you mean --question-key?"),
        ("make_task", "countdown --n-trian 1", "did you mean --n-train?"),
        ("pass_rates", "q.jsonl --outptu a", "did you mean --output?"),
    ],
    "flags: words that belong to none": [
        ("train", "grpo", "grpo: not a flag; --help lists the flags"),
        ("train", "--learning-rate 1e-5 2e-5", "2e-5: not a flag, and --learning-rate takes no further value"),
        (
            "train",
            "--use-std-normalization False",
            "--use-std-normalization False: takes no value; pass --use-std-normalization to turn it on, or "
            "--no-use-std-normalization to turn it off",
        ),
        ("train", "--use_std_normalization=False", "--use-std-normalization False: takes no value"),
        ("train", "--no-chat-template True", "--no-chat-template True: takes no value; pass --chat-template to turn"),
        ("convert_dataset", "q.jsonl --skip-bad-lines True", "--skip-bad-lines True: takes no value"),
        ("make_task", "countdwn", "countdwn: not a flag; did you mean countdown?"),
        ("make_task", "", "must begin with one of countdown, gym"),
    ],
    "flags: values": [
        ("train", "--recipe grop", "lite-ppo, gdpo, opo, gpg, maxrl"),  # in the order of the table
        ("train", "--recipe grop", "verl-default; did you mean grpo?"),
        ("train", "--loss-type GRPO", "file.py:function; did you mean grpo_clip or grpo_no_clip?"),
        ("train", "--loss-type dr_grpo", "file.py:function; it is a recipe: pass --recipe dr-grpo"),
        ("train", "--dtype fp16", "--dtype fp16: must be one of auto, float32, bfloat16, float16"),
        ("train", "--group-size 8.5", "--group-size 8.5: must be a whole number, like 8"),
        ("train", "--micro_batch_tokens=many", "--micro-batch-tokens many: must be a whole number, like 8"),
        ("train", "--learning-rate abc", "--learning-rate abc: must be a number, like 0.1"),
        ("train", "--learning-rate", "--learning-rate: needs a value"),
        ("train", "--reward-weights 1", "--reward-weights: needs 2 values"),
        ("train", "--reward r1zero", "function; did you mean r1_zero?"),
        ("train", f"--seed {10**20}", "must be at least -1e+18 and at most 1e+18"),
        ("sweep", "--seeds a", "--seeds a: must be a whole number, like 8"),
        ("sweep", "learning-rate", "sft-sizes, expert-iterations; did you mean learning-rates?"),
        ("sweep", "--seeds", "--seeds: pass at least one seed"),
        ("make_task", "countdown --n-train 0", "--n-train 0: must be greater than 0"),
        (
            "pass_rates",
            "q.jsonl --output o --min-pass-rate 2",
            "--min-pass-rate 2.0 --max-pass-rate 1.0: both must be",
        ),
        ("pass_rates", "q.jsonl", "--output: is missing; pass a completions.jsonl"),
        ("convert_dataset", "q.jsonl --demonstrations r1zero", "one of r1_zero, question_only; did you mean r1_zero?"),
    ],
    "model: files that are damaged or missing": [
        ("train", TRAIN + "--model-path short", "--model-path short: the model cannot be loaded (SafetensorError: "),
        ("evaluate", TINY + "--model-path short", "--model-path short: the model cannot be loaded"),
        ("evaluate", TINY + "--compare-to bare", "--compare-to bare: the tokenizer cannot be loaded"),
        ("train", TRAIN + "--model-path list", "--model-path list: the tokenizer cannot be loaded (TypeError: "),
        ("train", TRAIN + "--model-path text", "Field 'hidden_size' expected int, got str (value: 'x'))"),
        ("train", TRAIN + "--model-path keys", "--model-path keys: the tokenizer cannot be loaded (KeyError: "),
        ("train", TRAIN + "--model-path bare", "--model-path bare: the tokenizer cannot be loaded"),
    ],
    "model: folders that are none": [
        ("train", TRAIN + "--model-path run", "--model-path run: is the folder of a run; pass run/final_model or one"),
        ("evaluate", TINY + "--model-path run", "--model-path run: is the folder of a run; pass run/final_model"),
        ("train", TRAIN + "--model-path nowhere", "--model-path nowhere: is not a folder, and from the Hub the token"),
        ("train", TRAIN + "--model-path=", "--model-path: is empty; pass a folder or a Hub name"),
        ("evaluate", TINY + "--compare-to ./nowhere", "--compare-to ./nowhere: no such folder"),
    ],
    "model: that cannot sample": [
        ("train", TRAIN + "--model-path nan", "--engine hf: cannot sample from nan (RuntimeError: probability tensor"),
        ("evaluate", TINY + "--model-path nan --output-dir new", "--engine hf: cannot sample from nan (RuntimeError"),
    ],
    "model: a teacher that cannot score the policy's tokens": [
        ("train", TRAIN + "--teacher short", "--teacher short: the model cannot be loaded (SafetensorError: "),
        ("train", TRAIN + "--teacher run", "--teacher run: is the folder of a run; pass run/final_model or one"),
        (
            "train",
            TRAIN + "--teacher http://127.0.0.1:1",
            "--teacher http://127.0.0.1:1: no response during the check",
        ),
        ("train", TRAIN + "--teacher wide", "--teacher wide: its tokenizer is not the policy's ('<0>' has id 98 in"),
        (
            "train",
            TRAIN + "--model-path room --teacher tiny",
            "--teacher tiny: has 98 embeddings, fewer than the policy's 100; pass",
        ),
        ("train", TRAIN + "--teacher near", "do not fit into the model's context of 6 tokens"),
    ],
    "model: attention that it or the machine lacks": [
        (
            "train",
            TRAIN + "--attention flash_attention_2",
            "--attention flash_attention_2: --model-path tiny: the model cannot be loaded",
        ),
    ],
    "data: folders, characters, prompts": [
        ("train", TRAIN + "--data-path run", "--data-path run: is a folder; pass a jsonl file"),
        ("sft", TINY + "--val-data-path q.jsonl --data-path run", "--data-path run: is a folder; pass a jsonl file"),
        ("train", TRAIN + "--data-path accent.jsonl", "--model-path: its tokenizer cannot encode a text of the data"),
        ("train", TRAIN + "--prompt-path bytes", "--prompt-path bytes: cannot be read"),
        (
            "train",
            TRAIN + "--rollout-batch-size 128",
            "a step needs 32 different ones (--rollout-batch-size 128 / --group-size 4); lower --rollout-batch-size",
        ),
    ],
    "run: folders": [
        ("train", TRAIN + "--save-dir q.jsonl", "--save-dir q.jsonl: is a file; pass a folder"),
        ("train", TRAIN + "--save-dir run", "--save-dir run: already contains a run"),
        (
            "train",
            TRAIN.replace("--save-dir new", "--resume nowhere"),
            "--resume nowhere: not a run folder or checkpoint",
        ),
        ("train", TRAIN.replace("--save-dir new", "--resume torn"), "torn/config.json cannot be read"),
    ],
    "evaluation: an earlier one": [
        ("evaluate", TINY + "--compare-to torn", "--compare-to torn: results.json cannot be read"),
        ("pass_rates", "types.jsonl --output o", "types.jsonl:1: `question` must be a string and the reward a number"),
    ],
    "sweep: lists and folders": [
        ("sweep", "program.jsonl", "program.jsonl:1: `label` (a name without a slash), `program` (train, sft, expert"),
        ("sweep", "flags.jsonl", "flags.jsonl, a: 2: not a flag, and --learning-rate takes no further value"),
        ("sweep", "--grid learning_rate=1e-5 --save-dir torn", "--save-dir torn: cannot be used"),
    ],
}
"""For each class: program, arguments, and a part of the line."""


def copy_model(name, file, text=None):
    """Copy the tiny model and rewrite one of its files, or remove it."""
    shutil.copytree("tiny", name)
    if text is None:
        Path(name, file).unlink()
    else:
        Path(name, file).write_text(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with inputs of every kind, among them a finished run."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tiny(Path("tiny"))
        config = Path("tiny/config.json").read_text()
        copy_model("list", "config.json", "[]")
        copy_model("text", "config.json", config.replace('"hidden_size": 64', '"hidden_size": "x"'))
        copy_model("keys", "tokenizer.json", "{}")
        copy_model("bare", "tokenizer.json")
        Path("bare/tokenizer_config.json").unlink()
        shutil.copytree("tiny", "short")
        Path("short/model.safetensors").write_bytes(Path("tiny/model.safetensors").read_bytes()[:-4000])
        copy_model(
            "near", "config.json", config.replace('"max_position_embeddings": 512', '"max_position_embeddings": 6')
        )
        for name, n_tokens in (("room", 98), ("wide", 100)):
            make_tiny_policy(vocab_size=100).save_pretrained(name)
            make_tiny_tokenizer(n_tokens).save_pretrained(name)
        shutil.copytree("tiny", "nan")
        weights = {name: torch.full_like(w, torch.nan) for name, w in load_file("tiny/model.safetensors").items()}
        save_file(weights, "nan/model.safetensors", {"format": "pt"})
        Path("run/final_model").mkdir(parents=True)
        for name in ("metrics.jsonl", "completions.jsonl"):
            Path("run", name).write_text("{}\n")
        Path("torn").mkdir()
        for name in ("config.json", "metrics.jsonl", "results.json", "sweep.json"):
            Path("torn", name).write_text("{")
        texts = {
            "q.prompt": "{question}",
            "q.jsonl": "".join(f'{{"question": "{n}+1", "answer": {n + 1}}}\n' for n in range(16)),
            "accent.jsonl": '{"question": "\\u00e9", "answer": "1"}\n{"question": "\\u00e8", "answer": "1"}\n',
            "types.jsonl": '{"question": {}, "answer": 1, "reward": "x"}\n',
            "program.jsonl": '{"label": "a", "program": ["train"]}\n',
            "flags.jsonl": '{"label": "a", "flags": {"learning_rate": [1, 2]}}\n',
        }
        for name, text in texts.items():
            Path(name).write_text(text)
        Path("bytes").write_bytes(b"\xff{question}")
    return folder


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [pytest.param(*row, id=f"{name} {number}") for name, rows in WRONG.items() for number, row in enumerate(rows)],
)
def test_wrong_input_is_one_line_and_costs_nothing(inputs, program, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    before = read_files(inputs)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"drivers.{program}").main(arguments.split())
    assert ended.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{program}.py: ")
    assert message in lines[0]
    assert read_files(inputs) == before  # also: no folder that would block the next try


@pytest.mark.medium
def test_failed_start_leaves_no_files_but_those_of_the_user(inputs, monkeypatch, capsys):
    """An error before the first evaluation; a later one keeps the run."""
    monkeypatch.chdir(inputs)
    train = importlib.import_module("drivers.train").main
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    words = TRAIN.replace("--save-dir new", "--save-dir mine").split()
    generate = HFEngine.generate

    def fail_after(n_calls):
        calls = []

        def generate_or_fail(self, *arguments, **named):
            calls.append(1)
            if len(calls) > n_calls:
                raise IndexError("no such kernel")
            return generate(self, *arguments, **named)

        monkeypatch.setattr(HFEngine, "generate", generate_or_fail)

    fail_after(0)
    with pytest.raises(SystemExit):
        train(words)
    assert "--engine hf: cannot sample from tiny (IndexError: no such kernel)" in capsys.readouterr().err
    assert [path.name for path in Path("mine").iterdir()] == ["notes.txt"]
    fail_after(2)  # after the self-check and the evaluation
    with pytest.raises(IndexError):
        train(words)
    assert {"notes.txt", "metrics.jsonl", "config.json"} <= {path.name for path in Path("mine").iterdir()}
    shutil.rmtree("mine")


@pytest.mark.medium
def test_evaluate_second_model_that_fails_keeps_results_of_the_first(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    evaluate = importlib.import_module("drivers.evaluate").main
    with pytest.raises(SystemExit):
        evaluate([*TINY.split(), "--compare-to", "short", "--output-dir", str(tmp_path / "new")])
    assert "--compare-to short: the model cannot be loaded" in capsys.readouterr().err
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert (results["results"]["q"]["n_examples"], results["comparison"]) == (16, {})


def test_suggest_prefers_names_that_begin_so():
    names = ["--model-path", "--group-size", "--rollout-batch-size"]
    assert suggest("--GROUP", names) == "; did you mean --group-size?"
    assert suggest("--batch-size", names) == "; did you mean --rollout-batch-size?"
    assert suggest("--zebra", names) == suggest("--", names) == ""


def test_covered_classes_have_their_tests():
    text = "".join(path.read_text() for path in TESTS.glob("*/test_*.py"))
    assert [name for name, test in COVERED.items() if f"def {test}(" not in text] == []
