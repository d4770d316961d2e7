"""Logged numbers are those that docs/metrics.md defines, and a failure of logging never ends a run."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drivers.common.display import clock, one_line
from drivers.common.errors import UsageError
from drivers.engines.protocol import describe_completions
from drivers.evaluation.policy import evaluate_policy
from drivers.grading.verdicts import make_inline_grader
from drivers.reports.curves import draw_curves
from drivers.runs.folder import abandon_run_folder, create_run_folder
from drivers.runs.log import JsonlWriter, RunLog, describe_environment
from drivers.settings.sampling import Sampling
from drivers.training.batch import PreparedBatch
from drivers.training.metrics import UpdateMetrics
from grpo_core import r1_zero_reward_fn
from tests.drivers.helpers.engines import ScriptedEngine
from tests.drivers.helpers.letters import make_batch, make_completion, make_letter_questions, make_tiny_config
from tests.drivers.helpers.processes import limit_file_size
from tests.drivers.helpers.runs import (
    make_held_out_questions,
    make_letter_demonstrations,
    run_expert_iteration,
    run_overlapped,
    run_sft,
    run_training,
)
from tests.tiny import make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GRADE = make_inline_grader(r1_zero_reward_fn)


def test_update_metrics_weigh_micro_batches_by_tokens():
    metrics = UpdateMetrics()
    for lengths, level in [((1, 2), 1.0), ((5,), 3.0)]:
        rollouts = make_batch(*[([1], [4] * n) for n in lengths])
        scored = {
            "log_probs": torch.where(rollouts.response_mask, -level, 0.0),
            "token_entropy": torch.where(rollouts.response_mask, level, torch.nan),
        }
        metadata = {"response_tokens": torch.tensor(float(sum(lengths))), "clip_fraction": torch.tensor(level / 4)}
        metrics.add_micro_batch(rollouts, scored, metadata)
    metrics.add_update(torch.tensor(2.0), torch.tensor(1.0), {"kept_tokens": 1.0})
    metrics.add_update(torch.tensor(4.0), torch.tensor(5.0), {"kept_tokens": 0.5})
    metrics.skipped_responses += 3
    summary = metrics.summary()
    assert summary["entropy"] == pytest.approx((3 * 1.0 + 5 * 3.0) / 8)
    assert summary["clip_fraction"] == pytest.approx((3 * 0.25 + 5 * 0.75) / 8)
    # `make_completion` gives every token the sampler log-prob -1.
    assert summary["sampler_log_prob_diff"] == pytest.approx((3 * 0.0 + 5 * 2.0) / 8)
    assert (summary["loss"], summary["grad_norm"], summary["kept_tokens"]) == (3.0, 3.0, 0.75)
    assert (summary["micro_batches"], summary["skipped_responses"]) == (2, 3)


def test_update_metrics_shares_of_the_gradient_are_of_positive_and_of_long_responses():
    """An advantage of 0 is not positive, and a response of median length is not long."""
    metrics = UpdateMetrics()
    for advantages, lengths, slopes in (((1.0, 0.0, -2.0), (3, 2, 2), (1.0, 2.0, 4.0)), ((0.5,), (1,), (8.0,))):
        rollouts = make_batch(*[([1], [4] * n) for n in lengths])
        log_probs = torch.zeros(rollouts.response_mask.shape, requires_grad=True)
        signs = torch.tensor([1.0, -1.0, 1.0])[: log_probs.shape[1]]  # a gradient's sign does not matter
        (log_probs * torch.tensor(slopes)[:, None] * signs * rollouts.response_mask).sum().backward()
        micro = PreparedBatch.from_rollouts(rollouts, torch.tensor(advantages)[:, None])
        scored = {"log_probs": log_probs, "token_entropy": torch.zeros(log_probs.shape)}
        metrics.add_micro_batch(micro, scored, {"response_tokens": rollouts.response_mask.sum().float()})
    metrics.add_update(torch.tensor(0.0), torch.tensor(0.0), {})
    summary = metrics.summary()
    total = 3 * 1.0 + 2 * 2.0 + 2 * 4.0 + 8.0
    assert summary["gradient_share_positive"] == pytest.approx((3 * 1.0 + 8.0) / total)
    assert summary["gradient_share_long"] == pytest.approx(3 * 1.0 / total)


def test_describe_completions_averages_over_tokens():
    described = describe_completions(
        [
            make_completion([1], [2, 3, 4], [-1.0, -2.0, -3.0]),
            make_completion([1], [5], [-6.0], finish_reason="length"),
        ]
    )
    assert described == {
        "response_tokens": 2.0,
        "response_tokens_max": 3.0,
        "truncated": 0.5,
        "rollout_entropy": 3.0,
    }


def test_evaluate_policy_grades_each_response_with_its_question():
    questions = make_letter_questions(make_tiny_tokenizer(), n=2)
    right, wrong, plain = "so </think> <answer> a </answer>", "so </think> <answer> b </answer>", "a"
    values, rows = evaluate_policy(ScriptedEngine(right, wrong, plain, right), questions, Sampling(n=2), GRADE, seed=0)
    assert [row["reward"] for row in rows] == [1, 0, 0, 1]
    assert [row["format_reward"] for row in rows] == [1, 1, 0, 1]
    assert values["accuracy"] == 0.5
    assert values["format_reward"] == 0.75
    assert values["accuracy_stderr"] == 0.0  # half of the answers to each question were right
    assert values["n_examples"] == 2
    engine = ScriptedEngine(right, right, wrong, plain)
    values, _ = evaluate_policy(engine, questions, Sampling(n=2), GRADE, seed=0)
    assert values["accuracy_stderr"] == pytest.approx(0.5)


def test_evaluate_policy_passes_question_and_answer_of_each_response():
    questions, seen = make_held_out_questions(make_tiny_tokenizer(), n=2), []
    questions[1] = replace(questions[1], example=replace(questions[1].example, answer="c"))

    def reward(response, ground_truth, question):
        seen.append((response, ground_truth, question))
        return float(response == ground_truth)

    engine = ScriptedEngine("b", "c", "b", "c")
    values, rows = evaluate_policy(engine, questions, Sampling(n=2), make_inline_grader(reward), seed=0)
    assert seen == [("b", "b", "spell 1"), ("c", "b", "spell 1"), ("b", "c", "spell 2"), ("c", "c", "spell 2")]
    assert [(row["question"], row["answer"], row["reward"]) for row in rows] == [
        ("spell 1", "b", 1.0),
        ("spell 1", "b", 0.0),
        ("spell 2", "c", 0.0),
        ("spell 2", "c", 1.0),
    ]
    assert values["accuracy"] == 0.5


@pytest.mark.slow
def test_logged_metrics_are_documented(tmp_path, monkeypatch):
    """docs/metrics.md has a row for each key of metrics.jsonl and completions.jsonl."""
    monkeypatch.setattr("drivers.training.run.pop_peak_memory", lambda: {"peak_memory_gib": 1.0})  # as on a GPU
    documented = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE))
    plain = {"n_grpo_steps": 3, "loss_type": "grpo_clip", "epochs_per_rollout_batch": 2, "checkpoint_steps": 1}
    settings = [
        {"eval_steps": 1, "dual_clip": 3.0},
        {"advantage": "remax", "loss_type": "kl_cov", "importance": "truncate", "kl_coef": 0.1, "entropy_coef": 0.01},
        {
            "max_refills": 2,
            "length_penalty": "soft_overlong",
            "top_entropy_fraction": 0.5,
            "off_policy_threshold": 0.1,
        },
        {"teacher": "tiny-teacher", "epochs_per_rollout_batch": 1, "dtype": "float16"},
        {"rollout": "tests.drivers.helpers.conversations:interrupt", "n_grpo_steps": 1},
    ]
    logged = set()
    for number, some in enumerate(settings):
        run_training(tmp_path / str(number), **(plain | some))
    _, _, overlapped = run_overlapped(tmp_path / "overlapped", n_grpo_steps=2)
    logged |= {name for row in overlapped for name in row}

    def with_parts(response, ground_truth):
        return {"reward": None if "b" in response else 1.0, "length": len(response), "vowels": 0.5}

    _, steps, evaluations = run_training(tmp_path / "parts", reward_fn=with_parts, n_grpo_steps=1)
    for row in (*steps, *evaluations):
        assert row["part_vowels"] == 0.5
        assert not {"format_reward", "answer_reward"} & row.keys()  # without any setting
        logged |= {re.sub("^part_(length|vowels)$", "part_NAME", name) for name in row}
    run_sft(tmp_path / "sft", make_letter_demonstrations("a", "b"), checkpoint_steps=1)
    run_expert_iteration(tmp_path / "ei", n_ei_steps=1)
    run_training(tmp_path / "ungraded", reward_fn=lambda text, _: 1 / (ord(text[:1] or "a") % 2), n_grpo_steps=1)
    second = {"second": make_held_out_questions(make_tiny_tokenizer())}
    run_training(tmp_path / "sets", other_val_sets=second, val_data_path=("first", "second"), n_grpo_steps=1)
    for folder in (*map(str, range(len(settings))), "sft", "ei", "ungraded", "sets"):
        for name in ("metrics.jsonl", "completions.jsonl"):
            for line in (tmp_path / folder / name).read_text().splitlines():
                logged |= {name.removeprefix("second/") for name in json.loads(line)}
    logged = {re.sub(r"^pass_at_\d+$", "pass_at_k", name) for name in logged}
    assert logged - {"phase", "step"} == documented


def test_create_run_folder_used_folder_raises_usage_error(tmp_path):
    folder = create_run_folder("--save-dir", str(tmp_path / "run"), "x", marker="metrics.jsonl")
    with pytest.raises(UsageError, match="already contains a run"):
        create_run_folder("--save-dir", str(tmp_path / "run"), "x", marker="metrics.jsonl")
    abandon_run_folder(folder, "metrics.jsonl")
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").touch()
    (folder / "completions.jsonl").write_text("{}")  # an evaluation, or a run in the same folder
    with pytest.raises(UsageError, match=r"already contains a run .completions\.jsonl"):
        create_run_folder("--save-dir", str(folder), "x", marker="metrics.jsonl")
    (folder / "completions.jsonl").unlink()
    (folder / "metrics.jsonl").write_text("{}")  # sft.py logs no completions
    with pytest.raises(UsageError, match=r"--output-dir .* already contains a run .metrics\.jsonl"):
        create_run_folder("--output-dir", str(folder), "x", marker="results.json")
    (folder / "metrics.jsonl").unlink()
    create_run_folder("--save-dir", str(folder), "x", marker="metrics.jsonl")
    abandon_run_folder(folder, "metrics.jsonl")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_run_log_failing_service_warns(tmp_path, monkeypatch, capsys):
    import drivers.runs.log

    monkeypatch.setattr(drivers.runs.log, "_open_wandb", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    log = RunLog(tmp_path, make_tiny_config(wandb_project="p"))
    log.log("train", 1, {"reward": 1.0})
    monkeypatch.setattr(log._tensorboard, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    log.log("train", 2, {"reward": 1.0})
    log.close()
    errors = capsys.readouterr().err
    assert "wandb failed (OSError: no network)" in errors
    assert "TensorBoard failed (OSError: disk full)" in errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_run_log_service_that_fails_later_warns(tmp_path, monkeypatch, capsys, failing):
    import drivers.runs.log

    def fail(*_):
        raise OSError("no network")

    service = SimpleNamespace(**{"log": lambda _: None, "finish": lambda: None, failing: fail})
    monkeypatch.setattr(drivers.runs.log, "_open_wandb", lambda *_: service)
    log = RunLog(tmp_path, make_tiny_config(wandb_project="p"))
    log.log("train", 1, {"reward": 1.0})
    log.close()
    assert capsys.readouterr().err.count("wandb failed (OSError: no network)") == 1


def test_resumed_tensorboard_keeps_the_steps_up_to_the_checkpoint(tmp_path):
    """TensorBoard shows a step once, although the resumed run repeats it."""
    for after, steps in ((-1, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, make_tiny_config(), after=after)
        for step in steps:
            log.log("train", step, {"reward": step + after})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(1, 0), (2, 1), (3, 5), (4, 6)]


def test_run_log_failing_service_warns_once(tmp_path, monkeypatch, capsys):
    log = RunLog(tmp_path, make_tiny_config())
    monkeypatch.setattr(log._tensorboard, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for step in range(5):
        log.log("train", step, {"reward": 1.0})
    log.close()
    assert capsys.readouterr().err.count("TensorBoard failed") == 1


def test_jsonl_writer_full_disk_keeps_lines_whole(tmp_path, capsys):
    """The kernel refuses within a line, as a full disk does; when there is space again, all lines are written."""
    log, file = RunLog(tmp_path, make_tiny_config()), tmp_path / "metrics.jsonl"
    log._tensorboard.close()  # its thread would fail for the same reason at any time
    log._tensorboard = None
    rows = [{"reward": step / 3, "text": "x" * 50} for step in range(8)]
    log.log("train", 0, rows[0])
    size = file.stat().st_size
    with limit_file_size(3 * size + size // 2):
        for step in range(1, 6):
            log.log("train", step, rows[step])
            lines = file.read_bytes().split(b"\n")
            assert lines.pop() == b""
            assert [json.loads(line)["step"] for line in lines] == list(range(min(step + 1, 3)))
    warned = capsys.readouterr().err
    assert (
        warned.count("could not be written (No space left on device); they wait in memory, and the run continues") == 1
    )
    log.log("train", 6, rows[6])
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(7))
    with limit_file_size(file.stat().st_size):
        log.log("train", 7, rows[7])
        log.close()
    assert "1 lines" in capsys.readouterr().err


def test_jsonl_writer_interrupt_writes_no_line_twice(tmp_path, monkeypatch):
    """The interrupt comes between the kernel's write and the writer's bookkeeping."""
    lines, write = JsonlWriter(tmp_path / "a.jsonl"), os.write

    def interrupted(descriptor, content):
        written = write(descriptor, content)
        os.kill(os.getpid(), signal.SIGINT)
        return written

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lines.add({"step": 1})
    monkeypatch.undo()
    lines.add({"step": 2})
    lines.close()
    assert (tmp_path / "a.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_run_log_flush_with_waiting_lines_fails(tmp_path):
    lines, file = JsonlWriter(tmp_path / "a.jsonl"), tmp_path / "a.jsonl"
    lines.add({"step": 1})
    with limit_file_size(12):
        assert lines.add({"step": 2})
        with pytest.raises(OSError, match=r"1 lines of .*a\.jsonl could not be written"):
            lines.sync()
    assert file.read_text() == '{"step": 1}\n'
    lines.sync()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_display_full_output_continues(tmp_path, monkeypatch):
    log = RunLog(tmp_path, make_tiny_config())
    raw = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)
    with io.TextIOWrapper(raw, write_through=True) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        RunLog._attempt("TensorBoard", lambda: 1 / 0)
        log._tensorboard.close()
        log._tensorboard = None
        with limit_file_size(0):
            log.log("train", 1, {"reward": 1.0})
            log.close()
        (tmp_path / "metrics.jsonl").write_text("no line\n")
        RunLog(tmp_path, make_tiny_config(), after=1).close()


def test_display_closed_pipe_continues():
    """With `train.py | head` the library rich would end the program."""
    program = (
        "import sys, time; from drivers.common.display import Display; show = Display(3)\n"
        "for _ in range(2000): show.say('x' * 200)\n"
        "print('still here', file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "still here\n")


def test_run_log_nan_is_null(tmp_path):
    lines = JsonlWriter(tmp_path / "a.jsonl")
    lines.add({"a": float("nan"), "b": -float("inf"), "c": 1.5, "d": "nan"})
    lines.close()
    text = (tmp_path / "a.jsonl").read_text()
    assert text == '{"a": null, "b": null, "c": 1.5, "d": "nan"}\n'


def test_draw_curves_failure_warns(tmp_path, monkeypatch, capsys):
    import drivers.training.run

    monkeypatch.setattr(drivers.training.run, "draw_curves", lambda _: (_ for _ in ()).throw(RuntimeError("no font")))
    run_training(tmp_path, n_grpo_steps=1)
    assert "warning: curves.png could not be drawn (RuntimeError: no font)" in capsys.readouterr().out


def test_describe_environment_without_git_works(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["commit"] is None


@pytest.mark.medium
def test_wandb_without_login_is_offline(tmp_path, monkeypatch):
    import wandb

    seen = {}

    class FakeRun:
        def define_metric(self, name, step_metric=None):
            seen.setdefault("metrics", {})[name] = step_metric

        def log(self, values):
            seen["logged"] = values

        def finish(self):
            seen["finished"] = True

    monkeypatch.setattr(wandb, "init", lambda **settings: seen.update(settings) or FakeRun())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    log = RunLog(tmp_path, make_tiny_config(wandb_project="p", wandb_run_name="n"))
    log.log("eval", 5, {"accuracy": 0.5})
    log.close()
    assert (seen["mode"], seen["project"], seen["name"]) == ("offline", "p", "n")
    assert seen["metrics"]["train/*"] == "train_step"
    assert seen["metrics"]["eval/*"] == "eval_step"
    assert seen["logged"] == {"eval/accuracy": 0.5, "eval_step": 5}
    assert seen["finished"]
    (tmp_path / "broken").write_text("machine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "broken"))
    (tmp_path / ".netrc").write_text("nonsense api.wandb.ai\n")
    (tmp_path / ".netrc").chmod(0o600)
    RunLog(tmp_path, make_tiny_config(wandb_project="p")).close()
    assert seen.pop("mode") == "offline"  # an unreadable file is neither a login nor a failure
    monkeypatch.setenv("WANDB_API_KEY", "k")
    RunLog(tmp_path, make_tiny_config(wandb_project="p")).close()
    assert seen["mode"] == "online"


def test_wandb_resumed_run_keeps_its_id(tmp_path, monkeypatch, capsys):
    import wandb

    opened = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **settings: opened.append(settings) or run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for after in (-1, 2, -1):  # a new run, a resumed one, and one that starts over in the folder
        RunLog(tmp_path, make_tiny_config(wandb_project="p"), after=after).close()
    first, resumed, anew = (settings["id"] for settings in opened)
    assert first == resumed != anew
    assert {settings["resume"] for settings in opened} == {"allow"}
    assert f"wandb sync {tmp_path}/wandb/offline-*" in capsys.readouterr().out
    (tmp_path / "config.json").unlink()
    RunLog(tmp_path, make_tiny_config(wandb_project="p"), after=2).close()


@pytest.mark.medium
@pytest.mark.curves
def test_draw_curves_any_log_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert draw_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
    run_training(tmp_path / "run", n_grpo_steps=2)
    assert (tmp_path / "run/curves.png").stat().st_size > 20_000


def test_display_formats_times_and_lines():
    assert [clock(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert one_line(" a\n  b ") == "a b"
    assert len(one_line("x" * 999)) == 240
