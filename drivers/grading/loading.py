"""Load the reward function that `--reward` names."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from drivers.common.errors import UsageError
from drivers.common.own_functions import import_function
from drivers.grading.countdown import countdown_reward_fn
from grpo_core import RewardFn, question_only_reward_fn, r1_zero_reward_fn, think_answer_reward_fn

BUILT_IN: dict[str, RewardFn] = {
    "r1_zero": r1_zero_reward_fn,
    "think_answer": think_answer_reward_fn,
    "question_only": question_only_reward_fn,
    "countdown": countdown_reward_fn,
}


def load_reward(reward: str) -> Callable[..., Any]:
    """Return the function that `--reward` names, or raise a UsageError if it cannot be imported or called."""
    if reward in BUILT_IN:
        return BUILT_IN[reward]
    if reward == "gym":  # its package is optional
        try:
            return importlib.import_module("drivers.grading.gym").reward  # type: ignore[no-any-return]
        except ImportError as error:
            raise UsageError(f"--reward gym: {error}") from error
    function = import_function("--reward", reward)
    try:
        signature = inspect.signature(function)
        asks = {"question": "its text"} if "question" in signature.parameters else {}
        signature.bind("response", "ground_truth", **asks)
    except TypeError as error:
        name = reward.rpartition(":")[2]
        raise UsageError(
            f"--reward {reward}: {name}{signature} must take (response, ground_truth), and may take question: {error}"
        ) from error
    except ValueError:  # of what is not written in Python, no signature is known
        pass
    return function


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether the result of `function` must be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
