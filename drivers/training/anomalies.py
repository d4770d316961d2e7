"""Detect anomalies of a step before they reach the weights, and decide what follows."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

from drivers.common.errors import TrainingAbortedError

N_NORMS = 20
"""Gradient norms that are remembered; the median needs half of them."""

SPIKE = 20.0
"""A gradient norm above this multiple of the median is a spike."""

MIN_ENTROPY = 0.001
"""Nats per token; below, almost all responses of a group are equal."""

MAX_DRIFT = 1.0
"""Nats per token between the policy and the sampler, averaged over the responses of an update."""

MAX_LOG_RATIO = 10.0
"""Nats on any single token: a mean hides one token that is 20,000 times as likely as when it was sampled."""


MIN_FORMAT, MAX_REWARD = 0.9, 0.1
"""Shares of well-formed and of correct responses that a collapse to short wrong answers has at least and at most."""

SHORT = 0.15
"""Share of the first step's mean length below which responses are collapsed. Of published runs that began with about
140 tokens, those with 13 to 17 stayed there, and one with 26 recovered."""

N_COLLAPSED = 5
"""Steps in a row after which the collapse is reported."""


class Anomaly(NamedTuple):
    """A value beyond its limit."""

    kind: str
    """One of the kinds that docs/reliability.md defines."""
    value: float
    limit: float
    text: str

    @property
    def is_fatal(self) -> bool:
        """Return whether the value is not finite, which stops the run under `--on-anomaly auto`."""
        return not math.isfinite(self.value)

    @property
    def is_unusable(self) -> bool:
        """Return whether no update can be made; after a reward that is not finite, the other responses are usable."""
        return self.is_fatal and self.kind != "reward"


def check_rollouts(metrics: Mapping[str, float], *, has_regularization_gradient: bool = False) -> list[Anomaly]:
    """Return the anomalies of sampled rollouts: no learning signal, or a sampler without entropy.

    With `has_regularization_gradient`, a KL penalty or entropy bonus has a gradient even if no group has a signal.
    """
    anomalies, counts, entropy = [], defaultdict(float, metrics), metrics["rollout_entropy"]
    if counts["grader_not_finite"]:
        text = f"the reward of {counts['grader_not_finite']:g} responses is not a finite number; they are not scored. "
        anomalies.append(Anomaly("reward", math.nan, math.inf, text + "Check the reward function"))
    if has_regularization_gradient and counts["zero_std_groups"] >= 1 > counts["unscored"]:
        text = "every group has identical rewards: only the KL/entropy term has a gradient"
        anomalies.append(Anomaly("all_silent", 1.0, 1.0, text))
    if counts["unscored"] >= 1:
        text = "no response could be scored. Check the reward function"
        anomalies.append(Anomaly("all_unscored", counts["unscored"], 1.0, text))
    if counts["truncated"] >= 1:
        text = "every response was truncated. Raise --sampling-max-tokens, or read some completions"
        anomalies.append(Anomaly("all_truncated", counts["truncated"], 1.0, text))
    if not MIN_ENTROPY <= entropy < math.inf:
        text = f"the sampler's entropy is {entropy:.3g} nats per token, below {MIN_ENTROPY}: the policy collapsed"
        if not math.isfinite(entropy):
            text = f"the sampler's log-probs are not finite (mean {-entropy})"
        anomalies.append(Anomaly("entropy_collapse", entropy, MIN_ENTROPY, text))
    return anomalies


@dataclass
class CollapseWatch:
    """Notices responses that became short, well-formed and wrong, over several steps. It is part of the state."""

    first_tokens: float | None = None
    """Mean length of the responses of the first step."""
    n_steps: int = 0
    """Steps in a row whose responses are so."""

    def check(self, metrics: Mapping[str, float]) -> list[Anomaly]:
        """Return an anomaly if the responses of this step and of those before it are collapsed."""
        tokens, first = metrics["response_tokens"], self.first_tokens
        self.first_tokens = first = tokens if first is None else first
        well_formed, reward = (
            metrics.get("format_reward", 0.0),
            metrics.get("answer_reward", metrics.get("reward", 1.0)),
        )
        is_collapsed = well_formed >= MIN_FORMAT and reward <= MAX_REWARD and tokens < SHORT * first
        self.n_steps = self.n_steps + 1 if is_collapsed else 0
        if self.n_steps < N_COLLAPSED:
            return []
        text = (
            f"the policy collapsed to short wrong answers: {well_formed:.0%} of the responses are well-formed, "
            f"{reward:.0%} are right, and they have {tokens:.0f} tokens instead of {first:.0f} in the first step. "
            "Start again with --warmup-steps, a lower --learning-rate, --loss-type grpo_clip or another --seed"
        )
        return [Anomaly("length_collapse", tokens, SHORT * first, text)]


def check_right_responses(n_right: int) -> list[Anomaly]:
    """Return an anomaly if a step of expert iteration has no correct response to imitate."""
    if n_right > 0:
        return []
    text = "no response is correct, so this step has no gradient; try easier or more questions"
    return [Anomaly("none_right", 0.0, 1.0, text)]


def explain_missing_gradient(rewards: Sequence[float]) -> str:
    """Return why responses with these rewards have no gradient, and what helps if all rewards are equal."""
    scored = {reward for reward in rewards if not math.isnan(reward)}
    if len(scored) != 1:
        return "every group has identical rewards, or filters exclude all other groups"
    (reward,) = scored
    if reward > 0:
        return f"every response has the reward {reward:g}. Use harder questions"
    return (
        f"every response has the reward {reward:g}. If this lasts, read completions.jsonl: if the format is missing, "
        "fine-tune first (sft.py); if the answers are wrong, use easier questions"
    )


def check_update(
    loss: float,
    grad_norm: float,
    earlier_norms: Sequence[float],
    drift: Mapping[str, float],
    rewards: Sequence[float] = (),
    *,
    is_overflow: bool = False,
) -> list[Anomaly]:
    """Return the anomalies of an optimizer step before it is made.

    `drift` maps names of distances between the policy and the sampler to their values; `rewards` are those of the
    responses. With `is_overflow`, the loss scale explains a norm that is not finite, which is then no anomaly.
    """
    anomalies = []
    if not math.isfinite(loss):
        anomalies.append(Anomaly("loss", loss, math.inf, f"the loss is {loss}"))
    if not math.isfinite(grad_norm) and not is_overflow:
        anomalies.append(Anomaly("grad_norm", grad_norm, math.inf, f"the gradient norm is {grad_norm}"))
    if grad_norm == 0:
        text = f"no response has a gradient: {explain_missing_gradient(rewards)}"
        anomalies.append(Anomaly("no_gradient", grad_norm, 0.0, text))
    limit = SPIKE * median(earlier_norms) if len(earlier_norms) >= N_NORMS // 2 else math.inf
    if math.inf > grad_norm > limit > 0:
        text = f"the gradient norm is {grad_norm:.3g}, above {limit:.3g}: {SPIKE:g} times the median of recent steps"
        anomalies.append(Anomaly("grad_norm_spike", grad_norm, limit, text))
    for name, value in drift.items():
        limit = MAX_LOG_RATIO if name == "max_log_ratio" else MAX_DRIFT
        if not value <= limit:
            text = f"{name} is {value:.3g} nats per token, above {limit:g}: the policy is far from the sampler"
            anomalies.append(Anomaly(name, value, limit, text))
    return anomalies


class AnomalyPolicy:
    """Applies `--on-anomaly`: logs every anomaly, warns once while it lasts, and stops, skips or continues."""

    def __init__(
        self,
        on_anomaly: Literal["auto", "stop", "skip", "warn"],
        log: Callable[[str, int, Mapping[str, Any]], None],
        warn: Callable[[str], None],
    ) -> None:
        self._choice, self._log, self._warn = on_anomaly, log, warn
        self._seen: set[tuple[int, str]] = set()

    def should_apply_update(self, step: int, anomalies: Sequence[Anomaly]) -> bool:
        """Return whether to make the update, or raise a TrainingAbortedError."""
        for anomaly in anomalies:
            if (step, anomaly.kind) not in self._seen:
                self._log("anomaly", step, anomaly._asdict())
                if (step - 1, anomaly.kind) not in self._seen:
                    self._warn(f"step {step}: {anomaly.text}")
            self._seen.add((step, anomaly.kind))
        for anomaly in anomalies:
            if self._choice == "stop" or (self._choice == "auto" and anomaly.is_fatal):
                raise TrainingAbortedError(
                    f"step {step}: {anomaly.text}; stopped before the update, weights unchanged. Use --on-anomaly "
                    "skip to skip such updates instead"
                )
        return not any(self._choice == "skip" or anomaly.is_unusable for anomaly in anomalies)
