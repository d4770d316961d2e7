"""Grading in processes that can be killed: verdicts, deadlines, custom rewards, and nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import grpo_core as core
from drivers import evaluate as evaluate_program
from drivers import train as train_program
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.evaluation.policy import evaluate_policy
from drivers.grading import pool as pool_module
from drivers.grading import verdicts
from drivers.grading.loading import load_reward
from drivers.grading.pool import GradingPool
from drivers.grading.summary import describe_grades
from drivers.grading.verdicts import Graded, make_inline_grader
from drivers.grading.worker import WorkerOptions
from drivers.settings.formula import formula
from drivers.settings.reward_spec import parse_mix
from drivers.settings.sampling import Sampling
from drivers.training.advantages import compute_rewards, prepare_rollouts
from drivers.training.batch import StepRollouts, make_rollout_batch
from drivers.training.components import Components
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.rollouts import collect
from drivers.training.update import accumulate_gradients
from tests.drivers.helpers import hostile_rewards
from tests.drivers.helpers.engines import ScriptedEngine
from tests.drivers.helpers.letters import (
    clone_policy,
    make_completion,
    make_run,
    make_tiny_config,
    make_tiny_parts,
    sample_rollouts,
)
from tests.drivers.helpers.processes import call_program, restore_interrupt, wait_until
from tests.drivers.helpers.runs import read_rows, run_training
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "tests/drivers/helpers/hostile_rewards.py")
DEADLINE = 0.5
R1 = make_inline_grader(core.r1_zero_reward_fn)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def open_pool(function="reward", *mix, n_workers=2, deadline_s=DEADLINE, **settings):
    return GradingPool(f"{FILE}:{function}", mix, n_workers=n_workers, deadline_s=deadline_s, **settings)


@pytest.fixture(scope="module")
def pool():
    with open_pool(warn=lambda _: None) as pool:
        pool.load()
        yield pool


@pytest.fixture(scope="module")
def async_pool():
    with open_pool("async_reward", warn=lambda _: None) as pool:
        pool.load()
        yield pool


def list_workers(pool):
    """Return the process ids of the workers once all are ready."""
    while not all(worker.pid for worker in pool._workers):
        pool(["1"], ["1"])
    return {worker.pid for worker in pool._workers}


def grade_with(pool, *deeds, before=30, after=30):
    """Return the verdicts on `deeds`, graded between right answers before them and wrong ones after them."""
    begin = time.monotonic()
    graded = pool(["1"] * before + [*deeds] + ["2"] * after, ["1"] * (before + len(deeds) + after))
    others = graded[:before] + graded[before + len(deeds) :]
    assert [verdict.scores["reward"] for verdict in others] == [1.0] * before + [0.0] * after
    assert {verdict.status for verdict in others} <= {"parsed"}
    return graded[before : before + len(deeds)], time.monotonic() - begin


# --- hostile rewards and their verdicts ------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize(
    ("deed", "why", "detail"),
    [
        slow("loop", "timeout", "no grade within 0.5 s"),
        ("regex", "timeout", "no grade within 0.5 s"),
        slow("sleep", "timeout", "no grade within 0.5 s"),
        ("no alarm", "timeout", "no grade within 0.5 s"),
        ("exit", "error", "its process ended with exit code 3"),
        ("segfault", "error", "its process ended by SIGSEGV"),
        ("kill", "error", "its process ended by SIGKILL"),
        ("close", "error", "its process ended by SIGKILL"),
        ("scribble", "error", "its process ended by SIGKILL"),
        ("pretend", "error", "its process ended by SIGKILL"),
        ("refuse", "error", "its process ended by SIGKILL"),
        ("allocate", "error", "MemoryError: "),
        ("raise", "error", "ValueError: invalid literal for int() with base 10: 'no number'"),
        ("recursion", "error", "RecursionError: maximum recursion depth exceeded"),
        ("leave", "error", "SystemExit: 4"),
    ],
)
def test_grading_pool_hostile_reward_has_its_verdict_and_others_are_graded(pool, deed, why, detail):
    (verdict,), seconds = grade_with(pool, deed)
    assert verdict == Graded({"reward": None}, why, detail)
    assert seconds < DEADLINE + 2.0
    assert len(list_workers(pool)) == 2


def test_grading_worker_deadline_is_kept_by_the_kernel(pool, monkeypatch):
    """The trainer would end the worker much later, and may be gone."""
    monkeypatch.setattr(pool_module, "GRACE_S", 60.0)
    (verdict,), seconds = grade_with(pool, "regex")
    assert verdict.status == "timeout"
    assert seconds < 20.0


def test_grading_worker_forged_message_is_not_believed(pool):
    """The forged message has the right form and arrives where the first answer of a chunk is expected."""
    (verdict,), _ = grade_with(pool, "scribble", before=0)
    assert verdict.status == "error"


@pytest.mark.parametrize("n_before", [0, 7])
def test_grading_worker_that_forks_grades_no_later_batch(pool, n_before):
    """The forked process answers too; its grades of one chunk must not count for the next."""
    pool(["1"] * n_before + ["fork"] + ["1"] * 12, ["1"] * (n_before + 13))
    for _ in range(3):
        assert [verdict.scores["reward"] for verdict in pool(["1"] * 20, ["1"] * 20)] == [1.0] * 20


def test_grading_pool_closes_descriptors(pool):
    grade_with(pool)
    list_workers(pool)
    folders = [Path("/proc/self/fd"), Path(f"/proc/{pool._server.process.pid}/fd")]
    before = [len(list(folder.iterdir())) for folder in folders]
    pool(["exit"] * 30, ["1"] * 30)
    wait_until(lambda: [len(list(folder.iterdir())) for folder in folders] == before)


@pytest.mark.medium
def test_grading_pool_several_hang_each_costs_one_deadline(pool):
    """Chunks return to the queue, and each hanging response costs one worker one deadline."""
    verdicts, seconds = grade_with(pool, "sleep", "1", "exit", "loop", "sleep", "2", "raise", before=100)
    assert [verdict.status for verdict in verdicts] == [
        "timeout",
        "parsed",
        "error",
        "timeout",
        "timeout",
        "parsed",
        "error",
    ]
    assert seconds < 3 * DEADLINE + 2.0


@pytest.mark.slow
def test_grading_worker_memory_limit_is_an_error():
    with open_pool(deadline_s=100.0) as pool:
        (verdict,), _ = grade_with(pool, "fill")
        assert verdict == Graded({"reward": None}, "error", "MemoryError: ")


def test_grading_worker_out_of_memory_is_replaced(pool):
    grade_with(pool)
    before = list_workers(pool)
    grade_with(pool, "raise")
    assert list_workers(pool) == before
    grade_with(pool, "allocate")
    grade_with(pool)
    assert len(before & list_workers(pool)) == 1


@pytest.mark.medium
def test_grading_worker_child_process_ends_with_it(tmp_path):
    with open_pool(
        n_workers=1, deadline_s=2.0, warn=lambda _: None
    ) as pool:  # the time that the child may need to start
        (verdict,) = pool([f"other: {tmp_path / 'pid'}"], ["1"])
        assert verdict.status == "timeout"
        assert_gone([int((tmp_path / "pid").read_text())], within=2.0)


@pytest.mark.medium
def test_grading_worker_child_in_other_session_ends(tmp_path):
    """It ends with a worker that is killed, and with the pool if its worker continues."""
    with open_pool(n_workers=1, deadline_s=2.0, warn=lambda _: None) as pool:
        (verdict,) = pool([f"hanging stray: {tmp_path / 'hanging'}"], ["1"])
        assert verdict.status == "timeout"
        pids = [int(pid) for pid in (tmp_path / "hanging").read_text().split()]
        assert len(pids) == 2
        assert_gone(pids, within=2.0)
        (verdict,) = pool([f"stray: {tmp_path / 'other'}"], ["1"])
        assert verdict.scores["reward"] == 1.0
        pids = [int(pid) for pid in (tmp_path / "other").read_text().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
    assert_gone(pids, within=2.0)


@pytest.mark.medium
def test_grading_pool_first_failures_warn():
    warnings = []
    with open_pool(warn=warnings.append) as pool:
        grade_with(pool, *["raise"] * 2)
        grade_with(pool, *["raise"] * 2)
    assert len(warnings) == 3
    assert f"--reward {FILE}:reward: error (" in warnings[0]
    assert " for the response 'raise': it is not scored" in warnings[0]
    assert not any("further" in text for text in warnings[:2])
    assert warnings[2].endswith("further failures are only counted in the log")


# --- a pool grades like an inline grader -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_in_pool():
    with GradingPool("r1_zero", n_workers=2) as pool:
        yield pool  # the first batch waits for a ready worker


@pytest.mark.slow
def test_grading_pool_equals_inline_grader(built_in_pool):
    forms = ["{}", r"\boxed{{{}}}", r"\frac{{{}}}{{1}}", "so {}", "{}, or not", ""]
    responses = [f"hm </think> <answer> {forms[k % 6].format(k // 2)} </answer>" for k in range(1998)]
    responses += ["no answer", "\ud800 </think> <answer> é９\u200b </answer>"]
    truths = [str(k // 3) if k % 7 else [k // 2, str(k // 3)] for k in range(2000)]
    graded = built_in_pool(responses, truths)
    assert graded == R1(responses, truths)
    assert len({tuple(verdict.scores.values()) for verdict in graded}) == 3  # one of each kind
    assert graded[1998] == Graded({"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}, "unparsable")
    assert built_in_pool([], []) == []
    with pytest.raises(ValueError, match="zip"):
        built_in_pool(["1"], [])


@pytest.mark.medium
def test_grading_pool_invalid_ground_truth_is_an_error(built_in_pool):
    good, bad = built_in_pool(["</think> <answer> 1 </answer>"] * 2, ["1", ""])
    assert good.scores["reward"] == 1.0
    assert (bad.scores, bad.status) == ({"reward": None}, "error")
    assert "ground_truth='' must hold an answer" in bad.detail
    assert bad == R1(["</think> <answer> 1 </answer>"], [""])[0]


def test_grading_pool_is_thread_safe(pool):
    found = {}

    def grade(name):
        found[name] = pool([f"{name}{k}" for k in range(200)] + ["raise"], [f"{name}{k - k % 2}" for k in range(201)])

    threads = [threading.Thread(target=grade, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name in "ab":
        assert [verdict.scores["reward"] for verdict in found[name]] == [1.0, 0.0] * 100 + [None]


def test_grading_pool_after_interrupt_grades_next_batch(pool, monkeypatch):
    """Late answers to the interrupted batch do not count for the next one."""
    taken = []
    take = GradingPool._on_message

    def interrupted(self, worker, message, batch):
        taken.append(message)
        if len(taken) == 10:
            raise KeyboardInterrupt
        take(self, worker, message, batch)

    monkeypatch.setattr(GradingPool, "_on_message", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool(["1"] * 50 + ["sleep"], ["1"] * 51)
    assert [verdict.scores["reward"] for verdict in pool(["1", "2"] * 50, ["2"] * 100)] == [0.0, 1.0] * 50


def test_grading_workers_ignore_sigint_and_sigterm(pool):
    grade_with(pool)
    before = list_workers(pool)
    for pid in (*before, pool._server.process.pid):
        assert os.getpgid(pid) != os.getpgrp()  # a terminal sends the signal to the whole group
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    grade_with(pool)
    assert list_workers(pool) == before


@pytest.mark.slow
def test_grading_pool_restarts_after_all_were_killed(pool):
    pids = [*list_workers(pool), pool._server.process.pid]
    os.kill(pool._server.process.pid, signal.SIGKILL)
    assert_gone(pids[:-1], within=2.0)  # the workers end with the pool
    grade_with(pool, "exit")
    assert not {*pids} & list_workers(pool)


# --- nothing is left behind ------------------------------------------------------------------------------------------


def is_alive(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_gone(pids, *, within):
    end = time.monotonic() + within
    while any(map(is_alive, pids)):
        assert time.monotonic() < end, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.02)


@pytest.mark.slow
def test_grading_pool_close_ends_workers_and_calls():
    pool = open_pool(n_workers=1, deadline_s=100.0)
    pool.load()
    pids, ended = [*list_workers(pool), pool._server.process.pid], []

    def grade():
        try:
            pool(["sleep"], ["1"])
        except RuntimeError as error:
            ended.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    time.sleep(0.2)
    begin = time.monotonic()
    pool.close()
    thread.join(10)
    assert ended == ["the GradingPool is closed"]
    assert time.monotonic() - begin < 5.0
    assert_gone(pids, within=0.0)
    pool.close()  # a second close has no effect
    with pytest.raises(RuntimeError, match="closed"):
        pool(["1"], ["1"])


TRAINER = """
import os, sys, threading, time
from drivers.grading.pool import GradingPool
from drivers.common.signals import terminate_as_interrupt
pool = GradingPool(sys.argv[1], n_workers=2, deadline_s=float(sys.argv[2]))
pool.load()
threading.Thread(target=pool, args=(["no alarm"] * 4, ["1"] * 4), daemon=True).start()
while not all(worker.work for worker in pool._workers):
    time.sleep(0.01)
if sys.argv[3] == "fork" and os.fork() == 0:  # a child that holds every descriptor open
    time.sleep(1000)
print(pool._server.process.pid, *[worker.pid for worker in pool._workers], flush=True)
with terminate_as_interrupt():
    try:
        time.sleep(1000)
    except KeyboardInterrupt:
        if sys.argv[3] == "close":
            pool.close()
"""


@pytest.mark.parametrize(
    ("number", "how"),
    [
        slow(signal.SIGKILL, "fork"),
        slow(signal.SIGKILL, ""),
        slow(signal.SIGTERM, "close"),
        slow(signal.SIGTERM, ""),
        slow(signal.SIGINT, "close"),
    ],
)
def test_grading_workers_end_with_killed_trainer(number, how):
    """This includes workers that hang with their alarm off and a distant deadline."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, f"{FILE}:reward", "1000", how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_interrupt,
    ) as trainer:
        assert trainer.stdout is not None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        trainer.send_signal(number)
        try:
            trainer.wait(20)
            assert_gone(pids, within=3.0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(trainer.pid, signal.SIGKILL)


def test_grading_pool_closed_at_start_leaves_nothing():
    pool = open_pool(n_workers=3)
    begin = time.monotonic()
    pool.close()
    assert pool._server.process.returncode is not None
    assert time.monotonic() - begin < 5.0


# --- what a reward function returns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "mix", "scores", "why"),
    [
        (1, (), {"reward": 1.0}, "parsed"),
        (True, (), {"reward": 1.0}, "parsed"),
        (-0.5, (), {"reward": -0.5}, "parsed"),
        (np.float32(0.5), (), {"reward": 0.5}, "parsed"),
        (torch.tensor(2), (), {"reward": 2.0}, "parsed"),
        (None, (), {"reward": None}, "unparsable"),
        (None, ("a=1",), {"reward": None}, "unparsable"),
        ({"reward": 0.5, "length": 3}, (), {"reward": 0.5, "length": 3.0}, "parsed"),
        ({"reward": None, "length": 3}, (), {"reward": None, "length": 3.0}, "unparsable"),
        ({"reward": 0, "format_reward": 0}, (), {"reward": 0.0, "format_reward": 0.0}, "unparsable"),
        ({"only": 0.5}, (), {"reward": 0.5, "only": 0.5}, "parsed"),
        ({"a": 2, "b": 3, "c": 9}, ("a=1", "b=-0.5"), {"reward": 0.5, "a": 2.0, "b": 3.0, "c": 9.0}, "parsed"),
        ({"a": 2, "b": None}, ("a=1", "b=1"), {"reward": None, "a": 2.0, "b": None}, "unparsable"),
        ({"a": 2, "b": None}, ("a=1",), {"reward": 2.0, "a": 2.0, "b": None}, "parsed"),
    ],
)
def test_read_return_valid_values(returned, mix, scores, why):
    (verdict,) = make_inline_grader(lambda response, truth: returned, mix)(["x"], ["1"])
    assert (verdict.scores, verdict.status) == (scores, why)
    assert next(iter(verdict.scores)) == "reward"


NUMBER = "expected a finite number, None for a response that cannot be scored, or a dict of these by name"


@pytest.mark.parametrize(
    ("returned", "mix", "message"),
    [
        ("1.0", (), f"returned '1.0' for the response '{'r' * 60}': {NUMBER}"),
        ([1.0], (), f"returned [1.0] for the response '{'r' * 60}': {NUMBER}"),
        (1j, (), NUMBER),
        (np.zeros(2), (), NUMBER),
        ({"reward": "high"}, (), f"returned {{'reward': 'high'}} for the response '{'r' * 60}': {NUMBER}"),
        ({"a b": 1.0}, (), "'a b' must be a name of letters, digits and _"),
        ({1: 1.0}, (), "1 must be a name of letters, digits and _"),
        ({}, (), "a dict of several numbers needs the key 'reward', or --reward-mix NAME=WEIGHT"),
        ({"a": 1, "b": 2}, (), "a dict of several numbers needs the key 'reward', or --reward-mix NAME=WEIGHT"),
        ({"a": 1}, ("a=1", "b=1"), "--reward-mix needs a dict with a, b; b is missing"),
        (0.5, ("a=1",), "--reward-mix needs a dict with a; a is missing"),
        ({"a": 1, "reward": 1}, ("a=1",), "the dict already has 'reward'; remove that key, or omit --reward-mix"),
        (list(range(1000)), (), "1, 2, 3"),
    ],
)
def test_read_return_invalid_values_raise(returned, mix, message):
    def mine(response, truth):
        return returned

    with pytest.raises(TrainingAbortedError) as raised:
        make_inline_grader(mine, mix)(["r" * 100], ["1"])
    assert message in str(raised.value)
    assert str(raised.value).startswith("reward_fn=mine: returned ")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("returned", "mix", "detail"),
    [
        (float("nan"), (), "reward is nan"),
        (float("-inf"), (), "reward is -inf"),
        (1e39, (), "reward is 1e+39"),
        (10**400, (), "reward is an integer with too many digits"),
        (torch.tensor(float("nan")), (), "reward is nan"),
        ({"a": 1.0, "b": float("inf")}, ("a=1",), "b is inf"),
        ({"a": 3e38, "b": 3e38}, ("a=1", "b=1"), "the sum of --reward-mix is 6e+38"),
        ({"a": 3e38, "b": 3e38}, ("a=1e300", "b=-1e300"), "the sum of --reward-mix is nan"),
    ],
)
def test_read_return_not_finite_is_unscored(returned, mix, detail):
    (verdict,) = make_inline_grader(lambda response, truth: returned, mix)(["x"], ["1"])
    assert verdict == Graded({"reward": None}, "not_finite", f"{detail}: a finite number is required")


def test_grading_pool_not_finite_warns(pool):
    (verdict,), _ = grade_with(pool, "nan")
    assert verdict == Graded({"reward": None}, "not_finite", "reward is nan: a finite number is required")


@pytest.mark.medium
@pytest.mark.parametrize("function", ["about", "async_about"])
def test_grader_reward_with_question_parameter_gets_question(function):
    """A parameter named `question` receives it, in the pool and in this process."""
    responses, answers, questions = ["red 1", "blue 1", "red 2"], ["1"] * 3, ["red", "red", "blue"]
    here = make_inline_grader(getattr(hostile_rewards, function))
    with open_pool(function, n_workers=1, deadline_s=5.0) as there:
        for grade in (here, there):
            graded = verdicts.grade_all(grade, responses, answers, questions)
            assert [verdict.scores["reward"] for verdict in graded] == [1.0, 0.0, 0.0]
            assert [verdict.scores["reward"] for verdict in grade(responses, answers)] == [0.0] * 3
    plain = make_inline_grader(lambda response, truth: truth in response)
    assert [v.scores["reward"] for v in verdicts.grade_all(plain, responses, answers, questions)] == [1.0, 1.0, 0.0]
    own = lambda responses, answers: R1(responses, answers)  # noqa: E731
    assert len(verdicts.grade_all(own, responses, answers, questions)) == 3


def test_run_reward_gets_question_of_each_response(tmp_path):
    """In training and evaluation, each response gets its own question, whose last character is the wanted letter."""
    seen = []

    def reward(response, ground_truth, question):
        seen.append((question, response))
        return float(question[-1] in response)

    questions = [question.example.question for question in make_tiny_parts().questions]
    run_training(tmp_path, reward_fn=reward, n_grpo_steps=1)
    assert [question for question, _ in seen[:4]] == questions
    groups = dict.fromkeys(question for question, _ in seen[4:36])
    assert [question for question, _ in seen[4:36]] == [question for question in groups for _ in range(8)]
    assert {question for question, _ in seen[4:36]} == set(questions)


def test_grading_pool_usage_error_is_raised_and_pool_continues(pool):
    with pytest.raises(
        TrainingAbortedError, match=rf"--reward {FILE}:reward: returned '1.0' for .*'text': expected a finite"
    ):
        grade_with(pool, "text")
    grade_with(pool)


def test_inline_grader_equals_grading_pool():
    """This excludes rewards that would end this process."""
    deeds = ["1", "raise", "recursion", "leave", "2"]
    graded = make_inline_grader(hostile_rewards.reward)(deeds, ["1"] * 5)
    assert [verdict.status for verdict in graded] == ["parsed", "error", "error", "error", "parsed"]
    assert graded[1].detail.startswith("ValueError: invalid literal")
    graded = make_inline_grader(hostile_rewards.async_reward)(["1", "impatient"], ["1", "1"])
    assert [verdict.scores["reward"] for verdict in graded] == [1.0, None]

    def interrupted(response, truth):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_inline_grader(interrupted)(["1"], ["1"])


# --- async -----------------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_async_reward_awaits_concurrently(async_pool):
    begin = time.monotonic()
    graded = async_pool([f"{k}" for k in range(60)], ["7"] * 60)
    assert time.monotonic() - begin < 4.0  # sequentially it would be 6 s
    assert [verdict.scores for verdict in graded] == [
        {"reward": float(k == 7), "length": float(len(str(k)))} for k in range(60)
    ]


@pytest.mark.medium
@pytest.mark.parametrize(
    ("deed", "why", "detail"),
    [
        ("await", "timeout", "no grade within 0.5 s"),
        slow("swallow", "timeout", "no grade within 0.5 s"),
        slow("sleep", "timeout", "no grade within 0.5 s"),  # it blocks the event loop of its chunk
        ("exit", "error", "its process ended with exit code 3"),
        ("raise", "error", "ValueError: invalid literal for int() with base 10: 'no number'"),
        ("leave", "error", "SystemExit: 4"),
        ("impatient", "error", "TimeoutError: the judge is slow"),
    ],
)
def test_async_hostile_reward_has_its_verdict_and_others_are_graded(async_pool, deed, why, detail):
    (verdict,), seconds = grade_with(async_pool, deed, before=4, after=4)
    assert verdict == Graded({"reward": None}, why, detail)
    assert seconds < 2 * (DEADLINE + 2.0)


# --- custom rewards from the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--reward r2_zero",
            "--reward r2_zero: must be r1_zero, think_answer, question_only, countdown, gym, or your own",
        ),
        ("--reward my_module:", "--reward my_module:: must be r1_zero, think_answer"),
        ("--reward :f", "--reward :f: must be"),
        ("--reward nowhere.py:f", "--reward nowhere.py:f: no such file, nowhere.py"),
        ("--reward-mix a=1", "--reward-mix a=1: has no effect with --reward r1_zero"),
        ("--reward m:f --reward-mix a", "--reward-mix a: must be a name and a finite weight, such as format=0.2"),
        ("--reward m:f --reward-mix a=1 a=2", "--reward-mix a=2: each name must be unique"),
        ("--reward m:f --reward-mix reward=1", "not 'reward', which is the sum"),
        ("--grader-workers -1", "--grader-workers -1: must be at least 0"),
        ("--grader-deadline-s 0", "--grader-deadline-s 0.0: must be greater than 0"),
    ],
)
@pytest.mark.parametrize("program", [train_program, evaluate_program], ids=["train", "evaluate"])
def test_load_reward_invalid_spelling_raises_usage_error(program, arguments, message, capsys):
    recipe = ["--recipe", "quickstart"] if program is train_program else []
    with pytest.raises(SystemExit) as ended:
        program.main([*recipe, *arguments.split()])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{file}:not_callable", "has no function not_callable"),
        ("{file}:one_argument", "one_argument(response) must take (response, ground_truth), and may take question"),
        ("{file}:another", "another(response, ground_truth, prompt) must take (response, ground_truth), and may"),
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    ],
)
def test_load_reward_unusable_function_raises_usage_error(reward, message, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "hostile_rewards", raising=False)
    reward = reward.format(file=FILE)
    with pytest.raises(UsageError) as raised:
        load_reward(reward)
    assert str(raised.value).startswith(f"--reward {reward}: ")
    assert message in str(raised.value)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{file}:nothing", "hostile_rewards.py has no function nothing"),
        slow("{dying}:f", "its process ended with exit code 5 during its import"),
    ],
)
def test_train_unusable_reward_exits_before_model_is_loaded(tmp_path, capsys, monkeypatch, reward, message):
    """The program also leaves no run folder and no process."""
    import drivers.training.setup

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drivers.training.setup, "load_models", lambda *_, **__: pytest.fail("a model was loaded"))
    save_tiny(tmp_path / "tiny")
    (tmp_path / "dying.py").write_text("import os\nos._exit(5)\n")
    reward = reward.format(file=FILE, dying=tmp_path / "dying.py")
    with pytest.raises(SystemExit) as ended:
        train_program.main(f"--recipe quickstart --model-path tiny --engine hf --reward {reward}".split())
    assert ended.value.code == 2
    assert f"train.py: --reward {reward}: " in (shown := capsys.readouterr().err)
    assert message in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        *(
            (one, f"--reward-mix {one}: must be a name and a finite weight")
            for one in ("a=inf", "a=nan", "a", "=1", "a-b=1")
        ),
        ("a=1 a=2", "--reward-mix a=2: each name must be unique"),
        ("reward=1", "--reward-mix reward=1: each name must be unique, and not 'reward'"),
    ],
)
def test_parse_mix_invalid_entry_raises_usage_error(mix, message):
    with pytest.raises(UsageError, match=message):
        parse_mix(mix.split())


def test_config_stop_strings_follow_reward():
    assert make_tiny_config().sampling.stop == ("</answer>",)
    assert make_tiny_config(reward="question_only").sampling.stop == ()
    assert make_tiny_config(reward="my.module:f").sampling.stop == ()
    assert make_tiny_config(reward="my.module:f", sampling_stop=("END",)).sampling.stop == ("END",)
    assert make_tiny_config(sampling_stop=()).sampling.stop == ()
    assert parse_mix(("a=1", "b_2=-0.5")) == {"a": 1.0, "b_2": -0.5}
    assert formula(make_tiny_config(reward="m:f"))[0] == "r_i      = f(o_i)"
    mixed = make_tiny_config(reward="a/b.py:f", reward_mix=("x=1", "y=-0.5"))
    assert formula(mixed)[0] == "r_i      = 1 f(o_i)[x] + -0.5 f(o_i)[y]"


@pytest.mark.slow
def test_run_with_failing_custom_reward_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    (tmp_path / "mine.py").write_text(Path(FILE).read_text())
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype float32 --n-grpo-steps 3 --rollout-batch-size 32 "
        "--group-size 4 --train-batch-size 32 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        "--n-val-examples 8 --save-dir out --wandb-project None --reward mine:hanging_sometimes "
        "--reward-mix letters=1 length=-0.01 --grader-deadline-s 0.2 --grader-workers 2"
    )
    said = call_program("train", flags, capsys)
    steps = read_rows(tmp_path / "out", "train")
    assert sum(row["grader_timeouts"] for row in steps) > 0
    assert sum(row["grader_errors"] for row in steps) > 0
    for row in steps:
        assert 0 < row["unscored"] < 1
        assert row["unscored"] * 32 >= row["grader_timeouts"] + row["grader_errors"]
        assert row["part_length"] <= 4
        assert "format_reward" not in row
    assert "warning: --reward mine:hanging_sometimes: " in " ".join(said.split())
    shown = [json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]
    assert {row["why"] for row in shown} <= {"parsed", "unparsable", "timeout", "error"}
    assert all((row["reward"] is None) == (row["why"] != "parsed") for row in shown)
    flags = "--model-path out/final_model --engine hf --n-examples 8 --sampling-max-tokens 4 --reward mine.py:parts "
    flags += "--reward-mix right=1 short=0.5 --output-dir eval --dtype float32"
    call_program("evaluate", flags, capsys)
    results = json.loads((tmp_path / "eval/results.json").read_text())["results"]["validation"]
    assert results["accuracy"] == results["reward"] == results["part_right"] + 0.5 * results["part_short"]


# --- unscored is not 0 -----------------------------------------------------------------------------------------------


def compute_gradient(config, rewards, *, twin=0):
    """Return the gradient of one optimizer step; `twin` changes the tokens of unscored responses."""
    parts = make_tiny_parts()
    rollouts, _ = sample_rollouts(config, parts, rewards)
    generator = torch.Generator().manual_seed(twin)
    completions = [
        make_completion(
            one.prompt_token_ids, torch.randint(5, 60, (len(one.token_ids),), generator=generator).tolist()
        )
        if twin and rewards[row].isnan()
        else one
        for row, one in enumerate(rollouts.completions)
    ]
    rollouts = make_rollout_batch(completions, rewards, config.group_size)
    scores = [
        {"reward": r, "format_reward": 0.5 * r, "answer_reward": r} if r == r else {"reward": None}
        for r in rewards.tolist()
    ]
    reference = clone_policy(make_tiny_parts(seed=1).policy) if config.needs_reference else None
    batch = prepare_rollouts(config, parts.policy, reference, rollouts, scores, None)
    batch, _ = weigh_step(config, batch)
    metrics = UpdateMetrics()
    loss = accumulate_gradients(parts.policy, batch, config, config.entropy_coef, metrics)
    gradient = torch.cat([p.grad.flatten() for p in parts.policy.parameters() if p.grad is not None])
    return loss, gradient, batch


SIGNAL = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0] * 4)
UNSCORED = torch.zeros(32, dtype=torch.bool)
UNSCORED[[1, 3, 9, *range(16, 24)]] = True  # parts of two groups and all of a third


@pytest.mark.medium
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aggregation": "prompt_mean", "kl_coef": 0.1, "entropy_coef": 0.01},
        {"loss_type": "no_baseline", "empty_responses": "drop"},
        {"advantage": "reinforce_plus_plus", "kl_coef": 0.05, "kl_estimator": "k1", "kl_in": "reward"},
        {"advantage": "gdpo"},
        slow({"aggregation": "token_mean", "empty_responses": "drop"}),
        slow({"loss_type": "gspo", "cliprange": 0.01, "epochs_per_rollout_batch": 2}),
        slow({"loss_type": "clip_cov", "covariance_fraction": 0.3, "covariance_bounds": (0.0, 5.0)}),
        slow({"advantage": "reinforce_plus_plus_baseline"}),
        slow({"advantage": "batch_std"}),
        slow({"importance": "truncate", "self_normalize": True}),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_unscored_response_tokens_do_not_matter(settings):
    """Neither statistics nor the gradient depend on them, including the KL penalty and the entropy."""
    config = make_tiny_config(**settings)
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    loss, gradient, _ = compute_gradient(config, rewards)
    other_loss, other, _ = compute_gradient(config, rewards, twin=1)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    assert_close(other, gradient, rtol=1e-4, atol=1e-7)
    assert_close(other_loss, loss, rtol=1e-4, atol=1e-7)
    _, as_zero, _ = compute_gradient(config, SIGNAL.masked_fill(UNSCORED, 0.0))
    assert not torch.allclose(as_zero, gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("counting", "n"), [("count", 32), ("drop", 21)])
def test_step_with_unscored_equals_step_without_them(counting, n):
    """By hand: advantages of the remaining groups, weighted by their tokens, and one step of gradient descent."""
    config = make_tiny_config(empty_responses=counting)
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    _, gradient, batch = compute_gradient(config, rewards)
    scored = ~UNSCORED
    sizes = [int(part.sum()) for part in scored.view(4, 8) if part.any()]
    advantages = torch.zeros(32)
    advantages[scored] = core.normalize_group_rewards(SIGNAL[scored], sizes)
    assert_close(batch.advantages[:, 0], advantages)
    parts = make_tiny_parts()
    total = torch.zeros(())
    for one, advantage in zip(batch.completions, advantages.tolist(), strict=True):
        if advantage:
            ids = torch.tensor([*one.prompt_token_ids, *one.token_ids])
            log_probs = parts.policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            total = total - advantage * log_probs[-len(one.token_ids) :].mean() / n
    total.backward()
    by_hand = torch.cat([p.grad.flatten() for p in parts.policy.parameters() if p.grad is not None])
    assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)


def test_gdpo_unscored_parts_are_excluded():
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    _, _, batch = compute_gradient(make_tiny_config(advantage="gdpo"), rewards)
    scored = ~UNSCORED
    sizes = [int(part.sum()) for part in scored.view(4, 8) if part.any()]
    known = torch.stack([0.5 * SIGNAL[scored], SIGNAL[scored]], dim=1)
    assert_close(batch.advantages[scored, 0], core.compute_gdpo_advantages(known, sizes, advantage_eps=1e-6))


@pytest.mark.medium
def test_run_logs_unscored_responses(tmp_path):
    """If all are unscored, the step has no signal, and metrics without a meaning are absent."""

    def sometimes(response, ground_truth):
        value = 1.0 + response.count("a") + len(set(response)) / 10
        return {
            "reward": None if set(response) & set("bcdefghij") else value,
            "format_reward": 1.0,
            "answer_reward": 0.0,
        }

    _, steps, evaluations = run_training(tmp_path / "some", reward_fn=sometimes, n_grpo_steps=8, max_refills=1)
    assert all(0 < row["unscored"] < 1 for row in steps[:2])
    assert all(row["reward_min"] >= 1.0 for row in steps)  # unscored is null, not 0
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.5
    assert {"accuracy", "unscored"} <= evaluations[0].keys()
    _, steps, evaluations = run_training(
        tmp_path / "none", reward_fn=lambda *_: None, n_grpo_steps=1, length_penalty="soft_overlong"
    )
    assert (steps[0]["unscored"], steps[0]["grad_norm"], steps[0]["skipped_responses"]) == (1.0, 0.0, 32.0)
    assert not {"reward", "reward_std", "shaped_reward", "format_reward"} & steps[0].keys()
    assert not {"accuracy", "reward"} & evaluations[0].keys()
    assert evaluations[0]["unscored"] == 1.0


def test_describe_grades_counts_verdicts():
    graded = [
        Graded({"reward": 1.0, "b": 2.0, "a": 1.0}, "parsed"),
        Graded({"reward": 0.0, "a": 0.0}, "parsed"),
        Graded({"reward": None, "b": 4.0, "a": None}, "unparsable"),
        *[Graded({"reward": None}, "timeout")] * 2,
        *[Graded({"reward": None}, "error")] * 3,
        *[Graded({"reward": None}, "not_finite")] * 4,
    ]
    facts = {"unscored": 10 / 12, "grader_timeouts": 2.0, "grader_errors": 3.0, "grader_not_finite": 4.0}
    assert describe_grades(graded) == facts | {"part_a": 0.5, "part_b": 3.0}


def test_evaluation_excludes_unscored():
    """One of four questions has no scored response, another has one."""
    answers = {"r": 1.0, "w": 0.0, "?": None}
    parts, texts = make_tiny_parts(), "rw?w??rr"

    def grade(responses, truths):
        assert truths == [question.answer for question in parts.questions for _ in range(2)]
        verdicts = [answers[text] for text in responses]
        return [Graded({"reward": v} if v is None else {"reward": v, "x": 2.0}, "parsed") for v in verdicts]

    values, rows = evaluate_policy(ScriptedEngine(*texts), parts.questions, Sampling(n=2), grade, seed=0)
    assert values["accuracy"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert values["accuracy_stderr"] == pytest.approx(0.5 / 3**0.5)
    assert values["reward"] == 3 / 5
    assert (values["unscored"], values["n_examples"], values["part_x"]) == (3 / 8, 4, 2.0)
    assert "format_reward" not in values
    assert [row["reward"] for row in rows] == [answers[text] for text in texts]
    assert (rows[0]["part_x"], rows[0]["why"]) == (2.0, "parsed")
    values, _ = evaluate_policy(ScriptedEngine(*"????????"), parts.questions, Sampling(n=2), grade, seed=0)
    assert not {"accuracy", "accuracy_stderr", "reward"} & values.keys()


def test_evaluation_accuracy_uses_answer_reward():
    parts = make_tiny_parts()

    def grade(responses, truths):
        return [Graded({"reward": 5.0, "answer_reward": float(text == "r")}, "parsed") for text in responses]

    values, _ = evaluate_policy(ScriptedEngine(*"rrrw"), parts.questions, Sampling(n=1), grade, seed=0)
    assert (values["accuracy"], values["answer_reward"], values["reward"]) == (0.75, 0.75, 5.0)


def test_shape_rewards_keeps_unscored(tmp_path):
    completions = [
        make_completion([1], [4] * n, finish_reason=end) for n, end in ((2, "stop"), (6, "stop"), (8, "length"))
    ]
    scores = [{"reward": 1.0}, {"reward": None}, {"reward": None}]
    for penalty in ("none", "soft_overlong", "cosine"):
        shaped = compute_rewards(make_tiny_config(length_penalty=penalty, sampling_max_tokens=8), completions, scores)
        assert shaped.isnan().tolist() == [False, True, True]
    assert shaped[0] > 1.0  # right, because there is no answer reward and the reward is above 0
    config, parts = make_tiny_config(advantage="gdpo"), make_tiny_parts()
    rollouts, _ = sample_rollouts(config, parts)
    with pytest.raises(
        TrainingAbortedError, match="--advantage gdpo: it compares format_reward and answer_reward, but the"
    ):
        prepare_rollouts(config, parts.policy, None, rollouts, [{"reward": 1.0}] * 32, None)


def test_step_rollouts_json_keeps_unscored(tmp_path):
    config, parts = make_tiny_config(advantage="remax"), make_tiny_parts()
    run = make_run(config, tmp_path, parts.tokenizer)

    def grade(responses, truths):
        return [Graded({"reward": None if k % 3 else 0.25}, "parsed") for k, _ in enumerate(responses)]

    components = Components(parts.policy, parts.engine, grade, parts.questions, parts.questions)
    collected = collect(config, components, random.Random(0), run, 1, run.timer)
    run.finish()
    assert collected.rewards.isnan().sum() == 21
    assert collected.greedy_rewards.isnan().sum() == 2
    text = json.dumps(collected.to_json(), allow_nan=False)
    again = StepRollouts.from_json(json.loads(text))
    assert (again.scores, again.metrics) == (collected.scores, collected.metrics)
    for name in ("rewards", "greedy_rewards"):
        assert_close(getattr(again, name), getattr(collected, name), rtol=0, atol=0, equal_nan=True)


def test_grading_pool_workers_get_its_options(monkeypatch):
    started = []

    class Server:
        def __init__(self, options):
            started.append(options)

        def start_worker(self):
            started.append("worker")

    monkeypatch.setattr(pool_module, "ForkServer", Server)
    GradingPool("math:floor", ("a=0.5", "b=2"), n_workers=3, deadline_s=4.0)
    assert started == [WorkerOptions("math:floor", {"a": 0.5, "b": 2.0}, 4.0), *["worker"] * 3]


def test_grading_pool_invalid_usage_raises_before_start():
    for reward, mix, message in [("nonsense", (), "must be r1_zero"), ("no.py:f", (), "no such file")]:
        with pytest.raises(UsageError, match=message):
            GradingPool(reward, mix)
