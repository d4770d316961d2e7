"""Verify Countdown answers: an expression of given numbers must reach a target. Nothing is executed.

`answer` of a data file (drivers/make_task.py writes it) is JSON text: `{"numbers": [3, 5, 7], "target": 56}`.
"""

import ast
import json
import operator
import re
from fractions import Fraction

from grpo_core import GroundTruth

MAX_CHARACTERS = 256
"""Longest expression that is parsed; it bounds the work of parsing and evaluation."""
_ALLOWED = re.compile(r"[-+*/() \t\n0-9]*")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    """Grade a response to the prompt of r1_zero or countdown: `... </think> <answer> (3 + 5) * 7 </answer>`.

    The expression is correct if it contains each given number exactly once, nothing else but +, -, *, / and
    parentheses, and equals the target exactly. Format and tags are those of `r1_zero_reward_fn`: a second `<answer>`
    makes the answer wrong.
    """
    numbers, target = read_puzzle(ground_truth)
    answer = extract_answer(response)
    is_right = answer is not None and solves(answer, numbers, target)
    return {"reward": float(is_right), "format_reward": float(answer is not None), "answer_reward": float(is_right)}


def read_puzzle(ground_truth: GroundTruth) -> tuple[list[int], int]:
    """Return numbers and target, or raise a ValueError if the `answer` of the data file is not a puzzle."""
    try:
        puzzle = json.loads(ground_truth)  # type: ignore[arg-type]
        numbers, target = puzzle["numbers"], puzzle["target"]
        if not numbers or any(type(number) is not int or number < 0 for number in numbers) or type(target) is not int:
            raise ValueError
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(
            f'ground_truth={ground_truth!r}: expected a puzzle like {{"numbers": [3, 5, 7], "target": 56}}; write '
            "the data with drivers/make_task.py countdown"
        ) from error
    return numbers, target


def extract_answer(response: str) -> str | None:
    """Return the text of `</think> <answer> ... </answer>`: None without it, empty if there is a second `<answer>`."""
    _, tag, rest = response.partition("</think> <answer>")
    answer, end, after = rest.partition("</answer>")
    if not (tag and end):
        return None
    return "" if "<answer>" in answer or "<answer>" in after else answer.strip()


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Return whether the expression contains each number exactly once and equals the target."""
    if len(expression) > MAX_CHARACTERS or not _ALLOWED.fullmatch(expression):
        return False
    # Python rejects 007, and a line break outside parentheses; both mean what they say here.
    text = _LEADING_ZEROS.sub("", " ".join(expression.split()))
    used: list[int] = []
    try:
        value = _evaluate(ast.parse(text, mode="eval").body, used)
    except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def _evaluate(tree: ast.expr, used: list[int]) -> Fraction:
    """Return the exact value and append the integers to `used`.

    Raise a ValueError for anything but integers, the four operations and parentheses: signs before numbers (`-3`) and
    implicit products (`2(3)`) are not allowed.
    """
    match tree:
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
            value: Fraction = _OPERATIONS[type(operation)](_evaluate(left, used), _evaluate(right, used))
            return value
        case ast.Constant(int(number)):
            used.append(number)
            return Fraction(number)
    raise ValueError
