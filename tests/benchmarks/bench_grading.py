"""Answers graded in a second, in this process and by a pool: `python -m tests.benchmarks grading`."""

import time
from pathlib import Path

from drivers.grading.pool import GradingPool
from drivers.grading.verdicts import Grader, make_inline_grader
from grpo_core.grading.rewards import r1_zero_reward_fn

HOSTILE = Path(__file__).resolve().parents[1] / "drivers/helpers/hostile_rewards.py"

KINDS = {
    "plain integer, right": [("{0}", "{0}")],
    "plain integer, wrong": [("{0}", "{1}")],
    "boxed integer": [(r"So it is $\boxed{{{0}}}$.", "{0}")],
    "decimal or thousands": [("{0}.0", "{0}"), (r"\${0:,}", "{0}")],
    "fraction": [(r"\frac{{{0}}}{{7}}", "{0}/7"), (r"\dfrac{{{0}}}{{7}}", r"\frac{{{1}}}{{7}}")],
    "tuple, set or interval": [(r"({0}, \infty)", r"({0},\infty)"), (r"\{{1,{0}\}}", r"\{{{0},1\}}")],
    "radical": [(r"{0}\sqrt{{8}}", r"{0} \cdot 2\sqrt{{2}}")],
    "polynomial": [("(x+{0})(x-{0})", "x^2-{0}^2")],
    "sentence, wrong": [("I think that it is {0}", "{0}")],
}


def answers_per_second(forms: list[tuple[str, str]], seconds: float = 1.0) -> float:
    """Rate over fresh answers, so that no kept reading helps."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for answer, gold in forms:
            response = f"First this, then that. </think> <answer> {answer.format(count, count + 1)} </answer>"
            r1_zero_reward_fn(response, gold.format(count, count + 1))
            count += 1
    return count / elapsed


def batch_of(n: int, first: int) -> tuple[list[str], list[str]]:
    """As a step has them: all kinds in turn, none of them seen before."""
    forms = [form for kind in KINDS.values() for form in kind]
    pairs = [forms[k % len(forms)] for k in range(n)]
    spelled = [(answer.format(k, k + 1), gold.format(k, k + 1)) for k, (answer, gold) in enumerate(pairs, first)]
    return [f"So. </think> <answer> {answer} </answer>" for answer, _ in spelled], [gold for _, gold in spelled]


def batch_rate(grade: Grader, n: int, first: int) -> float:
    responses, truths = batch_of(n, first)
    start = time.perf_counter()
    grade(responses, truths)
    return n / (time.perf_counter() - start)


def hostile_seconds(n: int, hanging: int, deadline_s: float) -> tuple[float, int]:
    """Until `n` answers are graded, of which some hang; and by how many workers."""
    with GradingPool(f"{HOSTILE}:reward", deadline_s=deadline_s, warn=lambda _: None) as pool:
        pool.load()
        responses = ["regex" if k % (n // hanging) == 0 else "1" for k in range(n)]
        start = time.perf_counter()
        graded = pool(responses, ["1"] * n)
        seconds = time.perf_counter() - start
        assert sum(verdict.status == "timeout" for verdict in graded) == hanging
        assert sum(verdict.scores["reward"] == 1.0 for verdict in graded) == n - hanging
        return seconds, len(pool._workers)


def main(_: list[str] | None = None) -> None:
    r1_zero_reward_fn(r"</think> <answer> \sqrt{8} </answer>", r"2\sqrt{2}")  # the imports
    for kind, forms in KINDS.items():
        print(f"{kind:>24}: {answers_per_second(forms):>8,.0f} answers/s")
    here = max(batch_rate(make_inline_grader(r1_zero_reward_fn), 4096, 10**6 * k) for k in range(1, 4))
    print(f"{'4,096 of all kinds':>24}: {here:>8,.0f} answers/s in this process")
    for workers in (1, 2, 4):
        start = time.perf_counter()
        with GradingPool("r1_zero", n_workers=workers) as pool:
            pool.load()
            ready = time.perf_counter() - start
            rate = max(batch_rate(pool, 4096, 10**6 * k) for k in range(4, 7))
        print(f"{'':>24}  {rate:>8,.0f} answers/s by a pool of {workers}, ready after {ready:.1f} s")
    for hanging in (1, 8):
        seconds, workers = hostile_seconds(512, hanging, deadline_s=1.0)
        print(f"{f'{hanging} of 512 hang':>24}: {seconds:.2f} s, {workers} workers, a deadline of 1 s")


if __name__ == "__main__":
    main()
