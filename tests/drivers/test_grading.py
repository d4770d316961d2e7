"""Grades by killable processes: verdicts, deadlines, rewards of the user's own, and that nothing is left behind."""

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
from drivers.grading.pool import GradingPool
from drivers.grading.summary import describe_grades
from drivers.grading.verdicts import Graded, make_inline_grader
from drivers.settings.formula import formula
from drivers.settings.reward_spec import parse_mix
from drivers.settings.sampling import Sampling
from drivers.training.advantages import prepare_rollouts, shape_rewards
from drivers.training.batch import StepRollouts, make_rollout_batch
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.rollouts import collect
from drivers.training.update import accumulate_gradients
from tests.drivers import hostile_rewards
from tests.drivers.parts import clone_policy, completion, make_run, rollouts_of, tiny_config, tiny_parts
from tests.drivers.test_run_files import Scripted
from tests.drivers.test_train import run_training
from tests.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "tests/drivers/hostile_rewards.py")
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


def workers_of(pool):
    """Once all are ready: who takes another's place is listened to in the next batch."""
    while not all(worker.pid for worker in pool._workers):
        pool(["1"], ["1"])
    return {worker.pid for worker in pool._workers}


def grade_with(pool, *deeds, before=30, after=30):
    """The verdicts on `deeds`, which stand among answers that are right before them, and wrong after them."""
    begin = time.monotonic()
    graded = pool(["1"] * before + [*deeds] + ["2"] * after, ["1"] * (before + len(deeds) + after))
    others = graded[:before] + graded[before + len(deeds) :]
    assert [verdict.scores["reward"] for verdict in others] == [1.0] * before + [0.0] * after
    assert {verdict.why for verdict in others} <= {"parsed"}
    return graded[before : before + len(deeds)], time.monotonic() - begin


# --- deeds and verdicts ----------------------------------------------------------------------------------------------


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
def test_a_deed_has_its_verdict_and_all_other_answers_are_graded(pool, deed, why, detail):
    (verdict,), seconds = grade_with(pool, deed)
    assert verdict == Graded({"reward": None}, why, detail)
    assert seconds < DEADLINE + 2.0
    assert len(workers_of(pool)) == 2


def test_it_is_the_kernel_that_holds_the_deadline(pool, monkeypatch):
    """The trainer would come far later, and might be gone."""
    monkeypatch.setattr(pool_module, "GRACE_S", 60.0)
    (verdict,), seconds = grade_with(pool, "regex")
    assert verdict.why == "timeout"
    assert seconds < 20.0


def test_nobody_speaks_in_the_name_of_a_worker(pool):
    """Where it would be believed: for the first answer of a chunk, a message of the right form and no verdict."""
    (verdict,), _ = grade_with(pool, "scribble", before=0)
    assert verdict.why == "error"


def test_descriptors_are_given_back(pool):
    grade_with(pool)
    workers_of(pool)
    folders = [Path("/proc/self/fd"), Path(f"/proc/{pool._nursery.pid}/fd")]
    before = [len(list(folder.iterdir())) for folder in folders]
    pool(["exit"] * 30, ["1"] * 30)
    workers_of(pool)
    assert [len(list(folder.iterdir())) for folder in folders] == before


def test_several_hang_at_once(pool):
    """Chunks are given back, one after the other; each culprit costs one deadline of one worker."""
    verdicts, seconds = grade_with(pool, "sleep", "1", "exit", "loop", "sleep", "2", "raise", before=100)
    assert [verdict.why for verdict in verdicts] == [
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
def test_memory_that_is_filled_bit_by_bit_is_an_error():
    with open_pool(deadline_s=100.0) as pool:
        (verdict,), _ = grade_with(pool, "fill")
        assert verdict == Graded({"reward": None}, "error", "MemoryError: ")


def test_who_has_used_up_the_memory_is_replaced(pool):
    grade_with(pool)
    before = workers_of(pool)
    grade_with(pool, "raise")
    assert workers_of(pool) == before
    grade_with(pool, "allocate")
    grade_with(pool)
    assert len(before & workers_of(pool)) == 1


def test_what_a_response_has_started_ends_with_it(tmp_path):
    with open_pool(n_workers=1, deadline_s=2.0, warn=lambda _: None) as pool:  # so long may it take to start
        (verdict,) = pool([f"other: {tmp_path / 'pid'}"], ["1"])
        assert verdict.why == "timeout"
        assert_gone([int((tmp_path / "pid").read_text())], within=2.0)


def test_what_it_has_started_in_another_session_ends_too(tmp_path):
    """With the worker that is ended; and of one that goes on, with the pool."""
    with open_pool(n_workers=1, deadline_s=2.0, warn=lambda _: None) as pool:
        (verdict,) = pool([f"hanging stray: {tmp_path / 'hanging'}"], ["1"])
        assert verdict.why == "timeout"
        pids = [int(pid) for pid in (tmp_path / "hanging").read_text().split()]
        assert len(pids) == 2
        assert_gone(pids, within=2.0)
        (verdict,) = pool([f"stray: {tmp_path / 'other'}"], ["1"])
        assert verdict.scores["reward"] == 1.0
        pids = [int(pid) for pid in (tmp_path / "other").read_text().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
    assert_gone(pids, within=2.0)


def test_the_first_failures_are_told():
    told = []
    with open_pool(warn=told.append) as pool:
        grade_with(pool, *["raise"] * 2)
        grade_with(pool, *["raise"] * 2)
    assert len(told) == 3
    assert f"--reward {FILE}:reward: error (" in told[0]
    assert " for the response 'raise': it is not scored" in told[0]
    assert not any("others" in text for text in told[:2])
    assert told[2].endswith("others are not told any more, but counted in the log")


# --- a grader like any other -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_in_pool():
    with GradingPool("r1_zero", n_workers=2) as pool:
        yield pool  # the first batch waits until a worker is ready


@pytest.mark.slow
def test_many_answers_have_the_grades_that_they_have_in_this_process(built_in_pool):
    forms = ["{}", r"\boxed{{{}}}", r"\frac{{{}}}{{1}}", "so {}", "{}, or not", ""]
    responses = [f"hm </think> <answer> {forms[k % 6].format(k // 2)} </answer>" for k in range(1998)]
    responses += ["no answer", "\ud800 </think> <answer> é９\u200b </answer>"]
    truths = [str(k // 3) if k % 7 else [k // 2, str(k // 3)] for k in range(2000)]
    graded = built_in_pool(responses, truths)
    assert graded == R1(responses, truths)
    assert len({tuple(verdict.scores.values()) for verdict in graded}) == 3  # all kinds there are
    assert graded[1998] == Graded({"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}, "unparsable")
    assert built_in_pool([], []) == []
    with pytest.raises(ValueError, match="zip"):
        built_in_pool(["1"], [])


def test_an_answer_that_cannot_be_a_reference_is_an_error_and_no_end(built_in_pool):
    good, bad = built_in_pool(["</think> <answer> 1 </answer>"] * 2, ["1", ""])
    assert good.scores["reward"] == 1.0
    assert (bad.scores, bad.why) == ({"reward": None}, "error")
    assert "ground_truth='' must hold an answer" in bad.detail
    assert bad == R1(["</think> <answer> 1 </answer>"], [""])[0]


def test_threads_may_grade_even_at_once(pool):
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


def test_after_an_interrupt_the_next_batch_is_graded_right(pool, monkeypatch):
    """Answers to what nobody waits for any more are not taken for those of the next batch."""
    taken = []
    take = GradingPool._take

    def interrupted(self, worker, message, batch):
        taken.append(message)
        if len(taken) == 10:
            raise KeyboardInterrupt
        take(self, worker, message, batch)

    monkeypatch.setattr(GradingPool, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool(["1"] * 50 + ["sleep"], ["1"] * 51)
    assert [verdict.scores["reward"] for verdict in pool(["1", "2"] * 50, ["2"] * 100)] == [0.0, 1.0] * 50


def test_ctrl_c_and_sigterm_are_for_the_trainer(pool):
    grade_with(pool)
    before = workers_of(pool)
    for pid in (*before, pool._nursery.pid):
        assert os.getpgid(pid) != os.getpgrp()  # a terminal sends it to the group
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    grade_with(pool)
    assert workers_of(pool) == before


@pytest.mark.slow
def test_it_starts_anew_where_everything_was_killed(pool):
    pids = [*workers_of(pool), pool._nursery.pid]
    os.kill(pool._nursery.pid, signal.SIGKILL)
    assert_gone(pids[:-1], within=2.0)  # they do not outlive it
    grade_with(pool, "exit")
    assert not {*pids} & workers_of(pool)


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
def test_closing_ends_all_and_what_is_being_graded():
    pool = open_pool(n_workers=1, deadline_s=100.0)
    pool.load()
    pids, ended = [*workers_of(pool), pool._nursery.pid], []

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
    pool.close()  # nothing happens
    with pytest.raises(RuntimeError, match="closed"):
        pool(["1"], ["1"])


TRAINER = """
import os, sys, threading, time
from drivers.grading import GradingPool
from drivers.interrupts import terminate_as_interrupt
pool = GradingPool(sys.argv[1], n_workers=2, deadline_s=float(sys.argv[2]))
pool.load()
threading.Thread(target=pool, args=(["no alarm"] * 4, ["1"] * 4), daemon=True).start()
while not all(worker.work for worker in pool._workers):
    time.sleep(0.01)
if sys.argv[3] == "fork" and os.fork() == 0:  # a child that holds every descriptor open
    time.sleep(1000)
print(pool._nursery.pid, *[worker.pid for worker in pool._workers], flush=True)
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
def test_nothing_outlives_a_trainer_that_was_ended(number, how):
    """Not even workers that hang, with their alarm turned off and a deadline far away."""
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, f"{FILE}:reward", "1000", how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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


def test_a_pool_that_is_closed_as_it_starts_leaves_nothing():
    pool = open_pool(n_workers=3)
    begin = time.monotonic()
    pool.close()
    assert pool._nursery.returncode is not None
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
def test_a_returned_value_is_read(returned, mix, scores, why):
    (verdict,) = make_inline_grader(lambda response, truth: returned, mix)(["x"], ["1"])
    assert (verdict.scores, verdict.why) == (scores, why)
    assert next(iter(verdict.scores)) == "reward"


NUMBER = "a finite number is required, None where the response cannot be scored, or a dict of those by name"


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
        ({}, (), "one number is the reward: name it 'reward', or pass --reward-mix NAME=WEIGHT"),
        ({"a": 1, "b": 2}, (), "one number is the reward: name it 'reward', or pass --reward-mix NAME=WEIGHT"),
        ({"a": 1}, ("a=1", "b=1"), "a dict with a, b is required, for --reward-mix; it lacks b"),
        (0.5, ("a=1",), "a dict with a is required, for --reward-mix; it lacks a"),
        ({"a": 1, "reward": 1}, ("a=1",), "it has a 'reward' of its own; leave that out, or --reward-mix"),
        (list(range(1000)), (), "1, 2, 3"),
    ],
)
def test_what_is_no_reward_is_one_clear_error(returned, mix, message):
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
        (10**400, (), "reward is a number of too many digits"),
        (torch.tensor(float("nan")), (), "reward is nan"),
        ({"a": 1.0, "b": float("inf")}, ("a=1",), "b is inf"),
        ({"a": 3e38, "b": 3e38}, ("a=1", "b=1"), "the sum by --reward-mix is 6e+38"),
        ({"a": 3e38, "b": 3e38}, ("a=1e300", "b=-1e300"), "the sum by --reward-mix is nan"),
    ],
)
def test_a_number_that_is_not_finite_is_no_reward(returned, mix, detail):
    (verdict,) = make_inline_grader(lambda response, truth: returned, mix)(["x"], ["1"])
    assert verdict == Graded({"reward": None}, "not_finite", f"{detail}: a finite number is required")


def test_a_worker_tells_of_it_too(pool):
    (verdict,), _ = grade_with(pool, "nan")
    assert verdict == Graded({"reward": None}, "not_finite", "reward is nan: a finite number is required")


@pytest.mark.parametrize("function", ["about", "async_about"])
def test_a_reward_that_asks_for_the_question_gets_it(function):
    """By its name, in the pool and in this process; any other is called as ever."""
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


def test_the_question_of_each_response_is_handed_on(tmp_path):
    """In training and in evaluations, to each response its own: what is asked for is the last sign of the question."""
    seen = []

    def reward(response, ground_truth, question):
        seen.append((question, response))
        return float(question[-1] in response)

    questions = [question.example.question for question in tiny_parts().questions]
    run_training(tmp_path, reward_fn=reward, n_grpo_steps=1)
    assert [question for question, _ in seen[:4]] == questions
    groups = dict.fromkeys(question for question, _ in seen[4:36])
    assert [question for question, _ in seen[4:36]] == [question for question in groups for _ in range(8)]
    assert {question for question, _ in seen[4:36]} == set(questions)


def test_the_same_error_comes_out_of_the_pool_and_it_goes_on(pool):
    with pytest.raises(TrainingAbortedError, match=rf"--reward {FILE}:reward: returned '1.0' for .*'text': a finite"):
        grade_with(pool, "text")
    grade_with(pool)


def test_in_this_process_verdicts_are_the_same():
    """But for what cannot be survived there."""
    deeds = ["1", "raise", "recursion", "leave", "2"]
    graded = make_inline_grader(hostile_rewards.reward)(deeds, ["1"] * 5)
    assert [verdict.why for verdict in graded] == ["parsed", "error", "error", "error", "parsed"]
    assert graded[1].detail.startswith("ValueError: invalid literal")
    graded = make_inline_grader(hostile_rewards.async_reward)(["1", "impatient"], ["1", "1"])
    assert [verdict.scores["reward"] for verdict in graded] == [1.0, None]

    def interrupted(response, truth):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_inline_grader(interrupted)(["1"], ["1"])


# --- async -----------------------------------------------------------------------------------------------------------


def test_what_waits_elsewhere_waits_at_once(async_pool):
    begin = time.monotonic()
    graded = async_pool([f"{k}" for k in range(60)], ["7"] * 60)
    assert time.monotonic() - begin < 2.0  # one after the other, it would be 6
    assert [verdict.scores for verdict in graded] == [
        {"reward": float(k == 7), "length": float(len(str(k)))} for k in range(60)
    ]


@pytest.mark.parametrize(
    ("deed", "why", "detail"),
    [
        ("await", "timeout", "no grade within 0.5 s"),
        slow("swallow", "timeout", "no grade within 0.5 s"),
        slow("sleep", "timeout", "no grade within 0.5 s"),  # it blocks all that are graded with it
        ("exit", "error", "its process ended with exit code 3"),
        ("raise", "error", "ValueError: invalid literal for int() with base 10: 'no number'"),
        ("leave", "error", "SystemExit: 4"),
        ("impatient", "error", "TimeoutError: the judge is slow"),
    ],
)
def test_an_async_deed_has_its_verdict_and_all_other_answers_are_graded(async_pool, deed, why, detail):
    (verdict,), seconds = grade_with(async_pool, deed, before=4, after=4)
    assert verdict == Graded({"reward": None}, why, detail)
    assert seconds < 2 * (DEADLINE + 2.0)


# --- a reward of the user's own, from the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--reward r2_zero", "reward=r2_zero must be r1_zero, question_only, countdown, or your own function"),
        ("--reward my_module:", "reward=my_module: must be r1_zero, question_only"),
        ("--reward :f", "reward=:f must be"),
        ("--reward nowhere.py:f", "--reward nowhere.py:f: no such file, nowhere.py"),
        ("--reward-mix a=1", "reward_mix=a=1 has no effect with reward=r1_zero"),
        ("--reward m:f --reward-mix a", "reward_mix=a: a name and a finite weight are required, like format=0.2"),
        ("--reward m:f --reward-mix a=1 a=2", "reward_mix=a=2: each name once is required"),
        ("--reward m:f --reward-mix reward=1", "none may be 'reward'"),
        ("--grader-workers -1", "grader_workers=-1 must not be negative"),
        ("--grader-deadline-s 0", "grader_deadline_s=0.0 must be greater than 0"),
    ],
)
@pytest.mark.parametrize("program", [train_program, evaluate_program], ids=["train", "evaluate"])
def test_a_mistake_is_one_clear_line(program, arguments, message, capsys):
    recipe = ["--recipe", "quickstart"] if program is train_program else []
    with pytest.raises(SystemExit) as ended:
        program.main([*recipe, *arguments.split()])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{file}:nothing", "hostile_rewards.py has no function nothing"),
        slow("{file}:not_callable", "has no function not_callable"),
        slow(
            "{file}:one_argument", "one_argument(response) must take (response, ground_truth), and may take question"
        ),
        slow("{file}:another", "another(response, ground_truth, prompt) must take (response, ground_truth), and may"),
        slow("no_such_module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        slow("{dying}:f", "its process ended with exit code 5 as it was imported"),
    ],
)
def test_a_reward_that_cannot_be_had_ends_the_program_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, reward, message
):
    """And before there is a run's folder; whatever was started is gone."""
    import drivers.training.setup

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drivers.training.setup, "load_models", lambda *_: pytest.fail("a model was loaded"))
    save_tiny(tmp_path / "tiny")
    (tmp_path / "dying.py").write_text("import os\nos._exit(5)\n")
    reward = reward.format(file=FILE, dying=tmp_path / "dying.py")
    with pytest.raises(SystemExit) as ended:
        train_program.main(f"--recipe quickstart --model-path tiny --engine hf --reward {reward}".split())
    assert ended.value.code == 2
    assert f"train.py: --reward {reward}: " in (shown := capsys.readouterr().err)
    assert message in shown
    assert not (tmp_path / "runs").exists()


def test_what_stops_a_response_follows_the_reward_or_is_said():
    assert tiny_config().sampling.stop == ("</answer>",)
    assert tiny_config(reward="question_only").sampling.stop == ()
    assert tiny_config(reward="my.module:f").sampling.stop == ()
    assert tiny_config(reward="my.module:f", sampling_stop=("END",)).sampling.stop == ("END",)
    assert tiny_config(sampling_stop=()).sampling.stop == ()
    assert parse_mix(("a=1", "b_2=-0.5")) == {"a": 1.0, "b_2": -0.5}
    assert formula(tiny_config(reward="m:f"))[0] == "r_i      = f(o_i)"
    mixed = tiny_config(reward="a/b.py:f", reward_mix=("x=1", "y=-0.5"))
    assert formula(mixed)[0] == "r_i      = 1 f(o_i)[x] + -0.5 f(o_i)[y]"


@pytest.mark.slow
def test_a_run_with_a_reward_of_its_own_learns_past_what_goes_wrong(tmp_path):
    save_tiny(tmp_path / "tiny")
    (tmp_path / "mine.py").write_text(Path(FILE).read_text())
    flags = (
        "--recipe quickstart --model-path tiny --engine hf --dtype float32 --n-grpo-steps 3 --rollout-batch-size 32 "
        "--group-size 4 --train-batch-size 32 --gradient-accumulation-steps 2 --sampling-max-tokens 4 "
        "--n-val-examples 8 --save-dir out --wandb-project None --reward mine:hanging_sometimes "
        "--reward-mix letters=1 length=-0.01 --grader-deadline-s 0.2 --grader-workers 2"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "drivers/train.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "train"]
    assert sum(row["grader_timeouts"] for row in steps) > 0
    assert sum(row["grader_errors"] for row in steps) > 0
    for row in steps:
        assert 0 < row["unscored"] < 1
        assert row["unscored"] * 32 >= row["grader_timeouts"] + row["grader_errors"]
        assert row["part_length"] <= 4
        assert "format_reward" not in row
    assert "warning: --reward mine:hanging_sometimes: " in " ".join(done.stdout.split())
    shown = [json.loads(line) for line in (tmp_path / "out/completions.jsonl").read_text().splitlines()]
    assert {row["why"] for row in shown} <= {"parsed", "unparsable", "timeout", "error"}
    assert all((row["reward"] is None) == (row["why"] != "parsed") for row in shown)
    flags = "--model-path out/final_model --engine hf --n-examples 8 --sampling-max-tokens 4 --reward mine.py:parts "
    flags += "--reward-mix right=1 short=0.5 --output-dir eval --dtype float32"
    done = subprocess.run(
        [sys.executable, ROOT / "drivers/evaluate.py", *flags.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "eval/results.json").read_text())["results"]["validation"]
    assert results["accuracy"] == results["reward"] == results["part_right"] + 0.5 * results["part_short"]


# --- what is not scored is not 0 -------------------------------------------------------------------------------------


def gradient_of(config, rewards, *, twin=0):
    """Of one optimizer step on the same policy and prompts; `twin` has other tokens in the unscored responses."""
    parts = tiny_parts()
    rollouts, _ = rollouts_of(config, parts, rewards)
    generator = torch.Generator().manual_seed(twin)
    completions = [
        completion(one.prompt_token_ids, torch.randint(5, 60, (len(one.token_ids),), generator=generator).tolist())
        if twin and rewards[row].isnan()
        else one
        for row, one in enumerate(rollouts.completions)
    ]
    rollouts = make_rollout_batch(completions, rewards, config.group_size)
    scores = [
        {"reward": r, "format_reward": 0.5 * r, "answer_reward": r} if r == r else {"reward": None}
        for r in rewards.tolist()
    ]
    reference = clone_policy(tiny_parts(seed=1).policy) if config.needs_reference else None
    batch = prepare_rollouts(config, parts.policy, reference, rollouts, scores, None)
    batch, _ = weigh_step(config, batch)
    metrics = UpdateMetrics()
    loss = accumulate_gradients(parts.policy, batch, config, config.entropy_coef, metrics)
    gradient = torch.cat([p.grad.flatten() for p in parts.policy.parameters() if p.grad is not None])
    return loss, gradient, batch


SIGNAL = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0] * 4)
UNSCORED = torch.zeros(32, dtype=torch.bool)
UNSCORED[[1, 3, 9, *range(16, 24)]] = True  # some of two groups, all of a third


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
def test_what_stands_in_an_unscored_response_has_no_part_in_anything(settings):
    """Its tokens may be any others: neither statistics nor gradient notice, KL and entropy included."""
    config = tiny_config(**settings)
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    loss, gradient, _ = gradient_of(config, rewards)
    other_loss, other, _ = gradient_of(config, rewards, twin=1)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    assert_close(other, gradient, rtol=1e-4, atol=1e-7)
    assert_close(other_loss, loss, rtol=1e-4, atol=1e-7)
    _, as_zero, _ = gradient_of(config, SIGNAL.masked_fill(UNSCORED, 0.0))
    assert not torch.allclose(as_zero, gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("counting", "n"), [("count", 32), ("drop", 21)])
def test_the_step_is_that_of_the_scored_responses(counting, n):
    """By hand: advantages of the groups that are left, weighed by their tokens; a policy moved by plain descent."""
    config = tiny_config(empty_responses=counting)
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    _, gradient, batch = gradient_of(config, rewards)
    scored = ~UNSCORED
    sizes = [int(part.sum()) for part in scored.view(4, 8) if part.any()]
    advantages = torch.zeros(32)
    advantages[scored] = core.normalize_group_rewards(SIGNAL[scored], sizes)
    assert_close(batch.advantages[:, 0], advantages)
    parts = tiny_parts()
    total = torch.zeros(())
    for one, advantage in zip(batch.completions, advantages.tolist(), strict=True):
        if advantage:
            ids = torch.tensor([*one.prompt_token_ids, *one.token_ids])
            log_probs = parts.policy(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            total = total - advantage * log_probs[-len(one.token_ids) :].mean() / n
    total.backward()
    by_hand = torch.cat([p.grad.flatten() for p in parts.policy.parameters() if p.grad is not None])
    assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)


def test_each_of_several_rewards_is_compared_with_those_that_are_known():
    rewards = SIGNAL.masked_fill(UNSCORED, torch.nan)
    _, _, batch = gradient_of(tiny_config(advantage="gdpo"), rewards)
    scored = ~UNSCORED
    sizes = [int(part.sum()) for part in scored.view(4, 8) if part.any()]
    known = torch.stack([0.5 * SIGNAL[scored], SIGNAL[scored]], dim=1)
    assert_close(batch.advantages[scored, 0], core.compute_gdpo_advantages(known, sizes, advantage_eps=1e-6))


def test_a_run_counts_and_logs_what_is_not_scored(tmp_path):
    """With all of it: a step that teaches nothing, and numbers that have no meaning left out."""

    def sometimes(response, ground_truth):
        value = 1.0 + response.count("a") + len(set(response)) / 10
        return {
            "reward": None if set(response) & set("bcdefghij") else value,
            "format_reward": 1.0,
            "answer_reward": 0.0,
        }

    _, steps, evaluations = run_training(tmp_path / "some", reward_fn=sometimes, n_grpo_steps=8, max_refills=1)
    assert all(0 < row["unscored"] < 1 for row in steps[:2])
    assert all(row["reward_min"] >= 1.0 for row in steps)  # what is not scored is no 0
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.5
    assert {"accuracy", "unscored"} <= evaluations[0].keys()
    _, steps, evaluations = run_training(
        tmp_path / "none", reward_fn=lambda *_: None, n_grpo_steps=1, length_penalty="soft_overlong"
    )
    assert (steps[0]["unscored"], steps[0]["grad_norm"], steps[0]["skipped_responses"]) == (1.0, 0.0, 32.0)
    assert not {"reward", "reward_std", "shaped_reward", "format_reward"} & steps[0].keys()
    assert not {"accuracy", "reward"} & evaluations[0].keys()
    assert evaluations[0]["unscored"] == 1.0


def test_verdicts_are_counted():
    graded = [
        Graded({"reward": 1.0, "b": 2.0, "a": 1.0}, "parsed"),
        Graded({"reward": None, "b": 4.0, "a": None}, "unparsable"),
        Graded({"reward": None}, "timeout"),
        Graded({"reward": None}, "error"),
        Graded({"reward": None}, "not_finite"),
    ]
    facts = {"unscored": 0.8, "grader_timeouts": 1.0, "grader_errors": 1.0, "grader_not_finite": 1.0}
    assert describe_grades(graded) == facts | {"part_a": 1.0, "part_b": 3.0}


def test_an_evaluation_is_over_what_was_scored():
    """Of four questions one has no scored response, one a single one."""
    answers = {"r": 1.0, "w": 0.0, "?": None}
    parts, texts = tiny_parts(), "rw?w??rr"

    def grade(responses, truths):
        assert truths == [question.answer for question in parts.questions for _ in range(2)]
        verdicts = [answers[text] for text in responses]
        return [Graded({"reward": v} if v is None else {"reward": v, "x": 2.0}, "parsed") for v in verdicts]

    values, rows = evaluate_policy(Scripted(*texts), parts.questions, Sampling(n=2), grade, seed=0)
    assert values["accuracy"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert values["accuracy_stderr"] == pytest.approx(0.5 / 3**0.5)
    assert values["reward"] == 3 / 5
    assert (values["unscored"], values["n_examples"], values["part_x"]) == (3 / 8, 4, 2.0)
    assert "format_reward" not in values
    assert [row["reward"] for row in rows] == [answers[text] for text in texts]
    assert (rows[0]["part_x"], rows[0]["why"]) == (2.0, "parsed")
    values, _ = evaluate_policy(Scripted(*"????????"), parts.questions, Sampling(n=2), grade, seed=0)
    assert not {"accuracy", "accuracy_stderr", "reward"} & values.keys()


def test_an_answer_reward_decides_accuracy_where_there_is_one():
    parts = tiny_parts()

    def grade(responses, truths):
        return [Graded({"reward": 5.0, "answer_reward": float(text == "r")}, "parsed") for text in responses]

    values, _ = evaluate_policy(Scripted(*"rrrw"), parts.questions, Sampling(n=1), grade, seed=0)
    assert (values["accuracy"], values["answer_reward"], values["reward"]) == (0.75, 0.75, 5.0)


def test_shaping_keeps_what_is_not_scored(tmp_path):
    completions = [completion([1], [4] * n, finish_reason=end) for n, end in ((2, "stop"), (6, "stop"), (8, "length"))]
    scores = [{"reward": 1.0}, {"reward": None}, {"reward": None}]
    for penalty in ("none", "soft_overlong", "cosine"):
        shaped = shape_rewards(tiny_config(length_penalty=penalty, sampling_max_tokens=8), completions, scores)
        assert shaped.isnan().tolist() == [False, True, True]
    assert shaped[0] > 1.0  # right, for there is no answer reward and the reward is above 0
    config, parts = tiny_config(advantage="gdpo"), tiny_parts()
    rollouts, _ = rollouts_of(config, parts)
    with pytest.raises(
        TrainingAbortedError, match="--advantage gdpo: it compares format_reward and answer_reward, and the"
    ):
        prepare_rollouts(config, parts.policy, None, rollouts, [{"reward": 1.0}] * 32, None)


def test_a_batch_sampled_ahead_keeps_what_is_not_known(tmp_path):
    config, parts = tiny_config(advantage="remax"), tiny_parts()
    run = make_run(config, tmp_path, parts.tokenizer)

    def grade(responses, truths):
        return [Graded({"reward": None if k % 3 else 0.25}, "parsed") for k, _ in enumerate(responses)]

    collected = collect(config, parts.engine, grade, parts.questions, random.Random(0), run, 1)
    run.finish()
    assert collected.raw_rewards.isnan().sum() == 21
    assert collected.greedy_rewards.isnan().sum() == 2
    text = json.dumps(collected.to_json(), allow_nan=False)
    again = StepRollouts.from_json(json.loads(text))
    assert (again.scores, again.facts) == (collected.scores, collected.facts)
    for name in ("raw_rewards", "greedy_rewards"):
        assert_close(getattr(again, name), getattr(collected, name), rtol=0, atol=0, equal_nan=True)


def test_usage_is_checked_before_anything_is_started():
    for reward, mix, message in [("nonsense", (), "must be r1_zero"), ("no.py:f", (), "no such file")]:
        with pytest.raises(UsageError, match=message):
            GradingPool(reward, mix)
