"""Format and reward of worked responses; what a policy might try."""

import time

import pytest

from grpo_core.grading.rewards import question_only_reward_fn, r1_zero_reward_fn, think_answer_reward_fn

BLOCK = "Thinking. </think> <answer> {} </answer>"


def scores(format_reward, answer_reward):
    return {"reward": answer_reward, "format_reward": format_reward, "answer_reward": answer_reward}


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (" 35 + 2 = 37 </think> <answer> 37 </answer>", "37"), ("</think> <answer>37</answer>", "37"),
        ("</think> <answer>37</answer>\n", 37), (BLOCK.format("37.0"), 37),
        (BLOCK.format(r"\boxed{37}"), "37"), (BLOCK.format(r"It is $\boxed{37}$."), "37"),
        (BLOCK.format(r"\boxed{37} = \boxed{37}"), "37"), (BLOCK.format("0.5"), r"\frac{1}{2}"),
        (BLOCK.format("1/2"), 0.5), (BLOCK.format("2"), ["1", "2"]), (BLOCK.format("2"), [1, 2]),
        (BLOCK.format("0.25"), [0.5, 0.25]), (BLOCK.format("37\n"), "37"), (BLOCK.format("37") + " End.", "37"),
        ("I put it in <answer> tags. </think> <answer> 37 </answer>", "37"),
        ("<think> a </answer> b </think> <answer> 37 </answer>", "37"), (BLOCK.format(r"$\boxed{(1, 2)}$"), "(1,2)"),
        (BLOCK.format(r"\boxed{\{1,2\}}"), r"\{2,1\}"), (BLOCK.format("1,234"), 1234),
        (BLOCK.format("**37**"), "37"), (BLOCK.format("74/2"), "37"), (BLOCK.format(r"x \ge 5"), r"[5, \infty)"),
        (BLOCK.format(r"\text{Yes}"), "yes"), (BLOCK.format("The answer is 37."), "37"),
    ],
)  # fmt: skip
def test_r1_zero_right(response, gold):
    assert r1_zero_reward_fn(response, gold) == think_answer_reward_fn(response, gold) == scores(1.0, 1.0)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (BLOCK.format("38"), "37"), (BLOCK.format(""), "37"), (BLOCK.format("37 or 38"), "37"),
        (BLOCK.format("37, 38"), "37"), (BLOCK.format("The answer is not 37"), "37"),
        (BLOCK.format(r"\boxed{37} or \boxed{38}"), "37"), (BLOCK.format(r"\boxed{38} or \boxed{37}"), "37"),
        (BLOCK.format(r"37 \boxed{38}"), "37"), (BLOCK.format(r"\boxed{38} 37"), "37"),
        (BLOCK.format("38") + "<answer> 37 </answer>", "37"), (BLOCK.format("37") + "<answer> 38 </answer>", "37"),
        (BLOCK.format("37") + BLOCK.format("37"), "37"), (BLOCK.format("<answer> 37"), "37"),
        (BLOCK.format("37 <answer> 38"), "37"),
        (BLOCK.format(r"\boxed{37} <answer> 38"), "37"),
        (BLOCK.format("3"), ["1", "2"]), (BLOCK.format("1, 2"), ["1", "2"]),
        (BLOCK.format("35 + 2"), "37"), (BLOCK.format(r"\boxed{35+2}"), 37), (BLOCK.format("35 + 2 = 37"), "37"),
        (BLOCK.format("(1+1, 3)"), "(2,3)"), (BLOCK.format("5 sevenths"), "5"),
        (BLOCK.format(r"\boxed{}"), "37"), (BLOCK.format(r"\boxed{37"), "37"),
        ("37 </think> <answer> </answer>", "37"), (BLOCK.format("[1,2]"), "(1,2)"),
        (BLOCK.format("9^{9^{9^{9}}}"), "37"), (BLOCK.format("37 </think> <answer> 37"), "37"),
    ],
)  # fmt: skip
def test_r1_zero_formatted_but_wrong(response, gold):
    assert r1_zero_reward_fn(response, gold) == think_answer_reward_fn(response, gold) == scores(1.0, 0.0)


@pytest.mark.parametrize(
    "response",
    [
        "", "37", r"\boxed{37}", "<answer> 37 </answer>", "</think> 37", "</think> <answer> 37",
        "</think><answer> 37 </answer>", "</think>\n<answer> 37 </answer>", "</think>  <answer> 37 </answer>",
        "</answer> 37 </think> <answer> 37", "</think> <answer> 37 <answer>", "</THINK> <ANSWER> 37 </ANSWER>",
        "</think> <answer > 37 </answer>", "</think> answer 37 </answer>",
        "</answer> 37 <answer> </think>", "<answer> 37 </answer> </think>",
    ],
)  # fmt: skip
def test_r1_zero_without_the_format(response):
    assert r1_zero_reward_fn(response, "37") == scores(0.0, 0.0)
    is_spaced = response in SPACED
    assert think_answer_reward_fn(response, "37") == scores(float(is_spaced), float(is_spaced))


SPACED = ("</think><answer> 37 </answer>", "</think>\n<answer> 37 </answer>", "</think>  <answer> 37 </answer>")


@pytest.mark.parametrize("space", ["", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003", "\f"])
def test_think_answer_allows_white_space_between_the_tags_alone(space):
    assert think_answer_reward_fn(f"So.\n</think>{space}<answer>\n37\n</answer>", "37") == scores(1.0, 1.0)
    assert think_answer_reward_fn(f"So.\n</think>{space}<answer>\n38\n</answer>", "37") == scores(1.0, 0.0)
    assert think_answer_reward_fn(f"So.</THINK>{space}<ANSWER> 37 </answer>", "37") == scores(0.0, 0.0)
    for text in ("So:", "\u200b", "<answer", "</think", "\x00"):
        response = f"So.\n</think>{space}{text}{space}<answer> 37 </answer>"
        assert think_answer_reward_fn(response, "37") == scores(0.0, 0.0)


def test_think_answer_grades_the_first_block_after_the_reasoning():
    block = "</think>\n<answer> {} </answer>"
    two = block.format("37") + block.format("38")
    assert [think_answer_reward_fn(two, gold)["reward"] for gold in ("37", "38")] == [0.0, 0.0]
    assert think_answer_reward_fn("<answer> 38 </answer>" + block.format("37"), "37") == scores(1.0, 1.0)


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"So \boxed{37}.", "37", (1.0, 1.0)), (r"\boxed{1} then \boxed{37}", "37", (1.0, 1.0)),
        (r"\boxed{37} then \boxed{1}", "37", (1.0, 0.0)), (r"\boxed{37} or \boxed{38}", "37", (1.0, 0.0)),
        (r"\boxed{37, 38}", "37", (1.0, 0.0)), (r"\boxed{}", "37", (1.0, 0.0)), ("37", "37", (0.0, 0.0)),
        (r"\boxed{37", "37", (0.0, 0.0)), (r"\boxed{37} \boxed{3", "37", (0.0, 0.0)), ("", "37", (0.0, 0.0)),
        (r"\boxed{\frac{1}{2}}", 0.5, (1.0, 1.0)), (r"\boxed{2}", [1, 2], (1.0, 1.0)),
        (r"\boxed{1{,}200}", 1200, (1.0, 1.0)), (r"</think> <answer> 37 </answer>", "37", (0.0, 0.0)),
        (r"\boxed{35+2}", "37", (1.0, 0.0)), (r"\boxed{37} \boxed{37}", "37", (1.0, 1.0)),
        (r"\boxed{ 37 }" + "\n", "37", (1.0, 1.0)),
        (r"so $\boxed 37$", "37", (1.0, 1.0)), (r"so \boxed37.", "37", (1.0, 1.0)), (r"\boxed 38$", "37", (1.0, 0.0)),
        (r"\boxed{37}. Check: $\boxed", "37", (1.0, 1.0)), (r"\boxed{37} or \boxed 38.", "37", (1.0, 0.0)),
        (r"\boxed{37 m}", "37", (1.0, 1.0)), (r"\boxed{37}", "35+2", (1.0, 1.0)), (r"\boxed{37x}", "37", (1.0, 0.0)),
    ],
)  # fmt: skip
def test_question_only(response, gold, expected):
    assert question_only_reward_fn(response, gold) == scores(*expected)


@pytest.mark.parametrize("reward_fn", [r1_zero_reward_fn, think_answer_reward_fn, question_only_reward_fn])
@pytest.mark.parametrize("gold", ["", "  \n", [], [""], ["37", " "]])
def test_an_empty_reference_is_refused(reward_fn, gold):
    for response in (BLOCK.format("37"), r"\boxed{37}", "no format"):
        with pytest.raises(ValueError, match=r"ground_truth=.* must hold an answer"):
            reward_fn(response, gold)


@pytest.mark.parametrize("reward_fn", [r1_zero_reward_fn, think_answer_reward_fn, question_only_reward_fn])
@pytest.mark.parametrize("gold", [float("nan"), float("inf"), [1.0, float("nan")]])
def test_a_reference_must_be_finite(reward_fn, gold):
    with pytest.raises(ValueError, match=r"ground_truth=.* must be finite"):
        reward_fn("37", gold)


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "{" * 10_000,
        "9" * 1_000_000,
        r"\boxed{" * 100_000,
        "<answer>" * 100_000,
        "</think> <answer>" * 50_000,
        "</think>\n" * 50_000 + "<answer",
        "</think>" + "\n" * 1_000_000,
        r"\boxed{1}" * 100_000,
        r"\boxed " * 100_000,
        r"\boxed" + " " * 1_000_000 + "1",
        r"\boxed 1" + "1." * 500_000 + "{",
    ],
)
def test_a_hostile_response_is_refused_at_once(answer):
    for reward_fn in (r1_zero_reward_fn, think_answer_reward_fn, question_only_reward_fn):
        for response in (BLOCK.format(answer), rf"\boxed{{{answer}}}", answer):
            start = time.thread_time()
            assert reward_fn(response, "37")["reward"] == 0.0
            assert time.thread_time() - start < 5.0
