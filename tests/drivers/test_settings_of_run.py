"""evaluate.py asks the model of a run as in that run: settings, their paths, and what flags change."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from drivers.common.errors import UsageError
from drivers.runs.log import describe_environment
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.settings.of_run import TAKEN, find_run, parse_evaluate_config

OTHER = {
    "val_data_path": ("data/minus/validation.jsonl", "plus=data/plus/validation.jsonl"),
    "n_val_examples": 64,
    "eval_samples": 8,
    "prompt_path": "data/prompts/r1_zero.prompt",
    "chat_template": True,
    "system_prompt_path": "system.txt",
    "chat_template_args": ("enable_thinking=false",),
    "chat_date": "2026-02-03",
    "long_prompts": "drop",
    "reward": "mine.py:reward",
    "reward_mix": ("format=0.2", "answer=1"),
    "grader_deadline_s": 3.0,
    "sampling_temperature": 0.7,
    "sampling_top_p": 0.9,
    "sampling_top_k": 40,
    "sampling_min_p": 0.05,
    "sampling_min_tokens": 2,
    "sampling_max_tokens": 48,
    "sampling_stop": ("###",),
    "rollout": "mine.py:play",
    "rollout_deadline_s": 5.0,
}
"""A value of each setting that is the default of no program."""


def make_run(folder, kind=GrpoConfig, started_in=None, **settings):
    """Write what evaluate.py reads of a run, and return the folder of its model."""
    (folder / "final_model").mkdir(parents=True)
    (folder / "final_model/config.json").write_text("{}")
    (folder / "metrics.jsonl").touch()
    environment = {"folder": started_in or os.getcwd()}
    config = asdict(kind(model_path="m", **settings))
    (folder / "config.json").write_text(json.dumps({"config": config, "environment": environment}))
    return folder / "final_model"


def test_settings_of_run_are_taken_and_printed(tmp_path, capsys):
    assert set(TAKEN.values()) == set(OTHER)
    assert set(TAKEN) <= {field.name for field in fields(EvaluateConfig)}
    model = make_run(tmp_path / "run", **OTHER)
    config = parse_evaluate_config(["--model-path", str(model)])
    assert config.data_path == OTHER["val_data_path"]
    assert {name: getattr(config, name) for name in TAKEN if name != "data_path"} == {
        name: OTHER[of_run] for name, of_run in TAKEN.items() if name != "data_path"
    }
    assert config.model_path == str(model)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"From the settings of {tmp_path / 'run'}: --data-path data/minus/validation.jsonl "
        "plus=data/plus/validation.jsonl --n-examples 64 --n-samples 8 --prompt-path data/prompts/r1_zero.prompt "
        "--chat-template --system-prompt-path system.txt --chat-template-args enable_thinking=false "
        "--chat-date 2026-02-03 --long-prompts drop --reward mine.py:reward --reward-mix format=0.2 answer=1 "
        "--grader-deadline-s 3.0 --sampling-temperature 0.7 --sampling-top-p 0.9 --sampling-top-k 40 "
        "--sampling-min-p 0.05 --sampling-min-tokens 2 --sampling-max-tokens 48 --sampling-stop ### "
        "--rollout mine.py:play --rollout-deadline-s 5.0"
    )


@pytest.mark.parametrize("kind", [GrpoConfig, SftConfig, ExpertIterationConfig])
def test_settings_of_run_of_each_program_are_taken(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_run(Path("run"), kind, sampling_max_tokens=7)
    config = parse_evaluate_config([f"--model_path={model}"])
    assert (config.sampling_max_tokens, config.sampling_min_tokens, config.n_examples) == (7, 4, 1024)
    shown = capsys.readouterr().out
    assert shown.startswith("From the settings of run: --data-path ")
    assert "--reward r1_zero" in shown  # what is asked is shown, even if it is the default
    assert "--sampling-temperature" not in shown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sampling-max-tokens", "9"], {"sampling_max_tokens": 9, "sampling_temperature": 0.7, "n_examples": 64}),
        (["--data_path", "a.jsonl", "b.jsonl"], {"data_path": ("a.jsonl", "b.jsonl"), "n_examples": None}),
        (["--data-path=a.jsonl", "--n-examples=3"], {"data_path": ("a.jsonl",), "n_examples": 3}),
        (["--reward", "r1_zero"], {"reward": "r1_zero", "reward_mix": (), "sampling_stop": ("###",)}),
        (["--no-chat-template"], {"chat_template": False, "chat_template_args": (), "chat_date": None}),
        (["--chat-template"], {"chat_template": True, "system_prompt_path": "system.txt", "chat_date": "2026-02-03"}),
        (["--chat-date", "2026-05-05"], {"chat_date": "2026-05-05", "system_prompt_path": "system.txt"}),
        (["--sampling-stop"], {"sampling_stop": ()}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_of_run_flags_win(tmp_path, capsys, flags, expected):
    model = make_run(tmp_path / "run", **OTHER)
    config = parse_evaluate_config(["--model-path", str(model), *flags])
    assert {name: getattr(config, name) for name in expected} == expected
    shown = capsys.readouterr().out
    given = flags[0].partition("=")[0].replace("_", "-")
    assert f" {given} " not in shown
    assert "--prompt-path data/prompts/r1_zero.prompt" in shown


def test_settings_of_run_paths_are_those_of_its_start(tmp_path, monkeypatch, capsys):
    """A file that is no longer there is looked up from here: the run was moved, or the file is the repository's."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for name in ("held_out.jsonl", "my.prompt", "system.txt", "mine.py"):
        (there / name).touch()
    monkeypatch.chdir(here)
    paths = {
        "val_data_path": ("held_out.jsonl", "named=held_out.jsonl"),
        "prompt_path": "my.prompt",
        "chat_template": True,
        "system_prompt_path": "system.txt",
        "reward": "mine.py:reward",
    }

    def read_paths(model):
        config = parse_evaluate_config(["--model-path", str(model)])
        return *config.data_path, config.prompt_path, config.system_prompt_path, config.reward

    model = make_run(tmp_path / "run", started_in=str(there), **paths)
    names = ("held_out.jsonl", "my.prompt", "system.txt", "mine.py:reward")
    held_out, *others = (str(there / name) for name in names)
    expected = (held_out, f"named={held_out}", *others)
    assert read_paths(model) == expected
    # A file of this folder with the same name is another file.
    (here / "my.prompt").touch()
    assert read_paths(model) == expected
    # Moved, or started here: as written.
    as_written = ("held_out.jsonl", "named=held_out.jsonl", *names[1:])
    there.rename(tmp_path / "gone")
    assert read_paths(model) == as_written
    monkeypatch.chdir(tmp_path / "gone")
    assert read_paths(make_run(tmp_path / "another", **paths)) == as_written
    # A prompt of the repository, from a folder that does not have it.
    model = make_run(tmp_path / "third", started_in=str(here), prompt_path="data/prompts/wordadd.prompt")
    assert parse_evaluate_config(["--model-path", str(model)]).prompt_path == "data/prompts/wordadd.prompt"


def test_settings_of_run_for_evaluations_win(tmp_path):
    """The model is asked as the run has asked it in its evaluations."""
    own = {"eval_temperature": 0.0, "eval_top_p": 0.3, "eval_max_tokens": 90}
    config = parse_evaluate_config(
        ["--model-path", str(make_run(tmp_path / "run", **OTHER | {"eval_samples": 1} | own))]
    )
    assert (config.sampling_temperature, config.sampling_top_p, config.sampling_max_tokens) == (0.0, 0.3, 90)
    assert config.n_samples == 1
    some = make_run(tmp_path / "some", **OTHER | {"eval_top_p": 0.3})
    config = parse_evaluate_config(["--model-path", str(some), "--sampling-max-tokens", "9"])
    assert (config.sampling_temperature, config.sampling_top_p, config.sampling_max_tokens) == (0.7, 0.3, 9)


def test_describe_environment_has_folder_of_start(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert describe_environment()["folder"] == str(tmp_path)


def test_find_run_of_any_model_in_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    make_run(run)
    (run / "checkpoint-5").mkdir()
    (run / "best_checkpoint").symlink_to("checkpoint-5")
    (tmp_path / "link").symlink_to(run / "final_model")
    for model in ("run/final_model", "run/checkpoint-5", "run/best_checkpoint/", "link"):
        assert find_run(str(tmp_path / model)) == run, model
    monkeypatch.chdir(run / "final_model")
    assert find_run(".") == run
    monkeypatch.chdir(run)  # a name on the hub is part of no run, wherever it is typed
    assert find_run("final_model") == run
    assert find_run("SmolLM2-135M-Instruct") is None
    (run / "metrics.jsonl").unlink()
    assert find_run("final_model") is None


def test_settings_without_run_are_defaults(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert parse_evaluate_config([]) == EvaluateConfig()
    model = str(tmp_path / "model")
    assert parse_evaluate_config(["--model-path", model]) == EvaluateConfig(model_path=model)
    assert capsys.readouterr().out == ""


def test_settings_of_older_run_have_defaults(tmp_path):
    """Settings that the run does not have, and the folder of its start, may be missing."""
    model = make_run(tmp_path / "run")
    saved = {"prompt_path": "data/prompts/question_only.prompt", "val_data_path": "one.jsonl", "unknown": 1}
    (tmp_path / "run/config.json").write_text(json.dumps({"config": saved, "environment": {}}))
    config = parse_evaluate_config(["--model-path", str(model)])
    given = {"data_path": ("one.jsonl",), "prompt_path": saved["prompt_path"]}
    assert config == EvaluateConfig(model_path=str(model), **given)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"config": {"reward": 3}, "environment": {}}', "reward=3 is not of type"),
        ('{"config": {"sampling_top_p": 7}, "environment": {}}', "--sampling-top-p 7: must be"),
    ],
    ids=["torn", "list", "type", "range"],
)
def test_settings_of_run_unreadable_raise_usage_error(tmp_path, text, reason):
    model = make_run(tmp_path / "run")
    (tmp_path / "run/config.json").write_text(text)
    with pytest.raises(UsageError) as raised:
        parse_evaluate_config(["--model-path", str(model)])
    message = str(raised.value)
    assert "\n" not in message
    for part in (f"--model-path {model}: ", reason, "move the model out of the run's folder, and pass --data-path"):
        assert part in message


def test_settings_of_compared_run_that_differ_are_named(tmp_path, capsys):
    ours = make_run(tmp_path / "ours", sampling_max_tokens=48)
    same = make_run(tmp_path / "same", sampling_max_tokens=48)
    theirs = make_run(tmp_path / "theirs", sampling_max_tokens=32, prompt_path="data/prompts/question_only.prompt")
    arguments = ["--model-path", str(ours), "--compare-to"]
    parse_evaluate_config([*arguments, str(same)])
    assert capsys.readouterr().err == ""
    parse_evaluate_config([*arguments, str(theirs)])
    assert capsys.readouterr().err == (
        f"warning: --compare-to {theirs}: its run has --prompt-path data/prompts/question_only.prompt (here "
        "data/prompts/r1_zero.prompt), --sampling-max-tokens 32 (here 48); both models are asked and graded with the "
        "settings here\n"
    )
    parse_evaluate_config([*arguments, str(theirs), "--prompt-path", "p", "--sampling-max-tokens", "9"])
    assert capsys.readouterr().err == ""


def test_evaluate_help_has_no_run(tmp_path, capsys):
    model = make_run(tmp_path / "run", sampling_max_tokens=77)
    with pytest.raises(SystemExit) as ended:
        parse_evaluate_config(["--model-path", str(model), "--help"])
    assert ended.value.code == 0
    assert "77" not in capsys.readouterr().out
