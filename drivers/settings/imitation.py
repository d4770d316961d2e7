"""Settings of the programs that imitate: fine-tuning on demonstrations, and expert iteration."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from drivers.settings.base import PositiveFloat, PositiveInt
from drivers.settings.choices import Aggregation
from drivers.settings.groups import TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.recipes import QUICKSTART
from drivers.settings.sampling import ConversationSettings


@dataclass(frozen=True, kw_only=True)
class ImitationSettings(TrainingSettings):
    """The settings that both programs have; a flag means what it means in train.py."""

    heading: ClassVar[str] = "objective"

    learning_rate: PositiveFloat = 2e-5
    train_batch_size: PositiveInt = 64
    micro_batch_tokens: PositiveInt = 8192
    aggregation: Aggregation = "token_mean"
    """Average the token losses over all tokens of an optimizer step or over each response; or sum them over each
    response; `constant` divides that sum by --sampling-max-tokens."""

    def _as_grpo(self, **own: Any) -> GrpoConfig:
        """Return the settings that make GRPO's parts imitate.

        REINFORCE without a baseline has the loss -log pi for a reward of 1.
        """
        known = {field.name for field in fields(GrpoConfig)}
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        fixed: dict[str, Any] = {"loss_type": "no_baseline", "use_std_normalization": False}
        return GrpoConfig(**(shared | fixed | own))


@dataclass(frozen=True, kw_only=True)
class SftConfig(ImitationSettings):
    """Fine-tune a language model on demonstrations: prompts with the responses that they should get."""

    program: ClassVar[str] = "sft.py"
    title: ClassVar[str] = "SFT"
    extend_flag: ClassVar[str] = "--epochs"
    heading: ClassVar[str] = "data"

    data_path: str = "data/math/sft.jsonl"
    """Demonstrations: JSONL with `response` and either `question` (formatted by --prompt-path) or `prompt` (used as
    is); `answer` is optional. A response that ends without a stop string gets the model's end token."""
    epochs: PositiveInt = 1
    """Passes over the demonstrations."""
    n_examples: PositiveInt | None = None
    """Number of demonstrations to train on, chosen by the seed; a smaller number selects a subset of a larger one.
    Default: all."""
    correct_only: bool = False
    """First drop demonstrations whose response does not get a reward of 1 for their `answer`."""

    def as_grpo(self, n_examples: int) -> GrpoConfig:
        """Return the settings of a run on this many demonstrations."""
        size = self.train_batch_size
        return self._as_grpo(n_grpo_steps=self.epochs * -(-n_examples // size), rollout_batch_size=size, group_size=1)


@dataclass(frozen=True, kw_only=True)
class ExpertIterationConfig(ConversationSettings, ImitationSettings):
    """Train a language model on its own correct responses (expert iteration)."""

    program: ClassVar[str] = "expert_iteration.py"
    title: ClassVar[str] = "Expert iteration"
    extend_flag: ClassVar[str] = "--n-ei-steps"
    heading: ClassVar[str] = "sampling"

    learning_rate: PositiveFloat = 1e-5
    n_ei_steps: PositiveInt = 5
    """Steps to train for: in each, sample responses and train on the correct ones."""
    question_batch_size: PositiveInt = 512
    """Questions asked per step."""
    group_size: PositiveInt = 8
    """Responses per question. Those with a reward of 1 are trained on, token for token."""
    epochs: PositiveInt = 1
    """Passes over the correct responses of a step."""
    eval_steps: PositiveInt = 1
    checkpoint_steps: PositiveInt = 1

    def as_grpo(self) -> GrpoConfig:
        """Return the settings that sample its steps; the optimizer steps follow `train_batch_size` instead."""
        sampled = self.question_batch_size * self.group_size
        return self._as_grpo(n_grpo_steps=self.n_ei_steps, rollout_batch_size=sampled, train_batch_size=sampled)


_TASK = {k: v for k, v in QUICKSTART.items() if k not in ("n_grpo_steps", "rollout_batch_size", "train_batch_size")}
QUICKSTARTS: dict[type[ImitationSettings], dict[str, Any]] = {
    SftConfig: {
        **_TASK,
        "data_path": "data/wordadd/sft.jsonl",
        "correct_only": True,  # wrong demonstrations teach the format, and to be wrong
        "n_examples": 256,
        "train_batch_size": 32,
    },
    ExpertIterationConfig: {
        **_TASK,
        "n_ei_steps": 3,
        "question_batch_size": 32,
        "train_batch_size": 32,
        "epochs": 2,
    },
}
"""The settings of each program's quickstart, which runs without --model-path."""
