"""The training state: everything that the next step depends on besides settings, data and engine."""

import hashlib
import json
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from drivers.common.errors import UsageError
from drivers.common.own_functions import hash_source, import_function
from drivers.policy import fsdp
from drivers.policy.optimizer import PolicyOptimizer
from drivers.policy.reference import mix_into_reference
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Question, distinct
from drivers.training.anomalies import N_NORMS, CollapseWatch
from drivers.training.batch import StepRollouts
from drivers.training.objective import EntropyBonus

_SAMPLED_WITH = (
    "rollout_batch_size", "group_size", "sampling_temperature", "sampling_min_tokens", "sampling_max_tokens",
    "sampling_top_p", "sampling_top_k", "sampling_min_p", "sampling_replay", "sampling_stop", "rollout",
    "max_refills", "reward", "reward_mix", "length_penalty", "overlong_buffer",
)  # fmt: skip
"""Settings that rollouts depend on."""
_KEPT = ("seed", "entropy_coef", "entropy_target", "advantage", *_SAMPLED_WITH)
"""Settings that the state depends on."""


def validate_resume(config: GrpoConfig, saved: Mapping[str, Any], data: str | None = None) -> None:
    """Raise a UsageError if a setting, or `data`, differs from the checkpoint and could no longer take effect.

    `saved` is the checkpoint's trainer_state.json, `data` the fingerprint of the prompts and answers. Checkpoints of
    older versions contain neither settings nor a fingerprint, and are accepted.
    """
    if data is not None and saved.get("data", data) != data:
        raise UsageError(
            f"--data-path {config.data_path}, --prompt-path {config.prompt_path}: the prompts or answers differ from "
            "those of the run; restore them, or start a new run with --model-path CHECKPOINT"
        )
    now, before = _settings(config), _saved_settings(saved)
    for flag, source in before.get("own_functions", {}).items():
        if now["own_functions"].get(flag, source) != source:
            raise UsageError(
                f"{flag}: its file has changed since the checkpoint; restore it, or start a new run with --model-path "
                "CHECKPOINT"
            )
    reasons = {"seed": "the random state is restored"}
    if None not in (now["entropy_target"], before.get("entropy_target")):
        reasons["entropy_coef"] = "the coefficient has been adapted since"
    if saved.get("pending") is not None:
        uses_greedy = "remax" in (now["advantage"], before.get("advantage"))  # greedy responses are sampled too
        sampled_with = (*_SAMPLED_WITH, "advantage") if uses_greedy else _SAMPLED_WITH
        reasons |= dict.fromkeys(sampled_with, "the next rollouts have been sampled with it")
    for name, reason in reasons.items():
        if name in before and before[name] != now[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} {now[name]}: cannot be changed when resuming (the checkpoint has "
                f"{before[name]}): {reason}. Omit it, or start a new run with --model-path CHECKPOINT"
            )


def _settings(config: GrpoConfig) -> dict[str, Any]:
    """Return the settings that the state depends on, as JSON would return them."""
    settings: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in _KEPT}))
    rows = {config.flag("loss_type"): config.objective, config.flag("advantage"): config.estimator}
    sources = {flag: row.source_hash for flag, row in rows.items() if row.own_function}
    if config.rollout is not None:
        sources[config.flag("rollout")] = hash_source(import_function("--rollout", config.rollout))
    return settings | {"own_functions": sources}


def _saved_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the checkpoint; older checkpoints have none."""
    settings = saved.get("settings")
    return settings if isinstance(settings, dict) else {}


def fingerprint(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of prompts (as token ids), answers and demonstrations, in any order."""
    sums = {}
    for question in distinct(questions):
        row = [question.prompt_token_ids, question.answer, getattr(question, "response_token_ids", None)]
        sums[id(question)] = hashlib.sha256(json.dumps(row).encode()).digest()
    return hashlib.sha256(b"".join(sorted(sums[id(question)] for question in questions))).hexdigest()


class TrainingState:
    """Weights, optimizer, random generators, and other values that a step passes to the next."""

    def __init__(self, config: GrpoConfig, policy: nn.Module, reference: nn.Module | None = None) -> None:
        """Begin with these models. The reference of the KL penalty is part of the state only if it moves."""
        self._config, self._policy = config, policy
        self._settings = _settings(config)  # with the files of own functions as they are now, when they are imported
        self._reference = None if config.kl_reference_steps is None else reference
        self.step = 0
        """The last step whose updates are all in the weights."""
        self.optimizer = PolicyOptimizer(policy, config, scales_loss=fsdp.computing_dtype(policy) == torch.float16)
        self.bonus = EntropyBonus(config)
        self.draw = random.Random(config.seed)
        """Draws questions, on rank 0."""
        self.shuffle = torch.Generator().manual_seed(config.seed)
        """Shuffles groups into train batches."""
        self.pending: StepRollouts | None = None
        """Prefetched rollouts of the step after `step`."""
        self.grad_norms: deque[float] = deque(maxlen=N_NORMS)
        """Norms of recent updates. Skipped updates count, so that a lasting rise is not skipped forever."""
        self.accuracies: dict[int, float] = {}
        """Held-out accuracies by step."""
        self.collapse = CollapseWatch()
        self.snapshot()

    def finish_update(self, grad_norm: float, *, apply: bool) -> bool:
        """Apply the gradient at the rate of the next step, or discard it, and record its norm. Return `apply`."""
        if apply:
            self.optimizer.step(self._config.learning_rate_at(self.step + 1))
        else:
            self.optimizer.skip()
        if 0 < grad_norm < math.inf:  # a median of zeros would make every norm a spike
            self.grad_norms.append(grad_norm)
        return apply

    def move_reference(self) -> None:
        """Move a reference that follows the policy, if it is due after the current step."""
        if self._reference is not None and self.step % (self._config.kl_reference_steps or 1) == 0:
            mix_into_reference(self._reference, self._policy, self._config.kl_reference_share)

    def snapshot(self) -> None:
        """Remember the state at the end of a step, which a checkpoint stores."""
        version, words, gauss = self.draw.getstate()
        values: dict[str, Any] = {
            "step": self.step,
            "updates": self.optimizer.n_updates,
            "loss_scale": self.optimizer.scaler_state(),
            "entropy_coef": self.bonus.value,
            "draw": [version, list(words), gauss],
            "shuffle": self.shuffle.get_state().tolist(),
            "grad_norms": list(self.grad_norms),
            "accuracies": list(self.accuracies.items()),
            "collapse": asdict(self.collapse),
            "settings": self._settings,
        }
        # One assignment: a Ctrl-C before it leaves the last snapshot complete.
        self._snapshot = (self.optimizer.n_updates, values, self.pending)

    @property
    def is_at_snapshot(self) -> bool:
        """Return whether no update was made since `snapshot`; otherwise the weights are newer than the snapshot."""
        return self.optimizer.n_updates == self._snapshot[0]

    @property
    def saved_step(self) -> int:
        """Return the step of the last `snapshot`."""
        return int(self._snapshot[1]["step"])

    def values(self) -> dict[str, Any]:
        """Return the values other than tensors at the last `snapshot`, as JSON stores them."""
        _, values, pending = self._snapshot
        return values | {"pending": None if pending is None else pending.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the master weights, moments and moving reference by name; writing into them restores them."""
        if self._reference is None:
            return self.optimizer.tensors()
        moving = fsdp.resharded(self._reference).named_parameters()
        return self.optimizer.tensors() | {f"reference.{name}": weight.detach() for name, weight in moving}

    def restore(self, values: dict[str, Any]) -> None:
        """Restore the values of `values`, after `tensors` were filled from the same checkpoint.

        Raise a UsageError if a setting has changed that could no longer take effect.
        """
        validate_resume(self._config, values)
        self.step = values["step"]
        self.optimizer.finish_loading(values["updates"], values.get("loss_scale", {}))  # an older checkpoint has none
        # A constant coefficient is a setting, which may change; an adapted one is part of the state.
        was_adapted = _saved_settings(values).get("entropy_target", True) is not None
        if self._config.entropy_target is not None and was_adapted:
            self.bonus.value = values["entropy_coef"]
        version, words, gauss = values["draw"]
        self.draw.setstate((version, tuple(words), gauss))
        self.shuffle.set_state(torch.tensor(values["shuffle"], dtype=torch.uint8))
        self.grad_norms = deque(values["grad_norms"], maxlen=N_NORMS)
        self.accuracies = dict(values["accuracies"])
        self.collapse = CollapseWatch(**values.get("collapse", {}))  # an older checkpoint has none
        self.pending = None if values["pending"] is None else StepRollouts.from_json(values["pending"])
        self.snapshot()
