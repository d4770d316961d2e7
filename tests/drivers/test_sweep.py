"""sweep.py: its plans, its errors before any run, and real runs of the tiny model."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from drivers.common.errors import UsageError
from drivers.sweep import main
from drivers.sweeps.plan import PlannedRun, SweepConfig, as_flags, keep_plan, parse_program_flags, plan
from drivers.sweeps.presets import SWEEPS, Variant
from drivers.sweeps.results import make_table, read_result, write_results
from tests.drivers.helpers.processes import program_command
from tests.drivers.helpers.reports import make_step_rows, write_run
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
OWN = ["--model-path", "Qwen/Qwen2.5-Math-1.5B"]


def make_plan(name=None, *shared, **settings):
    return plan(SweepConfig(sweep=name, **settings), shared)


def read_settings(one):
    flags = one.command[2 : one.command.index("--save-dir")]
    return parse_program_flags(one.variant.program, flags)


@pytest.mark.medium
@pytest.mark.parametrize("shared", [[], OWN], ids=["embedded", "own"])
@pytest.mark.parametrize("name", SWEEPS)
def test_preset_sweeps_vary_only_what_they_say(name, shared):
    """Runs differ only in the swept settings, and their programs accept all flags."""
    runs = make_plan(name, *shared, seeds=(0,))
    assert len(runs) > 1
    assert len({one.folder for one in runs}) == len(runs)
    found = [read_settings(one) for one in runs]
    assert len(set(map(repr, found))) == len(runs)
    swept = {flag for one in runs for flag in one.variant.flags} | {"recipe"}
    if "recipe" not in runs[0].variant.flags:
        for one, settings in zip(runs, found, strict=True):
            first = next(f for r, f in zip(runs, found, strict=True) if r.variant.program == one.variant.program)
            differing = {key for key, value in vars(settings).items() if value != vars(first)[key]}
            assert differing <= swept
            assert {key: getattr(settings, key) for key in one.variant.flags} == one.variant.flags
    for settings in found:
        assert settings.model_path == ("SmolLM2-135M-Instruct" if not shared else OWN[1])


@pytest.mark.medium
def test_plan_values_follow_shared_flags():
    rates = [read_settings(one).learning_rate for one in make_plan("learning-rates", "--learning-rate", "2e-5")]
    assert rates == pytest.approx([2e-6, 6e-6, 2e-5, 6e-5, 2e-4])
    fewer = ["--rollout-batch-size", "32", "--train-batch-size", "32"]
    batches = [read_settings(one) for one in make_plan("off-policy", *fewer)]
    assert sorted({one.train_batch_size for one in batches}) == [8, 16, 32]
    own = [read_settings(one) for one in make_plan("off-policy", *OWN)]
    # The size of micro-batches is constant: 256 responses in 128 parts, 64 in 32.
    assert {one.train_batch_size / one.gradient_accumulation_steps for one in own} == {2.0}
    assert {one.n_grpo_steps for one in batches} == {10}
    assert {one.n_grpo_steps for one in own} == {200}
    assert {read_settings(one).n_grpo_steps for one in make_plan("baselines", "--n-grpo-steps", "3")} == {3}


@pytest.mark.medium
def test_plan_of_2026_has_four_seeds_and_the_recipe_unshortened():
    recipe = ["--recipe", "cs336-2026"]
    estimators = [read_settings(one) for one in make_plan("variants", *recipe)]
    assert [one.seed for one in estimators] == [0, 1, 2, 3] * 5
    found = [(one.loss_type, one.advantage, one.use_std_normalization, one.aggregation) for one in estimators[::4]]
    assert found == [
        ("reinforce_with_baseline", "group", True, "sequence_mean"),
        ("reinforce_with_baseline", "group", True, "constant"),
        ("reinforce_with_baseline", "group", False, "constant"),
        ("no_baseline", "group", True, "constant"),
        ("reinforce_with_baseline", "maxrl", True, "constant"),
    ]
    reused = [read_settings(one) for one in make_plan("off-policy-32", *recipe)[::4]]
    assert {(one.train_batch_size, one.gradient_accumulation_steps) for one in reused} == {(8, 1)}
    assert {one.updates_per_rollout_batch for one in reused} == {32}
    assert [one.loss_type for one in reused] == ["reinforce_with_baseline", "grpo_no_clip", "grpo_clip", "gspo"]
    assert [one.cliprange for one in reused[2:]] == [0.2, 3e-4]
    for one in (*estimators, *reused):
        assert (one.n_grpo_steps, one.n_val_examples, one.rollout_batch_size) == (200, 1024, 256)
    assert len(make_plan("baselines")) == 2
    assert [one.seed for one in make_plan("variants", seeds=(7,))] == [7] * 5


@pytest.mark.parametrize(("shared", "right"), [([], 4), (OWN, 5)], ids=["embedded", "own"])
def test_plan_sft_sweep_uses_all_sizes(shared, right):
    found = [(one.n_examples, one.correct_only) for one in map(read_settings, make_plan("sft-sizes", *shared))]
    assert found[:5] == [(n, False) for n in (128, 256, 512, 1024, None)]
    assert len(found) == 5 + right
    assert found[-1] == (None, True)


def test_plan_grid_is_all_combinations():
    runs = make_plan(grid=("learning_rate=1e-5,3e-5", "use-std-normalization=true,false"), seeds=(0, 1))
    assert [one.name for one in runs][:3] == ["1e-5-true-seed0", "1e-5-true-seed1", "1e-5-false-seed0"]
    found = [(s.learning_rate, s.use_std_normalization, s.seed) for s in map(read_settings, runs)]
    assert sorted(found) == sorted((r, n, s) for r in (1e-5, 3e-5) for n in (True, False) for s in (0, 1))
    assert {one.folder.parent for one in runs} == {Path("runs/sweep-train-grid")}


def test_plan_list_is_read_from_file(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"label": "a", "flags": {"loss_type": "grpo_clip", "sampling_stop": ["x", "y"]}},
        {"label": "b", "program": "sft", "flags": {"epochs": 2}},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    clip, sft = map(read_settings, make_plan(str(file)))
    assert (clip.loss_type, clip.sampling_stop, sft.epochs) == ("grpo_clip", ("x", "y"), 2)
    assert clip.n_grpo_steps == 15  # a custom list is not shortened
    file.write_text('{"label": "a", "flags": {"seed": 7}}')
    with pytest.raises(UsageError, match=r"mine.jsonl, a: --seed is set by the sweep for each run"):
        make_plan(str(file))
    for bad in (
        '{"flags": {}}',
        '{"label": "a/b"}',
        '{"label": "a", "program": "ppo"}',
        '{"label": "a", "flags": []}',
    ):
        file.write_text(bad)
        with pytest.raises(UsageError, match=r"mine.jsonl:1: `label`"):
            make_plan(str(file))
    file.write_text('{"label": "a"}\n{"label": "a"}')
    with pytest.raises(UsageError, match="each a different label"):
        make_plan(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give a preset (see --list), a .jsonl file or --grid"),
        ("baselines --grid seed=1", "one of them"),
        ("nonsense", "not a preset or a .jsonl file; the presets are learning-rates,"),
        ("none.jsonl", "none.jsonl: cannot be read"),
        ("baselines --seed 3", "--seed: is set by the sweep for each run"),
        ("baselines --resume auto", "--resume: is set"),
        ("baselines --seeds", "--seeds: pass at least one seed"),
        ("baselines --seeds 1 1", "--seeds 1 1: pass at least one seed, and each seed once"),
        ("baselines --n-grpo-stepz 3", "n-grpo-stepz"),
        ("baselines --group-size 7", "must be a multiple of --group-size 7"),
        ("--grid seed=1,2", "--grid, 1: --seed is set by the sweep for each run"),
        ("--grid save-dir=a,b learning_rate=1e-5", "--save-dir is set by the sweep for each run"),
        ("--grid learning_rate", "give a setting and its values"),
        ("--grid learning_rate=1e-5,", "give a setting and its values"),
        ("--grid learning_rate=much", "much"),
    ],
)
def test_sweep_invalid_flags_exit_before_any_run(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_sweep_dry_run_prints_commands(capsys):
    main(["--list"])
    output = capsys.readouterr().out
    assert all(name in output for name in SWEEPS)
    main(["methods", "--list"])
    lines = capsys.readouterr().out.splitlines()
    names = ["drivers/sft.py", "drivers/expert_iteration.py", "drivers/train.py"]
    assert [line.split()[1] for line in lines] == names
    assert all(line.split()[0].endswith("python") for line in lines)
    with pytest.raises(SystemExit):
        main(["methods", "--show"])
    assert "--show: belongs to train.py; pass --list" in " ".join(capsys.readouterr().err.split())
    main(["--grid", "learning_rate=1e-5,3e-5", "--list", *OWN, "--group-size", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(" --model-path Qwen/Qwen2.5-Math-1.5B --group-size 4 --learning-rate " in line for line in lines)
    main(["--list", *OWN])
    assert all(name in capsys.readouterr().out for name in ("methods",))


def test_plan_last_recipe_wins():
    runs = make_plan("objectives", "--recipe", "quickstart")
    assert [read_settings(one).recipe for one in runs] == [one.variant.flags["recipe"] for one in runs]
    assert {read_settings(one).loss_type for one in runs} > {"gspo", "cispo"}


def test_plan_run_has_its_seed_and_folder_and_is_resumed(tmp_path):
    planned = make_plan("baselines", save_dir=str(tmp_path), seeds=(3, 4))
    for run, seed in zip(planned, (3, 4, 3, 4), strict=True):
        assert run.folder == tmp_path / f"{run.variant.label}-seed{seed}"
        assert run.command[-6:] == ("--seed", str(seed), "--save-dir", str(run.folder), "--resume", "auto")


def test_plan_flags_round_trip():
    flags = {"use_std_normalization": False, "deterministic": True, "sampling_stop": ("a", "b"), "learning_rate": 1e-6}
    settings = parse_program_flags("train", as_flags(flags))
    assert {name: getattr(settings, name) for name in flags} == flags


# --- tables ----------------------------------------------------------------------------------------------------------


def make_results(folder, label, seed, *accuracies, finished=True):
    one = PlannedRun(Variant(label, "train", {}), seed, folder / f"{label}-seed{seed}", ())
    one.folder.mkdir(parents=True)
    rows = [
        {"phase": "eval", "step": step, "accuracy": accuracy, "accuracy_stderr": 0.1, "n_examples": 50}
        for step, accuracy in enumerate(accuracies)
    ]
    rows += [{"phase": "train", "step": 1, "reward": 0.5, "time_update_s": 60.0, "time_rollout_s": 30.0}]
    (one.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if finished:
        (one.folder / "final_model").mkdir()
    return one


def test_results_table_has_row_per_label(tmp_path):
    runs = [
        make_results(tmp_path, "a", 0, 0.1, 0.8, 0.6),
        make_results(tmp_path, "a", 1, 0.1, 0.2, 0.4),
        make_results(tmp_path, "b", 0, 0.3, finished=False),
        PlannedRun(Variant("c", "sft", {}), 0, tmp_path / "never", ()),
    ]
    results = [read_result(run, status) for run, status in zip(runs, (0, 0, 1, None), strict=True)]
    assert results[0].accuracy == 0.6
    assert (results[0].best_accuracy, results[0].best_step, results[0].minutes) == (0.8, 1, 1.5)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in make_table(results).splitlines()]
    assert cells[0] == ["run", "before", "accuracy", "best", "reward", "minutes", "state"]
    assert cells[2] == ["a", "0.100", "0.500 (0.400 to 0.600)", "0.600", "0.500", "1.5", "2 finished"]
    assert cells[3] == ["b", "0.300", "0.300 (0.191 to 0.438)", "0.300", "0.500", "1.5", "failed"]
    assert cells[4] == ["c", "", "", "", "", "", "not finished"]


def test_results_hold_the_values_of_the_last_step(tmp_path):
    rows = make_step_rows([0.1, 0.9], response_tokens=7.0)
    rows[1] |= {"response_tokens": 5.0, "rollout_entropy": 1.5}
    run = PlannedRun(Variant("a", "train", {}), 0, write_run(tmp_path / "a", rows), ())
    result = read_result(run, 1)
    assert (result.reward, result.response_tokens, result.rollout_entropy) == (0.9, 5.0, 1.5)
    assert (result.state, result.accuracy, result.minutes) == ("failed", None, pytest.approx(4 / 60))


@pytest.mark.parametrize("others", [(), (0.2,)], ids=["before any evaluation", "after the first"])
def test_results_mean_excludes_unfinished_seeds(tmp_path, others):
    """The first seed failed, so the table has the other one."""
    runs = [make_results(tmp_path, "a", 0, *others, finished=False), make_results(tmp_path, "a", 1, 0.1, 0.8)]
    results = [read_result(run, status) for run, status in zip(runs, (1, 0), strict=True)]
    cells = [cell.strip() for cell in make_table(results).splitlines()[2].split("|")[1:-1]]
    assert cells == ["a", "0.100", "0.800 (0.670 to 0.888)", "0.800", "0.500", "1.5", "1 failed, 1 finished"]


def test_results_without_report_are_written(tmp_path, monkeypatch, capsys):
    run = make_results(tmp_path, "a", 0, 0.1, 0.8)

    def fail(*_):
        raise ValueError("no font")

    monkeypatch.setattr("drivers.sweeps.results.write_report", fail)
    table = write_results(tmp_path, [run], {"a-seed0": 0})
    assert (tmp_path / "summary.md").read_text() == table + "\n"
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert (row["accuracy"], row["state"], row["minutes"]) == (0.8, "finished", 1.5)
    assert "rollout_entropy" not in row
    assert "report.html could not be written (no font)" in capsys.readouterr().err


def test_sweep_folder_of_other_sweep_is_refused(tmp_path):
    first = make_plan("baselines", save_dir=str(tmp_path))
    keep_plan(tmp_path, first)
    keep_plan(tmp_path, first)
    with pytest.raises(UsageError, match="holds another sweep without any of these 3 runs"):
        keep_plan(tmp_path, make_plan("clip", save_dir=str(tmp_path)))
    with pytest.raises(UsageError, match="no-baseline-seed0 was made by another command"):
        keep_plan(tmp_path, make_plan("baselines", "--group-size", "4", save_dir=str(tmp_path)))
    for broken in ("{", "{}", "[1]", '[{"folder": "a"}]'):
        (tmp_path / "sweep.json").write_text(broken)
        if broken != "{}":  # the folder is empty
            with pytest.raises(UsageError, match="cannot be used"):
                keep_plan(tmp_path, first)


def test_sweep_may_grow_and_move(tmp_path):
    def kept():
        return {entry["folder"]: entry["command"] for entry in json.loads((tmp_path / "sweep.json").read_text())}

    keep_plan(tmp_path, make_plan("baselines", save_dir=str(tmp_path)))
    moved = json.loads((tmp_path / "sweep.json").read_text().replace(str(ROOT), "/elsewhere"))
    assert moved[0]["command"].startswith("/elsewhere/drivers/train.py ")
    (tmp_path / "sweep.json").write_text(json.dumps(moved))
    keep_plan(tmp_path, make_plan("baselines", save_dir=str(tmp_path), seeds=(1, 0)))
    names = [f"{name}-seed{seed}" for name in ("no-baseline", "reinforce-with-baseline") for seed in (0, 1)]
    assert sorted(kept()) == sorted(names)
    assert all(f"--seed {name[-1]} " in command for name, command in kept().items())
    keep_plan(tmp_path, make_plan("baselines", save_dir=str(tmp_path), seeds=(1,)))
    assert len(kept()) == 4


# --- real runs -------------------------------------------------------------------------------------------------------


def write_list(folder):
    """Write a list of two runs that learn nothing and one that cannot begin. Return the arguments of the sweep."""
    save_tiny(folder / "tiny")
    batch = {"n_grpo_steps": 2, "rollout_batch_size": 8, "train_batch_size": 8}
    data = {"val_data_path": "data/wordadd/validation.jsonl"}
    rows = [
        {"label": "baseline", "flags": batch | data},
        {"label": "broken", "flags": batch | {"val_data_path": "none.jsonl"}},
        {
            "label": "imitation",
            "program": "expert_iteration",
            "flags": data | {"n_ei_steps": 1, "question_batch_size": 2},
        },
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (
        f"--model-path {folder}/tiny --data-path data/wordadd/train.jsonl --prompt-path data/prompts/wordadd.prompt "
        "--engine hf --dtype float32 --group-size 2 --sampling-min-tokens 0 --sampling-max-tokens 4 --n-val-examples 4"
        " --wandb-project None --micro-batch-tokens 512"
    )
    return f"{folder}/mine.jsonl --save-dir {folder}/sweep {shared}"


@pytest.mark.slow
def test_sweep_runs_reports_and_skips_finished_runs(tmp_path, capsys):
    arguments = write_list(tmp_path).split()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert "broken-seed0: failed with exit status 2: train.py: --val-data-path none.jsonl" in capsys.readouterr().out
    sweep = tmp_path / "sweep"
    states = {row["label"]: row["state"] for row in json.loads((sweep / "summary.json").read_text())}
    assert states == {"baseline": "finished", "broken": "failed", "imitation": "finished"}
    assert "| imitation |" in (sweep / "summary.md").read_text()
    assert "baseline-seed0" in (sweep / "report.html").read_text()
    assert "step 2/2" in (sweep / "baseline-seed0.log").read_text()
    weights = (sweep / "baseline-seed0/final_model/model.safetensors").stat().st_mtime_ns
    rows = (tmp_path / "mine.jsonl").read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text(rows[0])
    main(arguments)
    assert capsys.readouterr().out.count("is already complete") == 1
    assert (sweep / "baseline-seed0/final_model/model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_sweep_stopped_leaves_no_process_and_resumes(tmp_path):
    command = program_command("sweep", write_list(tmp_path))
    row = json.loads((tmp_path / "mine.jsonl").read_text().splitlines()[0])
    row["flags"]["n_grpo_steps"] = 2000
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    log = tmp_path / "sweep/baseline-seed0.log"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        end = time.monotonic() + 120
        while not (log.exists() and "\nstep " in log.read_text()):
            assert time.monotonic() < end
            time.sleep(0.2)
        sweep.send_signal(signal.SIGTERM)
        output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, output
    assert "Stopped after step" in log.read_text()
    assert "| baseline |" in output
    assert "not finished" in output
    assert not [
        one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])
    ]
    steps = json.loads((tmp_path / "sweep/summary.json").read_text())[0]
    assert steps["state"] == "not finished"
