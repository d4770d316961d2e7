"""Tasks of reasoning-gym as data files and its verifiers as a reward, with a fake package and with the real one."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from drivers.common.errors import UsageError
from drivers.grading.loading import load_reward
from drivers.grading.verdicts import make_inline_grader
from drivers.make_task import main
from drivers.tasks import gym as gym_task
from drivers.tasks.gym import GymConfig
from drivers.tasks.questions import load_examples

MODULE = "drivers.grading.gym"


class FakeTask:
    """A task with questions "k + 1?" and a verifier that gives partial scores, fails, and reads its entry."""

    def __init__(self, seed=0, size=500, step=1, distinct=1000, repeat=1, metadata=None):
        if step < 1:
            raise AssertionError("step must be\npositive")
        self.seed, self.size, self.step, self.metadata = seed, size, step, metadata
        self.distinct, self.repeat = distinct, repeat

    def __getitem__(self, index):
        k = (self.seed + index) // self.repeat % self.distinct
        more = {"sum": k + self.step} | ({} if self.metadata is None else {"more": eval(self.metadata)})
        return {"question": f"{k} + {self.step}?", "answer": str(k + self.step), "metadata": more}

    def score_answer(self, answer, entry):
        if answer == "out of memory":
            raise MemoryError
        if not answer:
            return 0.01
        if isinstance(entry["metadata"].get("more", ()), list):
            return 0.0
        return 1.0 if int(answer) == entry["metadata"]["sum"] else 0.01 * self.step


class UnansweredTask(FakeTask):
    """A task without an answer."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"answer": None}


@pytest.fixture
def gym(monkeypatch):
    """Return a fake of the package."""
    tasks, made = {"plus": FakeTask, "silent": UnansweredTask}, []

    def create_dataset(name, **parameters):
        made.append((name, parameters))
        return tasks[name](**parameters)

    package = SimpleNamespace(create_dataset=create_dataset, factory=SimpleNamespace(DATASETS=tasks), made=made)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield package
    sys.modules.pop(MODULE, None)


def reward(response, truth):
    return importlib.import_module(MODULE).reward(response, truth)


def make_gym(config):
    return gym_task.make_gym(config, reward)


def wrap_answer(text):
    return f" hm </think> <answer> {text} </answer>"


def make_row(**more):
    config = {"tasks": ("plus",), "n_train": 1, "n_validation": 1} | more
    return make_gym(GymConfig(**config))["train"][0]


def test_gym_reward_calls_verifier_with_answer_and_entry(gym):
    row = make_row(params=("step=3",))
    assert row["question"] == "1 + 3?"
    right = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}
    assert reward(wrap_answer("4"), row["answer"]) == right
    assert reward(wrap_answer(" 04 "), row["answer"]) == right
    partial = reward(wrap_answer("5"), row["answer"])
    assert partial == {"reward": pytest.approx(0.03), "format_reward": 1.0, "answer_reward": 0.0}
    assert gym.made[-1] == ("plus", {"step": 3})  # created once for all questions
    assert gym.made.count(("plus", {"step": 3})) == 1


@pytest.mark.parametrize(
    ("response", "formatted"),
    [
        ("4", 0.0),
        (wrap_answer(""), 1.0),
        (wrap_answer("four"), 1.0),  # the verifier raises
        (wrap_answer("1 </answer> <answer> 1"), 1.0),
        ("<answer> 1 </answer>", 0.0),
    ],
)
def test_gym_reward_without_answer_is_zero(gym, response, formatted):
    assert reward(response, make_row()["answer"]) == {"reward": 0.0, "format_reward": formatted, "answer_reward": 0.0}


def test_gym_reward_memory_error_is_raised(gym):
    (verdict,) = make_inline_grader(reward)([wrap_answer("out of memory")], [make_row()["answer"]])
    assert (verdict.status, verdict.is_scored) == ("error", False)


@pytest.mark.parametrize("truth", ["4", "{}", '{"task": "plus"}', ["a"], "x"])
def test_gym_reward_invalid_ground_truth_is_named(gym, truth):
    with pytest.raises(ValueError, match="expected a task of reasoning-gym"):
        reward(wrap_answer("1"), truth)


def test_make_gym_splits_are_disjoint_and_seeded(gym):
    config = GymConfig(tasks=("plus", "silent", "plus"), n_train=30, n_validation=10, params=())
    splits = make_gym(config)
    assert [len(splits[split]) for split in ("train", "validation")] == [60, 20]
    questions = {
        split: {(row["question"], json.loads(row["answer"])["task"]) for row in splits[split]} for split in splits
    }
    assert len(questions["train"]) == 60
    assert not questions["train"] & questions["validation"]
    assert make_gym(config) == splits
    other = make_gym(GymConfig(tasks=("plus",), n_train=30, n_validation=10, seed=500))
    assert {row["question"] for row in other["train"]} != {row["question"] for row in splits["train"]}
    assert [row["question"] for row in splits["train"]] != sorted(row["question"] for row in splits["train"])


def test_make_gym_repeated_questions_appear_once(gym):
    splits = make_gym(GymConfig(tasks=("plus",), params=("repeat=3",), n_train=8, n_validation=4))
    assert sorted(int(row["question"].split()[0]) for rows in splits.values() for row in rows) == list(range(12))
    assert [len(splits[split]) for split in ("train", "validation")] == [8, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no task given: name one or several"),
        ("plu", "plu: unknown task of reasoning-gym; --list prints all names; did you mean plus?"),
        (
            "plus --params step=0",
            "cannot be created with --params {'step': 0} (AssertionError: step must be positive)",
        ),
        ("plus --params pace=1", "unexpected keyword argument 'pace'"),
        ("plus --params step", "--params step: expected name=value"),
        ("plus --params seed=1", "--params seed=1: expected name=value"),
        ("plus silent --params step=2", "--params step=2: parameters apply to a single task, but 2 are given"),
        (
            "plus --params distinct=11",
            "plus: 240 entries contain only 11 different questions, and --n-train plus --n-validation is 12",
        ),
        ("plus --params metadata=(1,)", "plus: unsupported task; its verifier rejects its own answer"),
        ("plus --params metadata={1}", "its verifier's data cannot be written as JSON"),
        ("plus --n-train 0", "--n-train 0: must be greater than 0"),
        ("plus --seed -1", "--seed -1: must not be negative"),
        ("plus --output-dir {file}/x", "cannot write file/x/"),
    ],
)
def test_make_gym_invalid_flags_exit_with_one_line(gym, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    flags = ["gym", "--n-train", "8", "--n-validation", "4", *arguments.replace("{file}", "file").split()]
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_make_gym_writes_data_files(gym, tmp_path, capsys):
    main(["gym", "--list"])
    assert capsys.readouterr().out == "plus\nsilent\n"
    main(
        [
            "gym",
            "plus",
            "--params",
            "step=2",
            "--n-train",
            "5",
            "--n-validation",
            "3",
            "--output-dir",
            str(tmp_path / "new"),
        ]
    )
    assert "5 questions" in capsys.readouterr().out
    for example in load_examples("-", str(tmp_path / "new/train.jsonl")):
        k = int(example.question.split()[0])
        assert reward(wrap_answer(str(k + 2)), example.answer)["reward"] == 1.0


def test_gym_without_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(UsageError, match=r"--reward gym: .*pip install -e '\.\[gym\]'"):
        load_reward("gym")
    with pytest.raises(SystemExit):
        main(["gym", "plus"])
    assert capsys.readouterr().err == (
        "make_task.py: the package reasoning-gym is not installed; in this clone, run: "
        ".venv/bin/pip install -e '.[gym]'\n"
    )


@pytest.mark.parametrize(
    ("task", "params", "wrong"),
    [
        ("chain_sum", ("min_terms=2", "max_terms=3"), "7.5"),
        ("leg_counting", (), "-1"),
        ("word_sorting", (), "z, y"),
        ("letter_jumble", (), "xxxxx"),
    ],
)
def test_gym_reward_with_reasoning_gym_accepts_its_answers(task, params, wrong):
    pytest.importorskip("reasoning_gym")
    splits = make_gym(GymConfig(tasks=(task,), params=params, n_train=12, n_validation=4))
    assert [len(splits[split]) for split in ("train", "validation")] == [12, 4]
    for row in splits["train"]:
        own = json.loads(row["answer"])["entry"]["answer"]
        assert reward(wrap_answer(own), row["answer"])["reward"] == 1.0
        assert reward(wrap_answer(wrong), row["answer"])["answer_reward"] == 0.0


def test_make_gym_task_with_tuples_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UsageError, match="rearc: unsupported task"):
        make_gym(GymConfig(tasks=("rearc",), n_train=1, n_validation=1))
