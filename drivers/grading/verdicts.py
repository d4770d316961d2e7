"""Grade responses and represent the results."""

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from drivers.common.errors import TrainingAbortedError
from drivers.grading.loading import is_async
from drivers.settings.reward_spec import parse_mix
from grpo_core import GroundTruth

LARGEST = 3.4028234663852886e38
"""Of float32, which rewards are kept in."""


Why = Literal["parsed", "unparsable", "timeout", "error", "not_finite"]


class Graded(NamedTuple):
    """The verdict on one response.

    A response without a readable answer is `unparsable`, and what the reward function gives it: 0 by the built-in
    ones. One that could not be graded has the reward None, which is not 0: `timeout`, `error`, `not_finite` where a
    returned number is NaN, infinite or too large for float32, or `unparsable` where the function returned None.
    """

    scores: dict[str, float | None]
    """`reward`, and what else the function returned by name."""
    why: Why
    detail: str = ""

    @property
    def is_scored(self) -> bool:
        return self.scores["reward"] is not None


Grader = Callable[..., list[Graded]]
"""Grades of a batch of responses, in order, each against the answer in its place: `grade(responses, ground_truths)`.

Those of this file also take the texts of the questions, for rewards that ask for them: see `grade_all`.
"""


GradingRequest = tuple[str, GroundTruth, str | None]
"""A response, its answer, and the text of its question where that is known."""


def grade_all(
    grade: Grader, responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str]
) -> list[Graded]:
    """By any grader: one of your own need not know of questions."""
    if "questions" in inspect.signature(grade).parameters:
        return grade(responses, ground_truths, questions)
    return grade(responses, ground_truths)


# --- the rules: from what a function returned, or raised, to a verdict -----------------------------------------------
def make_inline_grader(reward_fn: Callable[..., Any], mix: Sequence[str] = ()) -> Grader:
    """A grader in this process: the verdicts of a `GradingPool`, without its deadline."""
    name = f"reward_fn={getattr(reward_fn, '__name__', reward_fn)}"
    with_question = taking_question(reward_fn)
    call = (lambda *asked: asyncio.run(with_question(*asked))) if is_async(reward_fn) else with_question
    weights = parse_mix(mix)

    def grade(
        responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None = None
    ) -> list[Graded]:
        return [grade_one(name, call, weights, asked) for asked in side_by_side(responses, ground_truths, questions)]

    return grade


def side_by_side(
    responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None
) -> list[GradingRequest]:
    texts: Sequence[str | None] = [None] * len(responses) if questions is None else questions
    return list(zip(responses, ground_truths, texts, strict=True))


def taking_question(reward_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same as a function of response, answer and question; it is given that if it has a parameter of that name."""
    try:
        parameter = inspect.signature(reward_fn).parameters.get("question")
    except ValueError:  # of what is not written in Python, no signature is known
        parameter = None
    if parameter is None or parameter.kind is parameter.POSITIONAL_ONLY:
        return lambda response, ground_truth, question: reward_fn(response, ground_truth)
    return lambda response, ground_truth, question: reward_fn(response, ground_truth, question=question)


def grade_one(name: str, call: Callable[..., Any], mix: Mapping[str, float], asked: GradingRequest) -> Graded:
    """The verdict of `call`, whatever it raises; an UnsoundRunError if it returns what is no reward."""
    try:
        returned = call(*asked)
    except (Exception, SystemExit) as error:
        return failed(error)
    return read_return(name, mix, asked[0], returned)


def failed(error: BaseException) -> Graded:
    """The verdict where the function raised."""
    return Graded({"reward": None}, "error", f"{type(error).__name__}: {error}"[:300])


def timeout_verdict(deadline_s: float) -> Graded:
    """The verdict where it did not come to an end."""
    return Graded({"reward": None}, "timeout", f"no grade within {deadline_s:g} s")


def not_finite(name: str, number: float) -> Graded:
    """The verdict where it returned what no reward can be."""
    return Graded({"reward": None}, "not_finite", f"{name} is {float_text(number)}: a finite number is required")


def float_text(number: float) -> str:
    """In few signs, however large."""
    return f"{number:g}" if isinstance(number, float) else "a number of too many digits"


def read_return(name: str, mix: Mapping[str, float], response: str, returned: object) -> Graded:
    """The verdict that a returned value is: a number, None, or numbers and None by name.

    A number that is not finite is no mistake of form, and may come of one response in a million: that one is not
    scored.
    """

    def refuse(required: str) -> NoReturn:
        shown = repr(returned)
        shown = shown if len(shown) <= 120 else f"{shown[:119]}…"
        raise TrainingAbortedError(f"{name}: returned {shown} for the response {response[:60]!r}: {required}")

    if returned is None:
        return Graded({"reward": None}, "unparsable", "returned None")
    scores: dict[str, float | None] = {}
    for key, value in (returned if isinstance(returned, Mapping) else {"reward": returned}).items():
        if not (isinstance(key, str) and re.fullmatch(r"\w+", key)):
            refuse(f"{key!r} must be a name of letters, digits and _")
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not (number is None or isinstance(number, int | float)):
            refuse("a finite number is required, None where the response cannot be scored, or a dict of those by name")
        if number is not None and not abs(number) <= LARGEST:
            return not_finite(key, number)
        scores[key] = None if number is None else float(number)
    if mix:
        if "reward" in scores and isinstance(returned, Mapping):
            refuse("it has a 'reward' of its own; leave that out, or --reward-mix")
        if missing := [key for key in mix if key not in scores]:
            refuse(f"a dict with {', '.join(mix)} is required, for --reward-mix; it lacks {', '.join(missing)}")
        parts = [(weight, scores[key]) for key, weight in mix.items()]
        mixed = sum(weight * part for weight, part in parts if part is not None)
        if not abs(mixed) <= LARGEST:
            return not_finite("the sum by --reward-mix", mixed)
        scores = {"reward": None if any(part is None for _, part in parts) else mixed, **scores}
    elif "reward" not in scores:
        if len(scores) != 1:
            refuse("one number is the reward: name it 'reward', or pass --reward-mix NAME=WEIGHT ...")
        scores = {"reward": next(iter(scores.values())), **scores}
    readable = scores["reward"] is not None and scores.get("format_reward") != 0
    return Graded(scores, "parsed" if readable else "unparsable")
