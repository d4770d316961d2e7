"""Load the reward function that `--reward` names."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError
from drivers.grading.countdown import countdown_reward_fn
from drivers.settings.reward_spec import check_file
from grpo_core import RewardFn, question_only_reward_fn, r1_zero_reward_fn

BUILT_IN: dict[str, RewardFn] = {
    "r1_zero": r1_zero_reward_fn,
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
    where, _, name = reward.rpartition(":")
    check_file(reward)
    try:
        if where.endswith(".py"):
            file = Path(where).resolve()
            sys.path.insert(0, str(file.parent))  # what lies beside it may be imported
            spec = importlib.util.spec_from_file_location(file.stem, file)
            assert spec is not None  # it is a file, and ends in .py
            assert spec.loader is not None
            module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())
            module = importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--reward {reward}: cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--reward {reward}: {module.__file__} has no function {name}")
    try:
        signature = inspect.signature(function)
        asks = {"question": "its text"} if "question" in signature.parameters else {}
        signature.bind("response", "ground_truth", **asks)
    except TypeError as error:
        raise UsageError(
            f"--reward {reward}: {name}{signature} must take (response, ground_truth), and may take question: {error}"
        ) from error
    except ValueError:  # of what is not written in Python, no signature is known
        pass
    return function  # type: ignore[no-any-return]


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether the result of `function` must be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
