"""Schedules of the learning rate."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, step: int, n_steps: int, warmup_steps: int) -> float:
    """Return the share of the full learning rate at which step 1, 2, ... of `n_steps` trains.

    It rises along a line during the first `warmup_steps`, and is 1 at the next step. Then it stays there, or falls
    along a line or half a cosine, which would reach 0 one step after the last. No step has a rate of 0.
    """
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / (n_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
