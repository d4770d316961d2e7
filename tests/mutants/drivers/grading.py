"""Grading: drivers/grading/."""

from tests.mutants.table import breaks

GRADING, COUNTDOWN, GYM = (f"tests/drivers/test_{name}.py" for name in ("grading", "countdown", "gym"))
VERDICTS, SOLVER, POOL = (f"drivers/grading/{name}.py" for name in ("verdicts", "countdown", "pool"))

MUTANTS = [
    *breaks(
        "describe_grades",
        "drivers/grading/summary.py",
        f"{GRADING} -k 'describe_grades or evaluation'",
        ("a 0 does not count", "if value is not None and name", "if value and name"),
        (
            "errors are time-outs",
            '"grader_timeouts": float(statuses.count(GradeStatus.TIMEOUT))',
            '"grader_timeouts": float(statuses.count(GradeStatus.ERROR))',
        ),
        (
            "what is not finite is an error",
            '"grader_errors": float(statuses.count(GradeStatus.ERROR))',
            '"grader_errors": float(statuses.count(GradeStatus.NOT_FINITE))',
        ),
        (
            "time-outs are not finite",
            '"grader_not_finite": float(statuses.count(GradeStatus.NOT_FINITE))',
            '"grader_not_finite": float(statuses.count(GradeStatus.TIMEOUT))',
        ),
        (
            "the number of unscored responses",
            "sum(not verdict.is_scored for verdict in graded) / len(graded)",
            "float(sum(not verdict.is_scored for verdict in graded))",
        ),
    ),
    *breaks(
        "read_return",
        VERDICTS,
        f"{GRADING} -k 'read_return or inline or not_finite'",
        (
            "the mix is a mean",
            "mixed = sum(weight * part for weight, part in parts if part is not None)",
            "mixed = sum(weight * part for weight, part in parts if part is not None) / len(parts)",
        ),
        ("no weights", "mixed = sum(weight * part for", "mixed = sum(part for"),
        (
            "a missing part counts as 0",
            '{"reward": None if any(part is None for _, part in parts) else mixed, **scores}',
            '{"reward": mixed, **scores}',
        ),
        (
            "infinite rewards are scored",
            "if number is not None and not abs(number) <= MAX_REWARD:",
            "if number is not None and number != number:",
        ),
    ),
    *breaks(
        "grade_all",
        VERDICTS,
        f"{GRADING} -k 'question'",
        (
            "no questions",
            "        return grade(responses, ground_truths, questions)\n",
            "        return grade(responses, ground_truths)\n",
        ),
        ("the answer is the question", "question=request.question)", "question=request.ground_truth)"),
    ),
    *breaks(
        "GradingPool",
        POOL,
        f"{GRADING} -k 'workers_get or equals_inline or first_failures'",
        (
            "grades in reverse",
            "batch.graded[worker.work.pop(grade.place)] = grade.graded",
            "batch.graded[-1 - worker.work.pop(grade.place)] = grade.graded",
        ),
        ("a warning for every failure", "if is_failure and self._n_warnings < MAX_WARNINGS:", "if is_failure:"),
        (
            "the mix is ignored",
            "WorkerOptions(reward, parse_mix(mix), deadline_s)",
            "WorkerOptions(reward, {}, deadline_s)",
        ),
        (
            "time-outs do not warn",
            "(GradeStatus.TIMEOUT, GradeStatus.ERROR, GradeStatus.NOT_FINITE)",
            "(GradeStatus.TIMEOUT,)",
        ),
    ),
    *breaks(
        "start_grading",
        POOL,
        "tests/drivers/test_flags.py -k 'grader or reward'",
        ("the mix is ignored", "        config.reward_mix,\n", "        (),\n"),
        ("one worker", "        n_workers=config.grader_workers,\n", ""),
        ("the deadline is ignored", "        deadline_s=config.grader_deadline_s,\n", ""),
    ),
    *breaks(
        "countdown_reward_fn",
        SOLVER,
        f"{COUNTDOWN} -k 'countdown and not make'",
        (
            "format earns the reward",
            '{"reward": float(is_right), "format_reward"',
            '{"reward": float(answer is not None), "format_reward"',
        ),
        ("numbers may be left out", "sorted(used) == sorted(numbers)", "set(used) <= set(numbers)"),
        ("numbers may repeat", "sorted(used) == sorted(numbers)", "set(used) == set(numbers)"),
        ("near the target", "return value == target and", "return abs(value - target) < 1 and"),
    ),
    *breaks(
        "reward",
        "drivers/grading/gym.py",
        GYM,
        ("part of the score is correct", '"answer_reward": float(score == 1)}', '"answer_reward": float(score > 0)}'),
        (
            "format earns the reward",
            '{"reward": score, "format_reward"',
            '{"reward": float(answer is not None), "format_reward"',
        ),
        ("no answer is asked too", "    if answer:\n", "    if True:\n"),
        ("a failure is right", "            score = 0.0\n", "            score = 1.0\n"),
    ),
]
