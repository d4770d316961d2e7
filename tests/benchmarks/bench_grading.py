"""Answers graded in a second on one core: `python tests/benchmarks/bench_grading.py`."""

import time

from grpo_core.rewards import r1_zero_reward_fn

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


def main(_: list[str] | None = None) -> None:
    r1_zero_reward_fn(r"</think> <answer> \sqrt{8} </answer>", r"2\sqrt{2}")  # the imports
    for kind, forms in KINDS.items():
        print(f"{kind:>24}: {answers_per_second(forms):>8,.0f} answers/s")


if __name__ == "__main__":
    main()
