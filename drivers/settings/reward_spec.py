"""Check how --reward and --reward-mix are written, without importing a reward."""

import math
import re
from collections.abc import Sequence

from drivers.common.errors import UsageError, suggest
from drivers.common.own_functions import SPELLING, is_own

BUILT_IN_REWARDS = ("r1_zero", "think_answer", "question_only", "countdown", "gym")


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
    if not is_own(reward):
        names = ", ".join(BUILT_IN_REWARDS)
        raise UsageError(f"--reward {reward}: must be {names}, or {SPELLING}{suggest(reward, BUILT_IN_REWARDS)}")
