"""All that the next step of a run depends on, beside its settings, its data and its engine: one value."""

import hashlib
import json
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drivers.common.errors import UsageError
from drivers.policy.optimizer import PolicyOptimizer
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question
from drivers.training.anomalies import N_NORMS
from drivers.training.batch import StepRollouts
from drivers.training.objective import EntropyBonus

_SAMPLED_WITH = (
    "rollout_batch_size",
    "group_size",
    "sampling_temperature",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "sampling_top_p",
    "sampling_stop",
    "max_refills",
    "reward",
    "reward_mix",
    "length_penalty",
    "overlong_buffer",
)
"""What a batch is sampled and graded with."""


_KEPT = ("seed", "entropy_coef", "entropy_target", "advantage", *_SAMPLED_WITH)
"""Settings that the state follows from, or would no longer."""


def validate_resume(config: GrpoConfig, facts: Mapping[str, Any], data: str | None = None) -> None:
    """A UsageError for what a run that goes on from `facts` would not heed. Of an older checkpoint, nothing is known.

    `data`: the `fingerprint` of what it would draw from.
    """

    def refuse(name: str, reason: str) -> None:
        flag, value = f"--{name.replace('_', '-')}", getattr(config, name)
        raise UsageError(
            f"{flag} {value}: with --resume {name}={before[name]!r} holds, {reason}; leave it out, or begin a new run "
            "from the checkpoint by --model-path"
        )

    if data is not None and facts.get("data", data) != data:
        raise UsageError(
            f"--data-path {config.data_path}, --prompt-path {config.prompt_path}: with --resume the prompts and "
            "answers that the run drew from are required, and these are others; leave what chooses them as it was, or "
            "begin a new run from the checkpoint by --model-path"
        )
    now, before = _settings(config), _settings_of(facts)
    others = [name for name in _KEPT if name in before and before[name] != now[name]]
    if "seed" in others:
        refuse("seed", "for draws and shuffles go on from where they stood")
    if "entropy_coef" in others and None not in (now["entropy_target"], before.get("entropy_target")):
        refuse("entropy_coef", "from which the coefficient has moved on to its target since")
    if facts.get("pending") is not None:
        remax = "remax" in (now["advantage"], before.get("advantage"))  # it has responses of its own
        for name in others:
            if name in _SAMPLED_WITH or (name == "advantage" and remax):
                refuse(name, "for the next batch was sampled ahead with it")


def _settings(config: GrpoConfig) -> dict[str, Any]:
    """As JSON gives them back."""
    settings: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in _KEPT}))
    return settings


def _settings_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the checkpoint, as far as it has any."""
    found = facts.get("settings")
    return found if isinstance(found, dict) else {}


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of what a run draws from: prompts as token ids, answers and demonstrations, in any order."""
    rows = ([q.prompt_token_ids, q.answer, getattr(q, "response_token_ids", None)] for q in questions)
    sums = sorted(hashlib.sha256(json.dumps(row).encode()).digest() for row in rows)
    return hashlib.sha256(b"".join(sums)).hexdigest()


class TrainingState:
    """Weights and optimizer, where data and noise stand, what is carried from step to step."""

    def __init__(self, config: GrpoConfig, policy: nn.Module) -> None:
        self._config = config
        self.step = 0
        """The last step whose updates are all in the weights."""
        self.optimizer = PolicyOptimizer(policy, config.learning_rate)
        self.bonus = EntropyBonus(config)
        self.draw = random.Random(config.seed)
        """Of questions. Only the first rank draws."""
        self.shuffle = torch.Generator().manual_seed(config.seed)
        """Of groups, into train batches."""
        self.pending: StepRollouts | None = None
        """What was sampled ahead, for the step after `step`."""
        self.grad_norms: deque[float] = deque(maxlen=N_NORMS)
        """Of the last updates, those that were left out among them: a lasting rise must not be skipped for ever."""
        self.accuracies: dict[int, float] = {}
        """Of the evaluations so far, by step."""
        self.snapshot()

    def update(self, grad_norm: float, *, made: bool) -> bool:
        """Take the optimizer's step, or leave weights and moments as they are. Returns `made`."""
        if made:
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()
        if 0 < grad_norm < math.inf:  # 0 is no size to compare others with
            self.grad_norms.append(grad_norm)
        return made

    def snapshot(self) -> None:
        """A step has ended: this is what a checkpoint goes on from."""
        version, words, gauss = self.draw.getstate()
        facts: dict[str, Any] = {
            "step": self.step,
            "updates": self.optimizer.n_updates,
            "entropy_coef": self.bonus.value,
            "draw": [version, list(words), gauss],
            "shuffle": self.shuffle.get_state().tolist(),
            "grad_norms": list(self.grad_norms),
            "accuracies": list(self.accuracies.items()),
            "settings": _settings(self._config),
        }
        # In one assignment: a Ctrl-C before it leaves the last mark, whole.
        self._marked = (self.optimizer.n_updates, facts, self.pending)

    @property
    def is_at_snapshot(self) -> bool:
        """Whether nothing was updated since `mark`: else the facts and the weights are of different moments."""
        return self.optimizer.n_updates == self._marked[0]

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, as of the last `mark`; JSON gives it back as it was."""
        _, facts, pending = self._marked
        return facts | {"pending": None if pending is None else pending.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """Master weights and moments, by name: whoever writes into them restores them."""
        return self.optimizer.tensors()

    def restore(self, facts: dict[str, Any]) -> None:
        """After `tensors` were filled: the rest. A UsageError where the settings ask for what would not be heeded."""
        validate_resume(self._config, facts)
        self.step = facts["step"]
        self.optimizer.finish_loading(facts["updates"])
        # Only what was adapted has moved on: a constant one is the settings' own.
        was_adapted = _settings_of(facts).get("entropy_target", True) is not None
        if self._config.entropy_target is not None and was_adapted:
            self.bonus.value = facts["entropy_coef"]
        version, words, gauss = facts["draw"]
        self.draw.setstate((version, tuple(words), gauss))
        self.shuffle.set_state(torch.tensor(facts["shuffle"], dtype=torch.uint8))
        self.grad_norms = deque(facts["grad_norms"], maxlen=N_NORMS)
        self.accuracies = dict(facts["accuracies"])
        self.pending = None if facts["pending"] is None else StepRollouts.from_json(facts["pending"])
        self.snapshot()
