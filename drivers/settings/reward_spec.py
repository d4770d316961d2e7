"""Check how --reward and --reward-mix are written, without importing a reward."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from drivers.common.errors import UsageError, suggest

BUILT_IN_REWARDS = ("r1_zero", "question_only", "countdown", "gym")


def parse_mix(mix: Sequence[str]) -> dict[str, float]:
    """Return the weights of `name=weight` entries by name."""
    weights = dict[str, float]()
    for entry in mix:
        name, _, weight = entry.partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (re.fullmatch(r"\w+", name) and math.isfinite(value)):
            raise UsageError(f"--reward-mix {entry}: must be a name and a finite weight, such as format=0.2")
        if name in weights or name == "reward":
            raise UsageError(f"--reward-mix {entry}: each name must be unique, and not 'reward', which is the sum")
        weights[name] = value
    return weights


def check_reward(reward: str, mix: Sequence[str] = ()) -> None:
    """Raise a UsageError if the spelling names no reward, or if the mix does not suit it."""
    weights = parse_mix(mix)
    if reward in BUILT_IN_REWARDS:
        if weights:
            raise UsageError(
                f"--reward-mix {' '.join(mix)}: has no effect with --reward {reward}, which returns one reward"
            )
        return
    module, _, function = reward.rpartition(":")
    if not module or not function.isidentifier():
        raise UsageError(
            f"--reward {reward}: must be {', '.join(BUILT_IN_REWARDS)}, or your own function as my_module:function or "
            f"path/to/file.py:function{suggest(reward, BUILT_IN_REWARDS)}"
        )


def check_file(reward: str) -> None:
    """Raise a UsageError if the file that the reward names does not exist."""
    file, _, _ = reward.rpartition(":")
    if file.endswith(".py") and not Path(file).is_file():
        raise UsageError(f"--reward {reward}: no such file, {file}")
