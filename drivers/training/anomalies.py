"""Numbers that a step should not have, found before they reach the weights."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

N_NORMS = 20
"""So many gradient norms are remembered; half of them make a median."""


SPIKE = 20.0
"""A gradient norm so many times their median is one."""


MIN_ENTROPY = 0.001
"""Nats per token; below, hardly one response in a group differs from the others."""


MAX_DRIFT = 1.0
"""Nats per token that the policy may be from the one that sampled, on the responses of an update."""


MAX_LOG_RATIO = 10.0
"""Nats that it may be on a single token of them: means hide one token that is 20,000 times as likely as it was."""


class Anomaly(NamedTuple):
    """What was found, and beyond which limit."""

    kind: str
    value: float
    limit: float
    text: str

    @property
    def is_fatal(self) -> bool:
        """Not finite: it ends the run unless another choice was made."""
        return not math.isfinite(self.value)

    @property
    def is_unusable(self) -> bool:
        """No update can be made with it, whatever is asked for. Without the responses of no reward, one can."""
        return self.is_fatal and self.kind != "reward"


def check_rollouts(facts: Mapping[str, float], *, has_regularization_gradient: bool = False) -> list[Anomaly]:
    """Of what a step sampled: nothing in it teaches, or the policy has no choice left.

    `has_regularization_gradient`: a KL penalty or entropy bonus has a gradient even where every group is silent.
    """
    found = []
    bad = facts.get("grader_not_finite", 0.0)
    if bad:
        text = f"the reward of {bad:g} responses is not a finite number; they are not scored: see the reward"
        found.append(Anomaly("reward", math.nan, math.inf, text))
    if has_regularization_gradient and facts.get("zero_std_groups", 0.0) >= 1 > facts.get("unscored", 0.0):
        text = "no group has two different rewards: what pulls is the divergence or the entropy alone"
        found.append(Anomaly("all_silent", 1.0, 1.0, text))
    whole = {
        "all_unscored": ("unscored", "no response could be scored: see the reward"),
        "all_truncated": ("truncated", "every response was cut off: raise --sampling-max-tokens, or look at some"),
    }
    for kind, (name, text) in whole.items():
        if facts.get(name, 0.0) >= 1:
            found.append(Anomaly(kind, facts[name], 1.0, text))
    entropy = facts["rollout_entropy"]
    if not (entropy >= MIN_ENTROPY and math.isfinite(entropy)):
        text = f"the sampler has {entropy:.3g} nats of entropy per token, below {MIN_ENTROPY}: the policy collapsed"
        if not math.isfinite(entropy):
            text = f"the sampler's log-probs are not finite (mean {-entropy})"
        found.append(Anomaly("entropy_collapse", entropy, MIN_ENTROPY, text))
    return found


def find_none_right(n_right: int) -> list[Anomaly]:
    """Of a step that is to imitate its right responses."""
    text = "no response has a reward of 1: nothing is learned from this step. Easier questions, or more, would help"
    return [Anomaly("none_right", 0.0, 1.0, text)] if n_right == 0 else []


def check_update(
    loss: float, grad_norm: float, earlier_norms: Sequence[float], drift: Mapping[str, float]
) -> list[Anomaly]:
    """Of one optimizer step, before it is made. `drift`: distances of the policy to the one that sampled."""
    found = []
    for kind, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            found.append(Anomaly(kind, value, math.inf, f"the {kind.replace('grad_', 'gradient ')} is {value}"))
    if grad_norm == 0:
        text = "no response has a gradient: no group has two different rewards, or all that has one is left out"
        found.append(Anomaly("no_gradient", grad_norm, 0.0, text))
    if len(earlier_norms) >= N_NORMS // 2 and math.isfinite(grad_norm):
        limit = SPIKE * median(earlier_norms)
        if grad_norm > limit > 0:
            text = f"the gradient norm is {grad_norm:.3g}, {SPIKE:g} times the median of the last ones is {limit:.3g}"
            found.append(Anomaly("grad_norm_spike", grad_norm, limit, text))
    for name, value in drift.items():
        limit = MAX_LOG_RATIO if name == "max_log_ratio" else MAX_DRIFT
        if not value <= limit:
            text = f"{name} is {value:.3g}, above {limit:g} nats per token: the policy is far from what sampled"
            found.append(Anomaly(name, value, limit, text))
    return found
