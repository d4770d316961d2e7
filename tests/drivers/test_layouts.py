"""Layouts of public data sets: each is read as what it says, or refused with a reason. The rows are written here."""

import json
import re

import pytest

from drivers.convert_dataset import convert_demonstration, convert_row
from drivers.tasks.layouts import Option, choose, read_options
from drivers.tasks.reference_answers import BadRowError, find_stated_answer, halve_backslashes
from grpo_core import question_only_reward_fn

MADE_OF_PARTS = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "What is 2 + 6?"}]
LAYOUTS = {
    # name: row, question, answer, other columns
    "NuminaMath": (
        {"problem": "P", "solution": "so 8", "answer": "8", "question_type": "math-word-problem", "synthetic": False},
        ("P", "8", {"solution": "so 8", "question_type": "math-word-problem", "synthetic": False}),
    ),
    "Skywork: a JSON list in a text": (
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "reward_model": {"ground_truth": '["\\\\frac{1}{8}", "0.125"]'},
        },
        ("Q", [r"\frac{1}{8}", "0.125"], {}),
    ),
    "an interval is no list": ({"question": "Q", "answer": "[0, 8]"}, ("Q", "[0, 8]", {})),
    "a message in parts": (
        {"prompt": [{"role": "user", "content": MADE_OF_PARTS}], "answer": "8"},
        ("Look:\nWhat is 2 + 6?", "8", {}),
    ),
    "a solution beside a model's response": (
        {"question": "Q", "response": r"\boxed{9}", "solution": r"\boxed{8}"},
        ("Q", "8", {}),
    ),
    "MetaMathQA": (
        {"query": "Q", "response": "2 and 6 make 8. The answer is: 8", "type": "T", "original_question": None},
        ("Q", "8", {"type": "T"}),
    ),
    "ASDiv": (
        {"body": "Two cats meet six.", "question": "How many?", "answer": "8 (cats)", "formula": "2+6=8"},
        ("Two cats meet six.\nHow many?", "8 (cats)", {"formula": "2+6=8"}),
    ),
    "SVAMP": ({"Body": "B.", "Question": "Q?", "Answer": 8.0, "Type": "Sum"}, ("B.\nQ?", 8.0, {"Type": "Sum"})),
    "OlympiadBench": (
        {"context": "Let x = 8.", "question": "Q?", "final_answer": ["$8$"], "unit": "m", "error": None},
        ("Let x = 8.\nQ?", ["$8$ m"], {}),
    ),
    "OlympiadBench without a unit": (
        {"context": None, "question": "Q?", "final_answer": ["$2$,$6$"], "is_multiple_answer": True, "unit": None},
        ("Q?", ["$2$,$6$"], {"is_multiple_answer": True}),
    ),
    "a column named unit or error": (
        {"question": "Q", "answer": "8", "unit": "Unit 3", "error": "none"},
        ("Q", "8", {"unit": "Unit 3", "error": "none"}),
    ),
    "MMLU": (
        {"question": "2 + 6?", "choices": ["6", "8", "2"], "answer": 1, "subject": "S"},
        ("2 + 6?\n(A) 6\n(B) 8\n(C) 2", "(B) 8", {"subject": "S"}),
    ),
    "AQuA": (
        {"question": "2 + 6?", "options": ["A)6", "B)8"], "correct": "B", "rationale": "It is B."},
        ("2 + 6?\n(A) 6\n(B) 8", "(B) 8", {"rationale": "It is B."}),
    ),
    "GAOKAO": (
        {"question": "2 + 6?", "options": {"A": "6", "B": "8"}, "label": "B", "answer": None},
        ("2 + 6?\n(A) 6\n(B) 8", "(B) 8", {}),
    ),
    "ARC": (
        {"question": "2 + 6?", "choices": {"text": ["6", "8"], "label": ["1", "2"]}, "answerKey": "2"},
        ("2 + 6?\n(1) 6\n(2) 8", "(2) 8", {}),
    ),
    "MedQA": (
        {"question": "2 + 6?", "options": {"A": "six", "B": "eight"}, "answer": "eight", "answer_idx": "B"},
        ("2 + 6?\n(A) six\n(B) eight", "(B) eight", {}),
    ),
    "options in a text": (
        {"problem": "2 + 6?", "options": "A) 6 B) 8", "answer": "B"},
        ("2 + 6?\n(A) 6\n(B) 8", "(B) 8", {}),
    ),
    "options that the question has": (
        {"question": "2 + 6? A) 6 B) 8", "options": ["6", "8"], "answer": "8"},
        ("2 + 6? A) 6 B) 8", "(B) 8", {}),
    ),
    "options that are letters": (
        {"question": "Q?", "options": ["B", "A"], "correct": "A"},
        None,  # the letter and the text are those of different options
    ),
    "a system message": (
        {"prompt": [{"role": "system", "content": "S."}, {"role": "user", "content": "Q"}], "answer": "8"},
        ("S.\nQ", "8", {}),
    ),
    "a pass rate": ({"question": "Q", "answer": "8", "pass_rate": 0.5}, ("Q", "8", {"pass_rate": 0.5})),
    "Big-Math: doubled backslashes": (
        {"problem": "P", "answer": r"[0, \\frac{1}{8}]", "llama8b_solve_rate": 0.25},
        ("P", r"[0, \frac{1}{8}]", {"llama8b_solve_rate": 0.25}),
    ),
    "Alpaca": ({"instruction": "Add.", "input": "2, 6", "output": "8"}, ("Add.\n2, 6", "8", {})),
    "instruction and output": (
        {"instruction": "Add 2, 6.", "input": "", "output": "8"},
        ("Add 2, 6.", "8", {"input": ""}),
    ),
    "input and output": ({"input": "2 + 6?", "output": "8"}, ("2 + 6?", "8", {})),
    "messages with a reply": (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": r"So \boxed{8}."}]},
        ("Q", "8", {}),
    ),
    "messages with a ground truth": (
        {"messages": [{"role": "user", "content": "Q"}], "ground_truth": ["8"], "dataset": "D"},
        ("Q", ["8"], {"dataset": "D"}),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "so\n#### 8"}]},
        ("Q", "8", {}),
    ),
    "Open-Reasoner-Zero": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "assistant", "ground_truth": {"value": "8"}}]},
        ("Q", "8", {}),
    ),
    "Open-Reasoner-Zero with a number": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "assistant", "ground_truth": {"value": 0}}]},
        ("Q", 0, {}),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_read_or_refused(name):
    row, expected = LAYOUTS[name]
    if expected is None:
        with pytest.raises(BadRowError):
            convert_row(row)
        return
    question, answer, others = expected
    assert convert_row(row).row == {"question": question, "answer": answer} | others


REFUSED = [
    ({"question": "Q", "answer": "proof"}, "`answer` is 'proof', a mark of the data set"),
    ({"question": "Q", "answer": "NotFound."}, "`answer` is 'notfound', a mark"),
    ({"question": "Q", "solution": r"\boxed{proof}"}, "`solution` is 'proof', a mark"),
    ({"question": "Q", "answer": "Tom has 8 apples in total."}, "`answer` is prose"),
    ({"question": "Q", "answer": "first two then six more and finally all of them again"}, "`answer` is prose"),
    ({"question": "Q", "ground_truth": '{"inputs": ["1"]}'}, "`ground_truth` is a structure in a text"),
    ({"question": "Q", "ground_truth": "['8']"}, "`ground_truth` is a structure in a text"),
    ({"question": "Q", "answer": {"value": "8"}}, "`answer` is neither a text nor a number, but dict"),
    ({"question": "Q", "answer": True}, "`answer` is neither a text nor a number, but bool"),
    ({"question": "Q", "answer": [["8"]]}, "`answer` is not a list of answers"),
    ({"question": "Q", "answer": float("nan")}, "`answer` is not a finite number"),
    ({"problem": "P", "solution": r"$x = \boxed{2}$ and $y = \boxed{6}$"}, "`solution` states several answers"),
    ({"question": "Q", "final_answer": ["8"], "error": "1e-1"}, "the answer has a tolerance.*: 1e-1"),
    ({"question": "Q", "final_answer": ["2", "6"], "is_multiple_answer": True}, "a list of parts"),
    ({"question": "Q", "choices": ["2", "6"], "answer": 2}, "the answer names none of the options"),
    ({"question": "Q", "options": ["2", "1", "8"], "answer": 1}, None),
    ({"question": "Q", "options": ["0", "2", "1"], "answer": 1}, "may be the place, letter or text of different"),
    ({"question": "Q", "options": ["2", "6"], "answer": ["A", "B"]}, "the answer names no single option"),
    ({"question": "Q", "options": "two or six", "answer": "A"}, "`options` cannot be read as options"),
    ({"question": "Q", "options": "A) 2 C) 6", "answer": "A"}, "`options` cannot be read as options"),
    ({"question": "Q", "options": ["2"], "answer": "A"}, "`options` cannot be read as options"),
    ({"problem": "P", "solution": r"\boxed{\frac{1}{2}} and \boxed{\sqrt{6}}"}, "`solution` states several answers"),
    ({"question": "\n", "answer": "8"}, "`question` is empty"),
    ({"question": ["a", "b"], "answer": "8"}, "`question` is not a text"),
    ({"question": 8, "answer": "8"}, "`question` is not a text"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "8"}, "`prompt` is not a text"),
    ({"prompt": [{"role": "user", "content": "Q"}] * 2, "answer": "8"}, "several messages of the role `user`"),
    ({"prompt": [{"role": "tool", "content": "Q"}], "answer": "8"}, "a message of an unknown role: tool"),
    ({"messages": [{"role": "user", "content": "Q"}]}, "no answer under"),
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "8"}]}, "`messages` states no"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_layout_that_is_not_understood_is_refused(row, message):
    if message is None:  # the place and the text name the same option
        assert convert_row(row).row["answer"] == "(B) 1"
        return
    with pytest.raises(BadRowError, match=message) as raised:
        convert_row(row)
    assert "\n" not in str(raised.value)


def test_named_answer_key_accepts_any_text():
    """A reward of one's own may read prose or JSON, but a mark is no answer to any."""
    row = {
        "question": "Q",
        "context": "C",
        "options": ["2", "6"],
        "tests": '{"inputs": ["1"]}',
        "why": "It is so. Thus.",
    }
    assert convert_row(row, answer_key="tests").row["answer"] == row["tests"]
    assert convert_row(row, "question", "why").row["question"] == "Q"  # a named question is taken alone
    alpaca = {"instruction": "Add.", "input": "2, 6", "output": "8"}
    assert convert_row(alpaca, "instruction").row["question"] == "Add."
    with pytest.raises(BadRowError, match="a mark"):
        convert_row(row | {"why": "proof"}, answer_key="why")


def test_read_parts_are_told():
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "response": "R"}
    answered = row | {"reward_model": {"ground_truth": r"\\sqrt{8}"}, "level": 3}
    assert convert_row(answered).keys == {
        "question": "prompt",
        "system message": "prompt",
        "answer": "reward_model.ground_truth",
        "repaired backslashes": "reward_model.ground_truth",
        "nothing": "response",
    }
    assert convert_row({"Problem": "P", "FINAL_ANSWER": "8"}).keys == {"question": "Problem", "answer": "FINAL_ANSWER"}


def test_demonstration_of_a_chat_is_the_reply():
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": r"2 + 6 is \boxed{8}"}]
    for row in ({"messages": chat}, {"messages": chat, "ground_truth": "8", "prompt": "Q"}):
        converted = convert_demonstration(row, "question_only")
        assert (converted.row["response"], converted.row["answer"]) == (chat[1]["content"], "8")
        assert "prompt" not in converted.row  # sft.py would take it for the whole prompt
    alpaca = {"instruction": "Add.", "input": "2, 6", "output": "2 + 6\n#### 8"}
    assert convert_demonstration(alpaca, "question_only").row["response"] == "2 + 6\n\\boxed{8}"
    math = {"problem": "P", "answer": "8", "solution": r"\boxed{8}", "level": 1}
    assert convert_demonstration(math, "question_only").row == {
        "question": "P",
        "answer": "8",
        "level": 1,
        "response": r"\boxed{8}",
    }
    traced = {"question": "Q", "answer": "8", "response": r"\boxed{8}"}
    assert convert_demonstration(traced, "r1_zero").keys == {
        "question": "question",
        "answer": "answer",
        "worked solution": "response",
    }


@pytest.mark.parametrize(
    ("text", "halved"),
    [
        (r"\\frac{1}{8}", r"\frac{1}{8}"),
        (r"\\begin{pmatrix} 1 \\\\ 8 \\end{pmatrix}", r"\begin{pmatrix} 1 \\ 8 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 8 \end{pmatrix}", None),
        (r"\begin{pmatrix} 1 \\\sqrt{8} \end{pmatrix}", None),
        (r"\begin{pmatrix} 1 \\ab \end{pmatrix}", None),
        (r"x = 1 \\ y = 8", None),
        (r"\frac{1}{8}", None),
    ],
)
def test_doubled_backslashes_are_halved(text, halved):
    assert halve_backslashes(text) == (halved or text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 7.\n#### 8", "8"),
        (r"\boxed{7}, no: \boxed{8}", "8"),
        (r"\boxed{8} The answer is: 7", "8"),
        (r"$\boxed\frac17$, no: $\boxed\frac18$", r"\frac18"),
        ("#### 7\nThe answer is: 8", "8"),
        ("The answer is: 8.", "8"),
        ("The answer is: 7\nor 8", None),
        ("The answer is 8", None),
    ],
)
def test_stated_answer_is_found(text, answer):
    assert find_stated_answer(text) == answer


def test_options_and_their_answer_earn_the_reward():
    options = read_options("options", ["(A) 6", "(B) 8"])
    assert options == [Option("A", "6"), Option("B", "8")]
    for answer in ("B", "(b)", "8", "B) 8", "(B) 8", ["B"]):
        assert choose(answer, options, counts_from_zero=False) == options[1]
    made = convert_row({"question": "Q", "choices": ["6", "8"], "answer": 1}).row["answer"]
    for response, reward in (("B", 1), ("8", 1), ("(B) 8", 1), ("A", 0), ("(A) 8", 0)):
        assert question_only_reward_fn(f"\\boxed{{{response}}}", made)["reward"] == reward


def test_rows_survive_json():
    """Written rows can be read again, and each refusal is one line without the rest of the row."""
    for row, expected in LAYOUTS.values():
        if expected is not None:
            converted = convert_row(row).row
            assert json.loads(json.dumps(converted)) == converted
    with pytest.raises(BadRowError) as raised:
        convert_row({"question": "Q", "answer": "so " * 10_000})
    assert len(str(raised.value)) < 200
    assert not re.search(r"\s\s", str(raised.value))
