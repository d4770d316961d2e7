"""Verdicts on responses: call a reward function, in this process or a worker, and read what it returns."""

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn

from drivers.common.errors import TrainingAbortedError
from drivers.grading.loading import is_async
from drivers.settings.reward_spec import parse_mix
from grpo_core import GroundTruth

MAX_REWARD = 3.4028234663852886e38
"""Largest float32 number; rewards are stored as float32."""


class GradeStatus(StrEnum):
    """State of a verdict."""

    PARSED = "parsed"
    UNPARSABLE = "unparsable"
    """The response has no readable answer, or the reward function returned None."""
    TIMEOUT = "timeout"
    ERROR = "error"
    """The reward function raised, or its process ended."""
    NOT_FINITE = "not_finite"
    """The reward function returned NaN, an infinite number, or one too large for float32."""


class Graded(NamedTuple):
    """The verdict on one response.

    A response without a readable answer is `unparsable` and keeps the reward that the function gives it (0 by the
    built-in rewards). A response that could not be graded has the reward None, which is not 0.
    """

    scores: dict[str, float | None]
    """`reward`, and every other number that the function returned, by name."""
    status: GradeStatus
    detail: str = ""

    @property
    def is_scored(self) -> bool:
        return self.scores["reward"] is not None


Grader = Callable[..., list[Graded]]
"""Grade a batch of responses in order, each against the answer at its position: `grade(responses, ground_truths)`.

The graders of this package also take the texts of the questions, for rewards that use them: see `grade_all`.
"""


class GradingRequest(NamedTuple):
    """One response to grade."""

    response: str
    ground_truth: GroundTruth
    question: str | None = None


def grade_all(
    grade: Grader, responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str]
) -> list[Graded]:
    """Grade with any grader; the questions are passed only if it has a parameter for them."""
    if "questions" in inspect.signature(grade).parameters:
        return grade(responses, ground_truths, questions)
    return grade(responses, ground_truths)


def make_inline_grader(reward_fn: Callable[..., Any], mix: Sequence[str] = ()) -> Grader:
    """Return a grader that runs in this process: the verdicts of a `GradingPool`, without its deadline."""
    name = f"reward_fn={getattr(reward_fn, '__name__', reward_fn)}"
    call = bind_question(reward_fn)
    weights = parse_mix(mix)

    def grade(
        responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None = None
    ) -> list[Graded]:
        requests = make_requests(responses, ground_truths, questions)
        return [grade_one(name, run, weights, request) for request in requests]

    def run(request: GradingRequest) -> Any:
        return asyncio.run(call(request)) if is_async(reward_fn) else call(request)

    return grade


def make_requests(
    responses: Sequence[str], ground_truths: Sequence[GroundTruth], questions: Sequence[str] | None
) -> list[GradingRequest]:
    """Pair responses with their answers and questions; raise a ValueError if the lengths differ."""
    texts: Sequence[str | None] = [None] * len(responses) if questions is None else questions
    return [GradingRequest(*parts) for parts in zip(responses, ground_truths, texts, strict=True)]


def bind_question(reward_fn: Callable[..., Any]) -> Callable[[GradingRequest], Any]:
    """Return `reward_fn` as a function of a request; the question is passed if it has a parameter `question`."""
    try:
        parameter = inspect.signature(reward_fn).parameters.get("question")
    except ValueError:  # functions that are not written in Python have no signature
        parameter = None
    if parameter is None or parameter.kind is parameter.POSITIONAL_ONLY:
        return lambda request: reward_fn(request.response, request.ground_truth)
    return lambda request: reward_fn(request.response, request.ground_truth, question=request.question)


def grade_one(
    name: str, call: Callable[[GradingRequest], Any], mix: Mapping[str, float], request: GradingRequest
) -> Graded:
    """Return the verdict of one call. Raise a TrainingAbortedError if it returns something that is not a reward."""
    try:
        returned = call(request)
    except (Exception, SystemExit) as error:
        return error_verdict(error)
    return read_return(name, mix, request.response, returned)


def error_verdict(error: BaseException) -> Graded:
    """Return the verdict for a function that raised `error`."""
    return Graded({"reward": None}, GradeStatus.ERROR, f"{type(error).__name__}: {error}"[:300])


def timeout_verdict(deadline_s: float) -> Graded:
    """Return the verdict for a function that did not return in time."""
    return Graded({"reward": None}, GradeStatus.TIMEOUT, f"no grade within {deadline_s:g} s")


def not_finite_verdict(name: str, number: float) -> Graded:
    """Return the verdict for a number that cannot be a reward."""
    shown = f"{number:g}" if isinstance(number, float) else "an integer with too many digits"
    return Graded({"reward": None}, GradeStatus.NOT_FINITE, f"{name} is {shown}: a finite number is required")


def read_return(name: str, mix: Mapping[str, float], response: str, returned: object) -> Graded:
    """Return the verdict for a returned value: a number, None, or a dict of numbers and None by name.

    Raise a TrainingAbortedError for any other type, because every response would fail the same way. A number that is
    not finite may be caused by one response in a million, so only that response is not scored.
    """

    def refuse(required: str) -> NoReturn:
        shown = repr(returned)
        shown = shown if len(shown) <= 120 else f"{shown[:119]}…"
        raise TrainingAbortedError(f"{name}: returned {shown} for the response {response[:60]!r}: {required}")

    if returned is None:
        return Graded({"reward": None}, GradeStatus.UNPARSABLE, "returned None")
    scores: dict[str, float | None] = {}
    for key, value in (returned if isinstance(returned, Mapping) else {"reward": returned}).items():
        if not (isinstance(key, str) and re.fullmatch(r"\w+", key)):
            refuse(f"{key!r} must be a name of letters, digits and _")
        number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not (number is None or isinstance(number, int | float)):
            refuse("expected a finite number, None for a response that cannot be scored, or a dict of these by name")
        if number is not None and not abs(number) <= MAX_REWARD:
            return not_finite_verdict(key, number)
        scores[key] = None if number is None else float(number)
    if mix:
        if "reward" in scores and isinstance(returned, Mapping):
            refuse("the dict already has 'reward'; remove that key, or omit --reward-mix")
        if missing := [key for key in mix if key not in scores]:
            refuse(f"--reward-mix needs a dict with {', '.join(mix)}; {', '.join(missing)} is missing")
        parts = [(weight, scores[key]) for key, weight in mix.items()]
        mixed = sum(weight * part for weight, part in parts if part is not None)
        if not abs(mixed) <= MAX_REWARD:
            return not_finite_verdict("the sum of --reward-mix", mixed)
        scores = {"reward": None if any(part is None for _, part in parts) else mixed, **scores}
    elif "reward" not in scores:
        if len(scores) != 1:
            refuse("a dict of several numbers needs the key 'reward', or --reward-mix NAME=WEIGHT ...")
        scores = {"reward": next(iter(scores.values())), **scores}
    is_readable = scores["reward"] is not None and scores.get("format_reward") != 0
    return Graded(scores, GradeStatus.PARSED if is_readable else GradeStatus.UNPARSABLE)
