"""The display of the programs on a terminal of any width, and on a pipe."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from drivers.common.cli import fit_help
from drivers.common.display import Display, Screen
from drivers.common.wrapping import print_line, wrap
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.settings.parser import parse

ROOT = Path(__file__).resolve().parents[2]
STEP = {
    "reward": 0.125,
    "format_reward": 0.5,
    "response_tokens": 25.5,
    "rollout_entropy": 1.08,
    "grad_norm": 1.04,
    "zero_std_groups": 0.62,
    "rollout_tokens_per_s": 856.0,
}
PARTS = ["step  1/15", "reward 0.125", "format 0.500", "25.5 tokens", "entropy 1.08", "grad 1.04", "zero-signal 62%"]


def make_display(width, n_steps=15):
    """Return a display on a terminal of this width, and what it prints."""
    display, shown = Display(n_steps), io.StringIO()
    display.console = Screen(file=shown, force_terminal=True, width=width, color_system=None)
    return display, shown


@pytest.mark.parametrize("width", [*range(40, 130, 7), 200])
def test_step_line_breaks_between_values(width):
    display, shown = make_display(width)
    display.end_step(1, STEP)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("step  1/15  reward")
    for part in [*PARTS, "856 tok/s"]:
        assert any(part in line for line in lines), part
    assert all(line.startswith("    ") for line in lines[1:])
    whole = len(lines[0]) + sum(len(line.strip()) + 2 for line in lines[1:])
    assert (len(lines) == 1) == (whole <= width)


def test_step_line_without_terminal_is_one_line(capsys):
    Display(15).end_step(1, STEP)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("  ".join([*PARTS, "856 tok/s"]))


def test_evaluation_line_names_set_and_rates(capsys):
    values = {
        "accuracy": 0.5,
        "accuracy_stderr": 0.02,
        "format_reward": 1.0,
        "response_tokens": 9.0,
        "n_examples": 8.0,
    }
    rates = {f"{kind}_at_{k}": k / 100 for kind in ("pass", "maj") for k in (2, 10)} | {"pass_at_10_low": 0.05}
    Display(15).show_evaluation(5, values, [])
    Display(15).show_evaluation(5, values | rates, [], "gsm8k")
    assert capsys.readouterr().out.splitlines() == [
        "eval at step 5: accuracy 0.500 (+-0.020), format 1.000, 9.0 tokens, 8 questions",
        "eval at step 5 on gsm8k: accuracy 0.500 (+-0.020), pass@10 0.100, maj@10 0.100, format 1.000, 9.0 tokens, "
        "8 questions",
    ]


def test_evaluation_follows_the_line_of_its_step(capsys):
    values = {"response_tokens": 9.0, "n_examples": 8.0}
    with Display(15) as display:
        display.show_evaluation(0, values, [])
        display.begin_step()
        display.show_evaluation(1, values, [])
        display.end_step(1, STEP)
        display.begin_step()
        display.show_evaluation(2, values, [])  # the run ends within the step
    starts = [line.split(":")[0].split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["eval at step 0", "step", "eval at step 1", "eval at step 2"]


@pytest.mark.parametrize("program", ["python drivers/train.py --resume", "wandb sync"])
@pytest.mark.parametrize("width", [30, 80])
def test_wrap_keeps_words_commands_and_indents(width, program):
    path = "/a/rather/long/path/" + "x" * 40
    command = f"{program} {path} --n-grpo-steps 20"
    text = f"  Stopped after step 3, which was saved as a checkpoint. To resume: {command}"
    lines = wrap([text], width).splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert lines[0].startswith("  Stopped")
    assert all(line.startswith("      ") for line in lines[1:])
    assert sum(command in line for line in lines) == 1
    assert all(len(line) <= width for line in lines if command not in line)


def test_wrap_keeps_what_follows_a_command():
    text = "a.csv is no jsonl; convert it: python drivers/convert_dataset.py a.csv (for unknown keys: --question-key)"
    lines = wrap([text], 60).splitlines()
    assert " ".join(" ".join(lines).split()) == text
    assert any(line.strip().startswith("python drivers/convert_dataset.py a.csv") for line in lines)
    assert all(len(line) <= 60 for line in lines)


def test_print_line_is_wrapped_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: SimpleNamespace(columns=40))
    text = "train.py: --train-batch-size 48: must be a multiple of --rollout-batch-size 32; pass 32 or 64"
    for is_terminal in (False, True):
        file = io.StringIO()
        file.isatty = lambda is_terminal=is_terminal: is_terminal
        print_line(text, file)
        lines = file.getvalue().splitlines()
        assert (len(lines) > 1) == is_terminal
        assert " ".join(" ".join(lines).split()) == text
        assert not is_terminal or max(map(len, lines)) <= 40


def test_panel_shows_phase_steps_and_labeled_times(monkeypatch):
    now = 100.0
    monkeypatch.setattr("drivers.common.display.time.monotonic", lambda: now)
    display, shown = make_display(80)
    now += 5
    with display.stage("Starting vLLM"):
        now += 61
        display.console.print(display._panel())
    display.end_step(3, STEP)
    with display.phase("rollout", {}):
        now += 2
        display.console.print(display._panel())
    lines = shown.getvalue().splitlines()
    assert lines[0] == "Starting vLLM ..."
    starting, stepping = lines[1:5], lines[-4:]
    assert all(len(line) == 80 for line in starting + stepping)
    assert re.search(r"│ Starting vLLM  1:01  +0/15 steps │", starting[1])
    assert "│ elapsed 1:06 " in starting[2]
    assert re.search(r"│ rollout  0:02 ━+╸? +3/15 steps │", stepping[1])
    assert "reward 0.125   tokens/s 856   time left 13:12   elapsed 1:08" in stepping[2]


def test_panel_without_steps_has_no_bar():
    display, shown = make_display(40, n_steps=0)
    display.console.print(display._panel())
    assert "━" not in shown.getvalue()
    assert "│ working  0:00 " in shown.getvalue()


def test_stage_without_terminal_is_one_line(capsys):
    with Display() as display, display.stage("Loading [b]some[/b] model"):
        pass
    assert capsys.readouterr().out == "Loading [b]some[/b] model ...\n"


@pytest.mark.medium
@pytest.mark.parametrize("width", [60, 80, 132])
@pytest.mark.parametrize("kind", [GrpoConfig, SftConfig, ExpertIterationConfig, EvaluateConfig])
def test_help_fits_terminal(kind, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.argv", ["drivers/program.py"])
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], kind(model_path="m"))
    lines = capsys.readouterr().out.splitlines()
    assert width - 2 < max(map(len, lines)) <= width


@pytest.mark.parametrize("program", ["report", "sweep", "convert_dataset", "make_task", "pass_rates"])
def test_help_of_tools_fits_terminal(program, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", [f"drivers/{program}.py"])
    main = __import__(f"drivers.{program}", fromlist=["main"]).main
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 58 < max(map(len, lines)) <= 60
    assert lines[0].startswith("usage: ")


def test_help_into_closed_pipe_is_silent():
    """With `--help | head`, the reader leaves first."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from drivers.pass_rates import main; main(['--help'])"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_fit_help_wraps_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    colored = "\x1b[1musage\x1b[0m: aaa bbb ccc ddd eee fff"
    with fit_help():
        print("Read the questions of a file, and grade.\n\n  GSM8K, SVAMP: question, body; answer\n" + colored)
    assert capsys.readouterr().out.splitlines() == [
        "Read the questions of a file,",
        "and grade.",
        "",
        "  GSM8K, SVAMP: question,",
        "      body; answer",
        colored,
    ]
