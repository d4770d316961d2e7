"""Check the spelling of --reward and --reward-mix."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from drivers.common.errors import UsageError

BUILT_IN_REWARDS = ("r1_zero", "question_only", "countdown", "gym")


def parse_mix(mix: Sequence[str]) -> dict[str, float]:
    """Weights by name, of `name=weight` each."""
    weights = dict[str, float]()
    for entry in mix:
        name, _, weight = entry.partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (re.fullmatch(r"\w+", name) and math.isfinite(value)):
            raise UsageError(f"reward_mix={entry}: a name and a finite weight are required, like format=0.2")
        if name in weights or name == "reward":
            raise UsageError(f"reward_mix={entry}: each name once is required, and none may be 'reward', their sum")
        weights[name] = value
    return weights


# --- a reward of the user's own --------------------------------------------------------------------------------------
def check_reward(reward: str, mix: Sequence[str] = ()) -> None:
    """Raise a UsageError for what cannot be one, without importing it."""
    weights = parse_mix(mix)
    if reward in BUILT_IN_REWARDS:
        if weights:
            raise UsageError(f"reward_mix={' '.join(mix)} has no effect with reward={reward}: it returns one reward")
        return
    module, _, function = reward.rpartition(":")
    if not module or not function.isidentifier():
        raise UsageError(
            f"reward={reward} must be {', '.join(BUILT_IN_REWARDS)}, or your own function: my_module:function or "
            "path/to/file.py:function"
        )


def check_file(reward: str) -> None:
    """Raise a UsageError for a file that is not there."""
    file, _, _ = reward.rpartition(":")
    if file.endswith(".py") and not Path(file).is_file():
        raise UsageError(f"--reward {reward}: no such file, {file}")
