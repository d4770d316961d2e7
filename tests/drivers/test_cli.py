"""The command line: fixed flags, fixed defaults, and one clear line for each mistake."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import pytest

import grpo_core
from drivers import train as train_program
from drivers.common.errors import UsageError
from drivers.settings import choices, parser
from drivers.settings.command_line import flag_given, parse_train_config
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.groups import EngineSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.settings.objective import ImportanceSettings, ObjectiveSettings
from drivers.settings.parser import read_help, sort_by_heading
from drivers.settings.recipes import QUICKSTART
from tests.drivers.helpers.letters import make_tiny_config
from tests.drivers.helpers.processes import call_program, run_program
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {
    "n_grpo_steps": 200,
    "learning_rate": 1e-5,
    "rollout_batch_size": 256,
    "group_size": 8,
    "train_batch_size": 256,
    "gradient_accumulation_steps": 128,
    "epochs_per_rollout_batch": 1,
    "loss_type": "reinforce_with_baseline",
    "cliprange": 0.2,
    "use_std_normalization": True,
    "advantage_eps": 1e-6,
    "max_grad_norm": 1.0,
    "eval_steps": 5,
    "n_val_examples": 1024,
    "checkpoint_steps": 10,
    "sampling_temperature": 1.0,
    "sampling_min_tokens": 4,
    "sampling_max_tokens": 1024,
    "gpu_memory_utilization": 0.85,
    "seed": 0,
}
FLAGS = [
    "recipe",
    "model_path",
    "data_path",
    "val_data_path",
    "prompt_path",
    "reward",
    "n_grpo_steps",
    "learning_rate",
    "warmup_steps",
    "lr_schedule",
    "weight_decay",
    "adam_betas",
    "adam_epsilon",
    "rollout_batch_size",
    "group_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "epochs_per_rollout_batch",
    "loss_type",
    "cliprange",
    "aggregation",
    "use_std_normalization",
    "advantage_eps",
    "max_grad_norm",
    "sampling_temperature",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "eval_steps",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "eval_max_tokens",
    "n_val_examples",
    "n_logged_completions",
    "checkpoint_steps",
    "save_dir",
    "wandb_project",
    "wandb_run_name",
    "engine",
    "policy_device",
    "rollout_device",
    "dtype",
    "gpu_memory_utilization",
    "self_check_tolerance",
    "seed",
    "advantage",
    "std_correction",
    "pass_k",
    "reward_weights",
    "length_penalty",
    "overlong_buffer",
    "max_refills",
    "cliprange_high",
    "dual_clip",
    "ratio_low",
    "ratio_high",
    "sapo_temperatures",
    "dro_penalty",
    "covariance_fraction",
    "covariance_bounds",
    "kl_cov_coef",
    "positive_nll_coef",
    "mask_truncated",
    "top_entropy_fraction",
    "off_policy_threshold",
    "second_moment_threshold",
    "rejected_tokens",
    "empty_responses",
    "old_policy",
    "importance",
    "importance_level",
    "importance_measure",
    "importance_low",
    "importance_high",
    "self_normalize",
    "kl_coef",
    "kl_estimator",
    "kl_in",
    "kl_reference",
    "kl_reference_steps",
    "kl_reference_share",
    "teacher",
    "teacher_coef",
    "teacher_only",
    "entropy_coef",
    "entropy_target",
    "sampling_top_p",
    "sampling_top_k",
    "sampling_min_p",
    "sampling_replay",
    "rollout",
    "rollout_deadline_s",
    "micro_batch_tokens",
    "attention",
    "gradient_checkpointing",
    "async_steps",
    "rollout_process",
    "engine_deadline_s",
    "rollout_url",
    "lora_rank",
    "lora_alpha",
    "lora_push",
    "reward_mix",
    "grader_workers",
    "grader_deadline_s",
    "sampling_stop",
    "keep_checkpoints",
    "on_anomaly",
    "deterministic",
    "chat_template",
    "system_prompt_path",
    "chat_template_args",
    "chat_date",
    "long_prompts",
    "curriculum_steps",
    "resume",
    "show",
]


def test_train_flags_and_defaults_are_fixed():
    assert sorted(field.name for field in fields(GrpoConfig)) == sorted(FLAGS)


def test_train_model_path_alone_uses_defaults():
    config = asdict(parse_train_config(["--model-path", "somewhere"]))
    assert {name: config[name] for name in SEEDS} == SEEDS
    assert config["recipe"] is None
    assert config["reward"] == "r1_zero"
    assert config["prompt_path"] == "data/prompts/r1_zero.prompt"
    assert parse_train_config(["--model-path", "somewhere"]).sampling.stop == ("</answer>",)
    assert parse_train_config(["--model-path", "somewhere"]).micro_train_batch_size == 2


def test_train_without_flags_runs_quickstart_and_prints_it(capsys):
    bare = parse_train_config([])
    assert "quickstart" in capsys.readouterr().out
    assert bare == parse_train_config(["--recipe", "quickstart"]) == parse_train_config(["--recipe=quickstart"])
    assert {name: getattr(bare, name) for name in QUICKSTART} == QUICKSTART
    assert bare.n_val_examples >= 256


def test_gradient_accumulation_steps_override_recipe_token_budget(capsys):
    assert parse_train_config([]).micro_batch_tokens == QUICKSTART["micro_batch_tokens"]
    given = parse_train_config(["--recipe", "quickstart", "--gradient_accumulation_steps", "16"])
    assert (given.micro_batch_tokens, given.micro_train_batch_size) == (None, 4)
    assert parse_train_config(["--model-path", "somewhere"]).micro_batch_tokens is None
    with pytest.raises(UsageError, match="cannot be combined with --micro-batch-tokens"):
        parse_train_config(["--gradient-accumulation-steps", "8", "--micro-batch-tokens", "100"])


def test_flags_override_recipe():
    config = parse_train_config(["--recipe", "quickstart", "--n_grpo_steps", "3", "--model-path", "mine"])
    assert (config.n_grpo_steps, config.model_path, config.learning_rate) == (3, "mine", QUICKSTART["learning_rate"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--model-path x --val-data-path a b=c --adam-betas 0.8 0.9 --max-grad-norm=0.3",
        "--recipe dapo --no-use-std-normalization --deterministic --kl_coef 0.1 --seed -3",
        "--recipe gspo --wandb-project None --sampling_stop a b --no_mask_truncated --seed 1 --seed 2",
    ],
)
def test_flags_parsed_alone_equal_those_parsed_among_all(arguments, monkeypatch):
    alone = parse_train_config(arguments.split())
    monkeypatch.setattr(parser, "_find_given", lambda every, _: every)
    assert alone == parse_train_config(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--recipe", "x"], "x"),
        (["--recipe=x"], "x"),
        (["--seed", "1"], None),
        (["--recipe"], ""),
        ([], None),
        (["--recipe", "x", "--recipe=y"], "y"),
        (["--recipe=x", "--recipe", "y"], "y"),
    ],
)
def test_flag_given_any_spelling_is_found(arguments, value):
    assert flag_given(arguments, "--recipe") == value


def test_train_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        train_program.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in FLAGS:
        assert "--" + name.replace("_", "-") in text
    assert "hides the end token" in " ".join(text.replace("│", " ").split())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rollout-batch-size 9", "--rollout-batch-size 9: must be a multiple of --group-size 8; pass 8 or 16"),
        (
            "--rollout-batch-size 64 --train-batch-size 48",
            "must be a multiple of --train-batch-size 48; pass 48 or 96",
        ),
        (
            "--train-batch-size 64 --gradient-accumulation-steps 5",
            "--gradient-accumulation-steps 5; pass 60 or 65",
        ),
        ("--group-size 1", "--group-size 1: one response has no standard deviation"),
        ("--group-size 1 --no-use-std-normalization", "--group-size 1: makes every advantage 0"),
        ("--loss-type ppo", "reinforce_with_baseline"),
        ("--micro-batch-tokens 0", "--micro-batch-tokens 0: must be greater than 0"),
        ("--learning-rate 0", "--learning-rate 0.0: must be greater than 0"),
        ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
        ("--cliprange -0.1", "--cliprange -0.1: must be at least 0"),
        ("--sampling-temperature 0", "--sampling-temperature 0.0: must be greater than 0"),
        ("--sampling-min-tokens 50", "--sampling-min-tokens 50: must not exceed --sampling-max-tokens 32"),
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization 1.5: must be greater than 0 and at most 1"),
        ("--recipe fastest", "quickstart"),
        (
            "--recipe gspo --aggregation token_mean",
            "would weight the responses of --loss-type gspo by",
        ),
        ("--recipe trl-default --old-policy sampler", "corrects for the sampler twice"),
        ("--recipe trl-default --sampling-top-p 0.9", "renormalizes the sampler's log-probs"),
        ("--kl-coef 0.1 --kl-estimator k1", "has an expected gradient of 0"),
        ("--dual-clip 3", "--dual-clip 3.0: has no effect with --loss-type reinforce_with_baseline"),
        ("--n-grpo-step ten", "n-grpo-step"),
        ("--data-path nowhere.jsonl", "--data-path nowhere.jsonl: no such file"),
        ("--val-data-path nowhere.jsonl", "--val-data-path nowhere.jsonl: no such file"),
        (
            "--val-data-path a=x a=y",
            "--val-data-path a=x a=y: a is given twice; give each file once, or a name of its",
        ),
        ("--val-data-path", "--val-data-path: is empty; pass at least one file"),
        ("--eval-samples 4 --eval-temperature 0", "--eval-samples 4: greedy responses are all the same"),
        (
            "--sampling-min-tokens 4 --eval-max-tokens 3",
            "--eval-max-tokens 3: must be at least --sampling-min-tokens 4",
        ),
        ("--prompt-path nowhere.prompt", "--prompt-path nowhere.prompt"),
        ("--data-path {bad_json}", "bad.jsonl:2: not valid JSON"),
        ("--data-path {empty}", "contains no questions"),
        ("--data-path {no_answer}", "no_answer.jsonl:1: `answer` must be"),
        ("--data-path {one_question}", "has 1 questions, but a step needs 8"),
        ("--prompt-path {no_place}", "must contain {question}"),
        ("--save-dir {a_file}/run", "cannot be written to"),
        ("--save-dir {old_run}", "already contains a run"),
        ("--policy-device cuda:7", "--policy-device cuda:7: this machine has"),
        ("--rollout-device tpu", "--rollout-device tpu"),
        ("--engine hf --rollout-process own", "--rollout-process own: --engine hf shares the policy's weights"),
        ("--engine-deadline-s 0", "--engine-deadline-s 0.0: must be greater than 0"),
        ("--model-path None", "--model-path: is missing"),
        ("--recipe None", "--model-path: is missing"),
        ("--recipe quickstart --model-path ./nowhere", "--model-path ./nowhere: no such folder"),
        (
            "--model-path {old_run} --recipe quickstart",
            "is the folder of a run; pass old_run/final_model or one of its",
        ),
        ("--model-path . --recipe quickstart", "has no config.json"),
        ("--model-path= --recipe quickstart", "--model-path: is empty"),
        ("--recipe quickstart --data-path old_run", "--data-path old_run: is a folder; pass a jsonl file"),
        (
            "--model-path {tiny} --recipe quickstart --sampling-max-tokens 500",
            "questions do not fit into the model's context of 512",
        ),
    ],
)
def test_train_invalid_flags_exit_with_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "bad_json": ("bad.jsonl", '{"question": "q", "answer": "1"}\n{"question": \n'),
        "empty": ("empty.jsonl", "\n\n"),
        "no_answer": ("no_answer.jsonl", '{"question": "q"}\n'),
        "one_question": ("one.jsonl", '{"question": "q", "answer": "1"}\n'),
        "no_place": ("no_place.prompt", "What?\n"),
        "a_file": ("a_file", ""),
    }
    for name, content in files.values():
        Path(name).write_text(content)
    Path("old_run").mkdir()
    Path("old_run/metrics.jsonl").touch()
    if "{tiny}" in arguments:
        save_tiny(tmp_path / "tiny")
    names = {key: name for key, (name, _) in files.items()} | {"old_run": "old_run", "tiny": "tiny"}
    with pytest.raises(SystemExit) as ended:
        train_program.main(arguments.format(**names).split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    shown = " ".join((captured.out + captured.err).replace("│", " ").split())
    assert message in shown
    assert "Traceback" not in shown
    assert not list(Path().glob("runs/*/metrics.jsonl"))


@pytest.mark.parametrize("kind", [GrpoConfig, EvaluateConfig, SftConfig])
def test_sampling_stop_of_an_empty_text_is_refused(kind):
    with pytest.raises(
        UsageError, match="--sampling-stop '': an empty text would end every response before its first"
    ):
        kind(model_path="m", sampling_stop=("</answer>", ""))
    assert kind(model_path="m", sampling_stop=()).sampling_stop == ()


def test_train_missing_data_names_the_command_that_makes_it(capsys):
    if (ROOT / "data/math/train.jsonl").exists():
        pytest.skip("MATH has been converted into this checkout")
    with pytest.raises(SystemExit):
        train_program.main(["--model-path", "somewhere"])
    assert "convert_dataset.py" in capsys.readouterr().err


@pytest.mark.medium
def test_train_without_vllm_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "drivers.engines.vllm", None)
    save_tiny(tmp_path / "tiny")
    with pytest.raises(SystemExit) as ended:
        train_program.main(["--recipe", "quickstart", "--model-path", "tiny", "--dtype", "float32"])
    assert ended.value.code == 2
    assert "pass --engine hf" in capsys.readouterr().err


@pytest.mark.slow
def test_train_from_any_folder_writes_run_and_resumes(tmp_path, monkeypatch, capsys):
    """A subprocess checks the script's own imports and paths, and all files that a run leaves."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype float32 --n-grpo-steps 2 --rollout-batch-size 8 "
        "--group-size 4 --train-batch-size 8 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        "--n-val-examples 4 --checkpoint-steps 1 --save-dir out --wandb-project None"
    )
    done = run_program("train", flags, cwd=tmp_path)
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "completions.jsonl", "curves.png", "final_model/model.safetensors"} <= left
    assert {"checkpoint-1/config.json", "checkpoint-2/trainer_state.json"} <= left
    assert any(name.startswith("tensorboard/") for name in left)
    resolved = json.loads((tmp_path / "out/config.json").read_text())
    assert resolved["config"]["rollout_batch_size"] == 8
    assert {"torch", "transformers", "grpo_core"} <= resolved["environment"]["versions"].keys()
    phases = [json.loads(line)["phase"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    phases = [phase for phase in phases if phase != "anomaly"]  # a tiny model that learns nothing gives a warning
    assert phases.count("save") == 2  # each line is written when its thread is done, during a later step
    in_order = ["check", "eval", "check", "train", "eval", "train"]
    assert [phase for phase in phases if phase != "save"] == in_order
    assert "reward" in done.stdout
    assert "self-check at step 0" in done.stdout
    assert json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["step"] == 2
    # A resume continues the run with its saved settings, not with this command line's defaults.
    more = "--resume out --n-grpo-steps 3 --checkpoint-steps 10"
    assert "Resuming after step 2 from out/checkpoint-2/" in call_program("train", more, capsys)
    assert "out/final_model/ is already complete (3/3 steps)" in call_program("train", more, capsys)
    steps = [
        row["step"]
        for row in map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
        if row["phase"] == "train"
    ]
    assert steps == [1, 2, 3]
    assert json.loads((tmp_path / "out/config.json").read_text())["config"]["rollout_batch_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "--resume nowhere: not a run folder or checkpoint"),
        (["--resume", "auto", "--model-path", "tiny"], "--resume auto: needs the folder of the run"),
        (["--rollout-url", "http://a:1", "--engine", "hf", "--model-path", "tiny"], "the servers are the engine"),
        (
            ["--rollout-url", "a:8000", "--model-path", "tiny"],
            "--rollout-url a:8000: must be a server's address",
        ),
        (["--rollout-url", "http://a:1", "--gpu-memory-utilization", "0.5", "--model-path", "t"], "has no effect"),
        (["--lora-alpha", "16", "--model-path", "tiny"], "--lora-alpha 16: has no effect without LoRA"),
        (["--resume", "run", "--save-dir", "new"], "--save-dir new: cannot be combined with --resume"),
    ],
)
def test_resume_invalid_folder_exits_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train_program.main([*arguments, "--data-path", "data/wordadd/train.jsonl", "--rollout-batch-size", "8",
                            "--val-data-path", "data/wordadd/validation.jsonl", "--train-batch-size", "8",
                            "--gradient-accumulation-steps", "1"])  # fmt: skip
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_resume_uses_saved_settings(tmp_path):
    """Flags override the saved settings; flags that could no longer take effect are rejected."""
    saved = parse_train_config(["--recipe", "dapo", "--seed", "7", "--micro-batch-tokens", "512"])
    (tmp_path / "config.json").write_text(json.dumps({"config": asdict(saved)}))
    (tmp_path / "metrics.jsonl").touch()
    resume = ["--resume", str(tmp_path)]
    assert parse_train_config(resume) == replace(saved, resume=str(tmp_path))
    assert parse_train_config([*resume, "--recipe", "dapo", "--n-grpo-steps", "3"]).n_grpo_steps == 3
    cut = parse_train_config([*resume, "--gradient-accumulation-steps", "4"])
    assert (cut.gradient_accumulation_steps, cut.micro_batch_tokens) == (4, None)
    with pytest.raises(UsageError, match="--recipe gspo: the resumed run has recipe dapo"):
        parse_train_config([*resume, "--recipe", "gspo"])
    older = asdict(saved) | {"val_data_path": "old.jsonl"}  # a single file
    (tmp_path / "config.json").write_text(json.dumps({"config": older}))
    assert parse_train_config(resume).val_data_path == ("old.jsonl",)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config.json cannot be read"):
        parse_train_config(resume)


def test_lora_low_learning_rate_warns():
    assert "low for LoRA" in " ".join(make_tiny_config(lora_rank=4, learning_rate=1e-5).warnings)
    assert not make_tiny_config(lora_rank=4, learning_rate=1e-4).warnings
    assert not make_tiny_config(learning_rate=1e-5).warnings


def test_evaluate_invalid_flags_exit_with_one_line(capsys):
    from drivers.evaluate import main

    for arguments, message in [
        (["--n-samples", "0"], "--n-samples 0: must be greater than 0"),
        (
            ["--compare-to", "m", "--long-prompts", "drop"],
            "--compare-to m: both models must get the same questions",
        ),
        (["--data-path", "nowhere.jsonl"], "--data-path nowhere.jsonl: no such file"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


# Imports, headings and groups of settings.

LIGHT_PROGRAM = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
assert "torch" not in sys.modules
"""


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.medium
@pytest.mark.parametrize("program", sorted(path.name for path in (ROOT / "drivers").glob("[a-z]*.py")))
def test_help_loads_no_torch(program):
    done = run_python(LIGHT_PROGRAM, f"drivers/{program}")
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_mistake_loads_no_torch():
    code = LIGHT_PROGRAM.replace('"--help"', '"--group-size", "1"').replace("code == 0", "code == 2")
    done = run_python(code, "drivers/train.py")
    assert done.returncode == 0, done.stderr
    assert "train.py: --group-size 1: one response has no standard deviation" in done.stderr


@pytest.mark.parametrize("folder", ["common", "settings", "tasks"])
def test_folder_loads_no_torch(folder):
    """`common.distributed` alone needs it, and those who import it."""
    names = [f"drivers.{folder}.{path.stem}" for path in (ROOT / "drivers" / folder).glob("[a-z]*.py")]
    names = [name for name in names if name != "drivers.common.distributed"]
    code = "import sys; [__import__(name) for name in sys.argv[1:]]; assert 'torch' not in sys.modules"
    done = run_python(code, *names)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Aggregation", "Counting", "KLEstimator", "ImportanceLevel", "Divergence"])
def test_choices_equal_those_of_the_functions(name):
    assert get_args(getattr(choices, name)) == get_args(getattr(grpo_core, name))


@pytest.mark.parametrize("kind", [GrpoConfig, SftConfig, ExpertIterationConfig, EvaluateConfig])
def test_every_flag_stands_under_one_heading_and_has_help(kind):
    names = [name for members in sort_by_heading(kind).values() for name in members]
    assert sorted(names) == sorted(field.name for field in fields(kind))
    assert set(names) <= read_help(kind).keys()


def test_train_help_shows_headings_and_most_used_flags_first(capsys):
    with pytest.raises(SystemExit):
        train_program.main(["--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^\W*(\w[\w ]*) options\W*$", text, flags=re.MULTILINE)
    assert headings == ["most used", "model", "data", "grading", "sampling", "objective", "importance correction",
                        "KL and entropy", "teacher", "optimizer", "evaluation", "engine", "run", "safety"]  # fmt: skip
    assert len(sort_by_heading(GrpoConfig)["most used"]) == 20


def test_group_checks_itself_alone():
    with pytest.raises(UsageError, match=r"--ratio-low 6.0: must not exceed --ratio-high 5.0"):
        ObjectiveSettings(loss_type="cispo", ratio_low=6.0)
    with pytest.raises(UsageError, match="--self-normalize: has no effect with --importance none"):
        ImportanceSettings(self_normalize=True)
    with pytest.raises(UsageError, match=r"--gpu-memory-utilization 1.5: must be greater than 0 and at most 1"):
        EngineSettings(gpu_memory_utilization=1.5)
