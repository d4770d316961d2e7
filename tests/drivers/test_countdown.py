"""Countdown: puzzles are solvable, and the verifier agrees with a grammar and with brute force."""

import json
import random
import re
import time
import warnings
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.common.errors import UsageError
from drivers.grading.countdown import MAX_CHARACTERS, countdown_reward_fn, solves
from drivers.grading.loading import BUILT_IN
from drivers.grading.verdicts import make_inline_grader
from drivers.make_task import main
from drivers.settings.reward_spec import check_reward
from drivers.tasks.countdown import CountdownConfig, make_countdown
from drivers.tasks.questions import load_examples
from tests.drivers.helpers.letters import make_tiny_config

SMALL = CountdownConfig(n_train=150, n_validation=50)
OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else None,
}


def response(expression):
    return f" let me see </think> <answer> {expression} </answer>"


def grade(expression, numbers, target):
    return countdown_reward_fn(response(expression), json.dumps({"numbers": numbers, "target": target}))["reward"]


# --- the oracles -----------------------------------------------------------------------------------------------------


def by_recursive_descent(expression, numbers, target):
    """Evaluate an expression by the grammar sum = product {+- product}, product = atom {*/ atom}."""
    tokens, used = [*re.findall(r"[0-9]+|.", expression.replace("\n", " ").replace("\t", " ")), "end"], []
    tokens = [token for token in tokens if token != " "]

    def atom():
        token = tokens.pop(0)
        if token == "(":
            value = chain("+-", lambda: chain("*/", atom))
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        if not re.fullmatch("[0-9]+", token):
            raise ValueError
        used.append(int(token))
        return Fraction(int(token))

    def chain(signs, operand):
        value = operand()
        while tokens[0] in signs:
            value = OPERATIONS[tokens.pop(0)](value, operand())
            if value is None:
                raise ZeroDivisionError
        return value

    try:
        result = chain("+-", lambda: chain("*/", atom))
    except (ValueError, ZeroDivisionError):
        return False
    return tokens == ["end"] and result == target and sorted(used) == sorted(numbers)


def find_solutions(parts):
    """Return each reachable value with an expression, by trying all pairs and operations."""
    if len(parts) == 1:
        yield parts[0]
        return
    for i, j in combinations(range(len(parts)), 2):
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        for (left, left_text), (right, right_text) in ((parts[i], parts[j]), (parts[j], parts[i])):
            for sign, operation in OPERATIONS.items():
                value = operation(left, right)
                if value is not None:
                    yield from find_solutions([*rest, (value, f"({left_text} {sign} {right_text})")])


def reachable(numbers):
    return dict(find_solutions([(Fraction(number), str(number)) for number in numbers]))


# --- the verifier ----------------------------------------------------------------------------------------------------


def trees(depth=4):
    leaf = st.integers(0, 30)
    return st.recursive(leaf, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=2**depth)


def format_tree(tree, draw):
    """Return an expression with the needed parentheses, and sometimes with superfluous ones."""
    if isinstance(tree, int):
        return (str(tree) if draw() < 0.9 else f"({tree})"), 3, [tree]
    left, sign, right = tree
    own = 1 if sign in "+-" else 2
    texts, leaves = [], []
    for side, below in ((left, own), (right, own + 1)):  # the right side of - and / needs parentheses
        text, binds, found = format_tree(side, draw)
        texts.append(f"({text})" if binds < below or draw() < 0.1 else text)
        leaves += found
    space = " " * int(3 * draw())
    return f"{texts[0]}{space}{sign}{space}{texts[1]}", own, leaves


def evaluate_tree(tree):
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = evaluate_tree(tree[0]), evaluate_tree(tree[2])
    return None if left is None or right is None else OPERATIONS[tree[1]](left, right)


@given(trees(), st.randoms(use_true_random=False))
def test_countdown_expression_is_right_for_its_puzzle_only(tree, rng):
    text, _, leaves = format_tree(tree, rng.random)
    if len(text) > MAX_CHARACTERS:
        assert not solves(text, leaves, 1)
        return
    value = evaluate_tree(tree)
    target = int(value) if value is not None and value.denominator == 1 else 0
    assert solves(text, leaves, target) == (value == target)
    assert solves(text, rng.sample(leaves, len(leaves)), target) == (value == target)
    assert not solves(text, [*leaves, 1], target)
    assert not solves(text, leaves[1:], target)
    assert not solves(text, leaves, target + 1)
    assert by_recursive_descent(text, leaves, target) == (value == target)


PIECES = ["3", "5", "12", "+", "-", "*", "/", "(", ")", " ", "\n", "**", "//", ".", "_", "x", "٣", "３", "=", ",", "%"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.integers(-20, 200))
def test_countdown_parse_agrees_with_recursive_descent(text, target):
    used = [int(word) for word in re.findall("[0-9]+", text)]
    assert solves(text, used, target) == by_recursive_descent(text, used, target)
    try:
        with warnings.catch_warnings(action="ignore"):  # the text looks like a call
            value = eval(text, {"__builtins__": {}})  # a suitable target; the text is safe to evaluate
    except Exception:  # eval raises any error for such text
        return
    if isinstance(value, int | float) and value == int(value):
        assert solves(text, used, int(value)) == by_recursive_descent(text, used, int(value))


@given(st.text(), st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers())
def test_countdown_any_response_gets_a_grade(text, numbers, target):
    for answer in (text, response(text)):
        scores = countdown_reward_fn(answer, json.dumps({"numbers": numbers, "target": target}))
        assert set(scores) == {"reward", "format_reward", "answer_reward"}
        assert set(scores.values()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "(3 + 5) * 7 = 56",
        "56",
        "3 + 5 * 7",
        "(3 + 5) 7",
        "(3 + 5)(7)",
        "3 5 * 7",
        "(3 + 5) * 7 + 0",
        "(3 + 5) * 7 * (3 - 3 + 1)",
        "(3 + 5) * 7.0",
        "(3 + 5) * --7",
        "-(3 + 5) * -7",
        "+(3 + 5) * 7",
        "(3 + 5) × 7",
        "(3 + 5) * ７",
        "(3 + 5) * ٧",
        "(3 + 5) * 7_0 / 10",
        "(3 + 5) * 0x7",
        "((3 + 5) * 7",
        "(3 + 5) * 7)",
        ")3 + 5( * 7",
        "() (3 + 5) * 7",
        "3 + 5 // 7",
        "7 ** 5 ** 3 ** 9 ** 9",
        "9" * 200 + " * 3 + 5 * 7",
        "9" * 10**6,
        "(" * 10**5 + "3 + 5" + ")" * 10**5 + " * 7",
        "(3 + 5) * 7" + " " * 10**6 + "+ 1",
        "3 / (5 - 5) + 7",
        "7 / (3 - 3)",
        "__import__('os').system('true')",
        "[3, 5, 7]",
        "(3 + 5) * 7 </answer> <answer> 1",
        "<answer> (3 + 5) * 7",
        "(3\u00a0+ 5) * 7",
        "(3 + 5) * 7;",
        r"\boxed{(3 + 5) * 7}",
    ],
)
def test_countdown_invalid_solution_is_wrong(expression):
    begin = time.perf_counter()
    assert grade(expression, [3, 5, 7], 56) == 0.0
    assert time.perf_counter() - begin < 0.2


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("(3 + 5) * 7", [3, 5, 7], 56),
        ("7*(5+3)", [7, 3, 5], 56),
        ("\n(3 + 5)\t* 7 ", [3, 5, 7], 56),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24),  # solvable only with fractions
        ("10 - 4 - 3", [3, 4, 10], 3),  # operations associate to the left
        ("100 / 5 / 2", [2, 5, 100], 10),
        ("1 - 5", [1, 5], -4),
        ("((3))", [3], 3),
        ("0 * 5", [0, 5], 0),
        ("(3\n+ 5)\n* 007", [3, 5, 7], 56),
        ("(" * 100 + "3" + ")" * 100, [3], 3),
        ("1" + " + 1" * 60, [1] * 61, 61),
    ],
)
def test_countdown_valid_solution_is_right(expression, numbers, target):
    assert grade(expression, numbers, target) == 1.0


@pytest.mark.parametrize(
    ("expression", "numbers"), [("7 / (3 - 3)", [3, 3, 7]), ("0 / 0", [0, 0]), ("7 * (5 / 0) * 0", [7, 5, 0, 0])]
)
def test_countdown_division_by_zero_is_wrong(expression, numbers):
    assert not any(solves(expression, numbers, target) for target in (0, 1, 7))


def test_countdown_format_alone_earns_nothing():
    puzzle = json.dumps({"numbers": [3, 5, 7], "target": 56})
    assert countdown_reward_fn("(3 + 5) * 7", puzzle) == {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
    assert countdown_reward_fn(response("3"), puzzle) == {"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}


@pytest.mark.parametrize(
    "truth",
    [
        "56",
        "x",
        "{}",
        "[]",
        "null",
        '{"numbers": [], "target": 1}',
        '{"numbers": ["3"], "target": 3}',
        ["a"],
        "[" * 9999,
        '{"numbers": [3], "target": 3.5}',
        '{"numbers": [true], "target": 1}',
        '{"numbers": [-3], "target": -3}',
    ],
)
def test_countdown_invalid_ground_truth_is_named(truth):
    with pytest.raises(ValueError, match="expected a puzzle"):
        countdown_reward_fn(response("3"), truth)
    (verdict,) = make_inline_grader(BUILT_IN["countdown"])(["x"], [truth])
    assert verdict.status == "error"


def test_countdown_is_a_built_in_reward():
    check_reward("countdown")
    assert make_tiny_config(reward="countdown").sampling.stop == ("</answer>",)
    with pytest.raises(UsageError, match="which returns one reward"):
        check_reward("countdown", ["a=1"])


# --- the puzzles -----------------------------------------------------------------------------------------------------


def puzzles(rows):
    return [json.loads(row["answer"]) for row in rows]


def test_make_countdown_every_puzzle_is_solvable():
    """Brute force finds the solutions, independently of how the puzzles were made."""
    splits = make_countdown(SMALL)
    for puzzle in puzzles(random.Random(0).sample(splits["train"], 25) + splits["validation"][:15]):
        found = reachable(puzzle["numbers"])
        assert puzzle["target"] in found
        assert grade(found[puzzle["target"]], puzzle["numbers"], puzzle["target"]) == 1.0
        wrong = next(value for value in found if value != puzzle["target"])
        assert grade(found[wrong], puzzle["numbers"], puzzle["target"]) == 0.0


def test_make_countdown_splits_are_disjoint():
    splits = make_countdown(SMALL)
    kinds = {split: [tuple(sorted(puzzle["numbers"])) for puzzle in puzzles(rows)] for split, rows in splits.items()}
    assert not set(kinds["train"]) & set(kinds["validation"])
    assert [len(splits[split]) for split in ("train", "validation")] == [150, 50]
    for rows in splits.values():
        assert len({(*sorted(p["numbers"]), "to", p["target"]) for p in puzzles(rows)}) == len(rows)
        for row, puzzle in zip(rows, puzzles(rows), strict=True):
            assert all(1 <= number <= 99 for number in puzzle["numbers"])
            assert len(puzzle["numbers"]) in (3, 4)
            assert 1 <= puzzle["target"] <= 99
            words = row["question"].replace(",", "").split()
            assert sorted(map(int, filter(str.isdecimal, words))) == sorted([puzzle["target"], *puzzle["numbers"]])
    assert {len(kind) for kind in kinds["train"]} == {3, 4}


def test_make_countdown_few_number_sets_splits_are_disjoint():
    few = make_countdown(CountdownConfig(n_train=300, n_validation=40, sizes=(3,), largest_number=8))
    kinds = {split: [(tuple(sorted(p["numbers"])), p["target"]) for p in puzzles(few[split])] for split in few}
    assert not {numbers for numbers, _ in kinds["train"]} & {numbers for numbers, _ in kinds["validation"]}
    assert all(len(set(kind)) == len(kind) for kind in kinds.values())


def test_make_countdown_same_seed_gives_same_prefix():
    splits = make_countdown(SMALL)
    assert make_countdown(SMALL) == splits
    more = make_countdown(CountdownConfig(n_train=180, n_validation=50))
    assert more["train"][:150] == splits["train"]
    assert more["validation"] == splits["validation"]
    assert make_countdown(CountdownConfig(n_train=150, n_validation=50, seed=1)) != splits


def test_make_countdown_writes_files_and_rejects_invalid_flags(tmp_path, capsys):
    main(
        ["countdown", "--output-dir", str(tmp_path / "new"), "--n-train", "20", "--n-validation", "5", "--sizes", "3"]
    )
    assert "20 questions" in capsys.readouterr().out
    examples = load_examples("-", str(tmp_path / "new/train.jsonl"))
    assert len(examples) == 20
    assert all(len(json.loads(example.answer)["numbers"]) == 3 for example in examples)
    (tmp_path / "file").touch()
    few = f"--output-dir {tmp_path} --n-train 9 --n-validation 9"
    for flags, message in [
        (few + " --sizes 2 --largest-number 2", "--n-validation 9: only"),
        (few + " --sizes 1", "--sizes 1: each size must be from 2 to 8"),
        (few + " --largest-target 0", "--largest-target 0: must be greater than 0"),
        (f"--output-dir {tmp_path}/file/x --n-train 1 --n-validation 1", "cannot write"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["countdown", *flags.split()])
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.glob("*.jsonl"))
