"""The verifier of Countdown: an expression of given numbers must come to a target. Nothing is evaluated as Python.

`answer` of a data file (drivers/make_countdown.py writes them) is JSON text: `{"numbers": [3, 5, 7], "target": 56}`.
"""

import json
import re
from fractions import Fraction

from grpo_core import GroundTruth

MAX_CHARACTERS = 256
"""Of an expression. All else is bounded by it: it is read once, and only the numbers given are ever computed with."""


_TOKEN = re.compile(r"[ \t\n]*(?:([0-9]+)|([-+*/()]))")


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def countdown_reward_fn(response: str, ground_truth: GroundTruth) -> dict[str, float]:
    """Of a response to the prompt of r1_zero or countdown: `... </think> <answer> (3 + 5) * 7 </answer>`.

    The expression is right if it has each given number exactly once, nothing but these, +, -, *, / and parentheses,
    and comes to the target exactly. Format and tags are those of `r1_zero_reward_fn`: a second `<answer>` after the
    first block began makes no answer right.
    """
    numbers, target = read_puzzle(ground_truth)
    answer = answer_of(response)
    is_right = answer is not None and solves(answer, numbers, target)
    return {"reward": float(is_right), "format_reward": float(answer is not None), "answer_reward": float(is_right)}


def read_puzzle(ground_truth: GroundTruth) -> tuple[list[int], int]:
    """Numbers and target; a ValueError where a data file has something else for an `answer`."""
    try:
        puzzle = json.loads(ground_truth)  # type: ignore[arg-type]
        numbers, target = puzzle["numbers"], puzzle["target"]
        if not numbers or any(type(number) is not int or number < 0 for number in numbers) or type(target) is not int:
            raise ValueError
    except (TypeError, ValueError, LookupError, RecursionError) as error:
        raise ValueError(
            f'ground_truth={ground_truth!r}: a puzzle is required, like {{"numbers": [3, 5, 7], "target": 56}}; '
            "drivers/make_countdown.py writes them"
        ) from error
    return numbers, target


def answer_of(response: str) -> str | None:
    """What stands in the block of `</think> <answer> ... </answer>`: None without one, empty if there are several."""
    _, tag, rest = response.partition("</think> <answer>")
    answer, end, after = rest.partition("</answer>")
    if not (tag and end):
        return None
    return "" if "<answer>" in answer or "<answer>" in after else answer.strip()


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Whether the expression has each of the numbers exactly once and comes to the target."""
    postfix = parse(expression)
    if postfix is None or sorted(part for part in postfix if isinstance(part, int)) != sorted(numbers):
        return False
    stack = list[Fraction]()
    for part in postfix:
        if isinstance(part, int):
            stack.append(Fraction(part))
            continue
        right, left = stack.pop(), stack.pop()
        if part == "/" and right == 0:
            return False
        match part:
            case "+":
                stack.append(left + right)
            case "-":
                stack.append(left - right)
            case "*":
                stack.append(left * right)
            case _:
                stack.append(left / right)
    return stack == [target]


def parse(expression: str) -> list[int | str] | None:
    """Numbers and operators in postfix order; None for what is no expression of the four operations.

    A sign before a number is none of them, nor is a number that stands beside another or before a parenthesis.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    postfix, waiting, place, awaits_value = list[int | str](), list[str](), 0, True
    expression = expression.rstrip(" \t\n")
    while place < len(expression):
        found = _TOKEN.match(expression, place)
        if found is None:
            return None
        place, (number, sign) = found.end(), found.groups()
        if number or sign == "(":
            if not awaits_value:
                return None
        elif awaits_value:
            return None
        if number:
            postfix.append(int(number))
        elif sign == "(":
            waiting.append(sign)
        elif sign == ")":
            while waiting and waiting[-1] != "(":
                postfix.append(waiting.pop())
            if not waiting:
                return None
            waiting.pop()
        else:
            while waiting and _PRECEDENCE.get(waiting[-1], 0) >= _PRECEDENCE[sign]:
                postfix.append(waiting.pop())
            waiting.append(sign)
        awaits_value = not number and sign != ")"
    if awaits_value or "(" in waiting:
        return None
    return postfix + waiting[::-1]
