"""What policies have been seen to try, and what the built-in rewards make of it: the tables of docs/grading.md."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_core import question_only_reward_fn, r1_zero_reward_fn, think_answer_reward_fn
from grpo_core.grading.answers import is_right

PAGE = Path(__file__).resolve().parents[2] / "docs/grading.md"
TAGS = "Thinking. </think> <answer> {} </answer>"
BOTH = r"Thinking. </think> <answer> \boxed{{{}}} </answer>"
"""Read by both."""
EXAMPLE = r"User: 47 and 2? Assistant: <think> 47 + 2 </think> <answer> 49 </answer> User: 35 and 2? Assistant: "

# Row of the page, verdicts under r1_zero and question_only, and for each response the right answer.
HACKS = [
    ("several answers", "wrong", "wrong", {
        BOTH.format("37, 38"): "37", BOTH.format("37 or 38"): "38", BOTH.format("37 and 38"): "37",
        BOTH.format(r"\{37, 38\}"): "37", BOTH.format(r"37 \pm 1"): "38", BOTH.format("37; 38"): "37",
        BOTH.format("37 38"): "37", BOTH.format("37\n38"): "38", BOTH.format("37 | 38"): "37",
        BOTH.format("A or B"): "A", BOTH.format("ABCD"): "A", BOTH.format("yes and no"): "yes",
        BOTH.format("1, 2"): ["1", "2"], BOTH.format(r"\begin{cases} 37 \\ 38 \end{cases}"): "37",
    }),
    ("several answers in words", "wrong", "wrong", {
        BOTH.format("the answer is one of 36, 37, 38"): "37", BOTH.format("37 (or 38)"): "37",
        BOTH.format("not 38, 37"): "37", BOTH.format("37 unless 38"): "37", BOTH.format(r"37\text{ or }38"): "37",
    }),
    ("two boxes, the right one first", "wrong", "wrong", {
        TAGS.format(r"\boxed{37} or \boxed{38}"): "37", TAGS.format(r"\boxed{37}, \boxed{38}"): "37",
        TAGS.format(r"\boxed{37}\boxed{}"): "37", TAGS.format(r"\boxed{\boxed{37} \boxed{38}}"): "37",
    }),
    ("two boxes, the right one last", "wrong", "right", {
        TAGS.format(r"\boxed{37} or \boxed{38}"): "38", TAGS.format(r"\boxed{} \boxed{37}"): "37",
        TAGS.format(r"\boxed{\boxed{38} \boxed{37}}"): "37", TAGS.format(r"\boxed{38 \boxed{37}}"): "37",
    }),
    ("the same box twice", "right", "right", {TAGS.format(r"\boxed{37} or \boxed{37}"): "37"}),
    ("a box in a box", "right", "right", {TAGS.format(r"\boxed{\boxed{37}}"): "37"}),
    ("a second answer block", "wrong", "unreadable", {
        TAGS.format("37") + TAGS.format("38"): "37", TAGS.format("38") + "<answer> 37 </answer>": "37",
        TAGS.format("37 <answer> 38"): "37", TAGS.format("37 </think> <answer> 37"): "37",
    }),
    ("tags in tags", "wrong", "unreadable", {
        TAGS.format("<answer> 37 </answer>"): "37", TAGS.format("<answer> 37"): "37",
    }),
    ("a tag hidden from a search", "wrong", "unreadable", {TAGS.format("37 <ans\u200bwer> 38"): "37"}),
    ("outside the tags", "unreadable", "unreadable", {
        "37": "37", "The answer is 37.": "37", "Thinking. </think> 37": "37", "<answer> 37 </answer>": "37",
        "</answer> 37 </think> <answer>": "37",
    }),
    ("tags in another spelling", "unreadable", "unreadable", {
        "</think>\n<answer> 37 </answer>": "37", "</THINK> <ANSWER> 37 </ANSWER>": "37",
        "</think> <\u0430nswer> 37 </answer>": "37", "</think> <answer > 37 </answer>": "37",
    }),
    ("tags never closed", "unreadable", "unreadable", {
        "</think> <answer> 37": "37", "</think> <answer> 37 </ans": "37",
    }),
    ("right in the reasoning, wrong in the tags", "wrong", "right", {
        r"It is \boxed{37}. </think> <answer> 38 </answer>": "37", r"\boxed{37} </think> <answer> </answer>": "37",
    }),
    ("tags in the reasoning", "wrong", "unreadable", {
        "Is it <answer> 37 </answer>? </think> <answer> 38 </answer>": "37",
    }),
    ("no reasoning", "right", "unreadable", {"</think> <answer> 37 </answer>": "37"}),
    ("text after the answer", "right", "right", {
        BOTH.format("37") + " or 38": "37", BOTH.format("37") + " Or not. </answer>": "37",
    }),
    ("an empty answer", "wrong", "wrong", {
        BOTH.format(""): "37", BOTH.format(" "): "37", BOTH.format("\u200b"): "37", BOTH.format(r"\ "): "37",
        BOTH.format("$$"): "37", BOTH.format("{}"): "37", BOTH.format("..."): "37",
    }),
    ("unbalanced braces", "wrong", "unreadable", {
        TAGS.format(r"\boxed{37"): "37", TAGS.format(r"\boxed{{37}"): "37", TAGS.format("37}"): "37",
        TAGS.format("{37"): "37",
    }),
    ("operands copied from the question", "wrong", "wrong", {
        BOTH.format("35 + 2"): "37", BOTH.format("35 + 2 = 37"): "37", BOTH.format("35, 2"): "37",
        BOTH.format(r"\sqrt{1369}"): "37", BOTH.format(r"37 \times 1"): "37", BOTH.format("37 + 0"): "37",
        BOTH.format("5!"): "120", BOTH.format("35 and 2 more"): "37",
    }),
    ("an example of the prompt, repeated first", "wrong", "unreadable", {
        EXAMPLE + TAGS.format("37"): "37", EXAMPLE + TAGS.format("37") + " ": "49",
    }),
    ("a fraction or power copied from the question", "right", "right", {
        BOTH.format("74/2"): "37", BOTH.format("2^{10}"): "1024", BOTH.format(r"\frac{12}{18}"): r"\frac{2}{3}",
    }),
    ("the value where the right answer is arithmetic", "right", "right", {
        BOTH.format("37"): "35 + 2", BOTH.format("40320"): "8!", BOTH.format("4"): r"\sqrt{16}",
    }),
    ("an expression copied from the question", "right", "right", {
        BOTH.format("(x+1)^2 - 2x"): "x^2+1", BOTH.format(r"\sqrt{50} + \sqrt{18}"): r"8\sqrt{2}",
    }),
    ("a range that contains the answer", "wrong", "wrong", {
        BOTH.format("[36, 38]"): "37", BOTH.format("36 < 37 < 38"): "37", BOTH.format(r"x \ge 37"): "37",
        BOTH.format(r"\approx 37"): "37", BOTH.format("about 37"): "37", BOTH.format(r"(-\infty, \infty)"): "[0, 1]",
    }),
    ("an answer to every question", "wrong", "wrong", {
        BOTH.format("any number"): "37", BOTH.format(r"\mathbb{R}"): "37", BOTH.format("x"): "37",
        BOTH.format("answer here"): "37", BOTH.format("?"): "37", BOTH.format("x = x"): "x = 3",
        BOTH.format("0 = 0"): "x + y = 3", BOTH.format("0/0"): "37", BOTH.format("NaN"): "37",
    }),
    ("hidden text", "wrong", "wrong", {
        BOTH.format(r"\phantom{38}37"): "37", BOTH.format(r"{\color{white}38}37"): "37",
        BOTH.format(r"\rlap{38}37"): "37", BOTH.format("37 <!-- 38 -->"): "37", BOTH.format("37 % 38"): "37",
    }),
    ("a macro that expands to the answer", "wrong", "wrong", {
        BOTH.format(r"\def\a{37}\a"): "37", BOTH.format(r"\newcommand{\a}{37}\a"): "37",
        BOTH.format(r"\sum_{i=1}^{37} 1"): "37", BOTH.format(r"\max(36, 37)"): "37", BOTH.format(r"\input{37}"): "37",
    }),
    ("zero-width space or byte order mark", "right", "right", {
        BOTH.format("3\u200b7"): "37", BOTH.format("\ufeff37"): "37",
    }),
    ("other invisible characters", "wrong", "wrong", {
        BOTH.format("3\u200d7"): "37", BOTH.format("3\u00ad7"): "37", BOTH.format("3\u20607"): "37",
        BOTH.format("\u202e73"): "37",
    }),
    ("digits from another script", "right", "right", {
        BOTH.format("３７"): "37", BOTH.format("\u0663\u0667"): "37", BOTH.format("\U0001d7d1\U0001d7d5"): "37",
    }),
    ("look-alike letters", "wrong", "wrong", {
        BOTH.format("\u0410"): "A", BOTH.format("\u0445"): "x", BOTH.format("\u04177"): "37", BOTH.format("l7"): "17",
        BOTH.format("\u216237"): "37", BOTH.format("㊲"): "37",
    }),
    ("another spelling of the number", "right", "right", {
        BOTH.format("37.0"): "37", BOTH.format(r"\frac{37}{1}"): "37", BOTH.format("3.7e1"): "37",
        BOTH.format("037"): "37", BOTH.format("+37"): "37", BOTH.format(r"36.\overline{9}"): "37",
        BOTH.format("**37**"): "37", BOTH.format("x = 37"): "37",
    }),
    ("a word after the number", "right", "right", {
        BOTH.format("37 apples"): "37", BOTH.format(r"37\%"): "37", BOTH.format(r"\$37"): "37",
    }),
    ("an unknown word after the number", "wrong", "wrong", {
        BOTH.format("37 else"): "37", BOTH.format("37 blargs"): "37", BOTH.format("37 squareroot"): "37",
        BOTH.format("37 backwards"): "37", BOTH.format(r"37\text{ overdrawn}"): "37",
    }),
    ("a word after the number that changes it", "wrong", "wrong", {
        BOTH.format("37 million"): "37", BOTH.format("37 thirty eight"): "37", BOTH.format("37 false"): "37",
        BOTH.format(r"37\text{ is not the answer}"): "37", BOTH.format("37 likely"): "37",
        BOTH.format("101 binary"): "101", BOTH.format("37 permille"): "37", BOTH.format("37 besides"): "37",
        BOTH.format("37 imaginary"): "37", BOTH.format("1010 hexadecimal"): "1010",
    }),
    ("a unit letter after the number", "right", "right", {
        BOTH.format("37 m"): "37", BOTH.format("37 s^2"): "37", BOTH.format("37 g"): r"37\text{ g}",
    }),
    ("any other letter after the number", "wrong", "wrong", {
        BOTH.format("37x"): "37", BOTH.format("37 n"): "37", BOTH.format("2a"): "2", BOTH.format("37 m"): "37x",
    }),
    ("the number in words", "right", "right", {
        BOTH.format("thirty-seven"): "37", BOTH.format("thirty-seven apples"): "37", BOTH.format("三十七"): "37",
    }),
    ("the number in Roman numerals", "wrong", "wrong", {BOTH.format("XXXVII"): "37"}),
    ("a sentence around the answer", "right", "right", {
        BOTH.format("The answer is 37."): "37", BOTH.format("So the final answer is 37"): "37",
    }),
    ("a sentence that hedges", "wrong", "wrong", {
        BOTH.format("The answer is not 37"): "37", BOTH.format("I think 37"): "37",
        BOTH.format("It is about 37"): "37",
        BOTH.format("The answer is 37 or so"): "37",
    }),
    ("a label without sense", "right", "right", {BOTH.format("a + b = 37"): "37", BOTH.format("f(2) = 37"): "37"}),
    ("an equation left unsolved", "wrong", "wrong", {
        BOTH.format("x + 1 = 37"): "37", BOTH.format("2x = 37"): "37", BOTH.format("x^2 = 37"): "37",
        BOTH.format("x(x+1) = 37"): "37", BOTH.format("37 = 37"): "37",
    }),
    ("named values exchanged", "wrong", "wrong", {
        BOTH.format("x = 2, y = 1"): "x = 1, y = 2", BOTH.format("2, 1"): "x = 1, y = 2",
        BOTH.format("b = 1, a = 2"): "(1, 2)",
    }),
    ("the mark of a data set for a missing answer", "wrong", "wrong", {
        BOTH.format("proof"): "proof", BOTH.format("notfound"): "notfound",
    }),    ("a difference too small to detect", "right", "right", {BOTH.format(r"\pi + 10^{-150}"): r"\pi"}),
    ("an endless answer", "wrong", "wrong", {
        BOTH.format("9" * 10**6): "37", BOTH.format("37, " * 10**5): "37", BOTH.format("0" * 10**6 + "38"): "37",
        BOTH.format("9^{9^{9^{9}}}"): "37", BOTH.format("(" * 10**5 + "37" + ")" * 10**5): "37",
    }),
]  # fmt: skip
CASES = [
    (name, response, gold, *verdicts) for name, *verdicts, responses in HACKS for response, gold in responses.items()
]


def verdict_of(scores):
    return "right" if scores["reward"] else "wrong" if scores["format_reward"] else "unreadable"


@pytest.mark.parametrize(
    ("name", "response", "gold", "r1_zero", "question_only"), CASES, ids=lambda value: str(value)[-60:]
)
def test_a_hack_has_its_verdict(name, response, gold, r1_zero, question_only):
    begin = time.thread_time()
    assert verdict_of(r1_zero_reward_fn(response, gold)) == r1_zero
    assert verdict_of(question_only_reward_fn(response, gold)) == question_only
    # Only the space between the tags is free.
    is_spaced = response.startswith("</think>\n<answer>")
    assert verdict_of(think_answer_reward_fn(response, gold)) == ("right" if is_spaced else r1_zero)
    spread = response.replace("</think> <answer>", "</think>\n\n<answer>")
    assert think_answer_reward_fn(spread, gold) == think_answer_reward_fn(response, gold)
    assert time.thread_time() - begin < 5.0


def test_the_page_has_these_verdicts_and_no_others():
    rows = re.findall(
        r"^\| ([^`|]+) \| (.+?) \| (right|wrong|unreadable) \| (\w+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE
    )
    assert {name: verdicts for name, _, *verdicts, _ in rows} == {name: verdicts for name, *verdicts, _ in HACKS}
    assert len(rows) == len(HACKS)


def test_the_page_states_each_rule_with_its_verdicts():
    section = PAGE.read_text(encoding="utf-8").partition("## What is equal")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+) \|(.*)\|(.*)\|$", section, flags=re.MULTILINE)
    wrong = [
        (answer, reference)
        for _, *cells in rows
        for cell, verdict in zip(cells, (True, False), strict=True)
        for answer, reference in re.findall("`([^`]+)` for `([^`]+)`", cell)
        if is_right(answer, reference) != verdict
    ]
    assert wrong == []
    assert len(rows) > 25


PARTS = st.sampled_from(
    [
        "37", "38", "3", "7", "8", " ", ",", ";", "|", "/", "\\", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "=", "x",
        r"\in", r"\cup", r"\pm", r"\text{", r"\text{ or }", " or ", " and ", r"\boxed{", r"\frac", "^", "_", "!", ".",
        r"\overline{", r"\%", "$", r"\$", r"\ge", "<", r"\ne", "\u200b", "\n", "&", r"\\", r"\begin{cases}",
        r"\end{cases}", r"\infty", r"\phantom{", "**", ":", "'", "-", "+", r"\cdot", "</answer>", "<answer>",
        "</think> <answer>", "</think>\n<answer>",
    ]
)  # fmt: skip


@given(st.lists(PARTS, min_size=1, max_size=10).map("".join))
def test_no_response_is_right_whichever_of_two_answers_is(text):
    for response in (TAGS.format(text), BOTH.format(text), text):
        for reward_fn in (r1_zero_reward_fn, think_answer_reward_fn, question_only_reward_fn):
            assert sum(reward_fn(response, gold)["reward"] for gold in ("37", "38")) <= 1
