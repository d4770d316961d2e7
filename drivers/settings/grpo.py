"""Settings of train.py."""

from dataclasses import dataclass
from typing import ClassVar

from drivers.common.errors import UsageError
from drivers.settings.algorithm import AlgorithmSettings
from drivers.settings.base import PositiveInt
from drivers.settings.groups import TrainingSettings
from drivers.settings.recipes import RecipeName
from drivers.settings.sampling import Sampling
from drivers.settings.schedule import schedule_factor


@dataclass(frozen=True, kw_only=True)
class GrpoConfig(AlgorithmSettings, TrainingSettings):
    """Train a language model with GRPO on questions whose answers can be checked."""

    program: ClassVar[str] = "train.py"
    title: ClassVar[str] = "GRPO"
    extend_flag: ClassVar[str] = "--n-grpo-steps"
    heading: ClassVar[str] = "run"

    recipe: RecipeName | None = None
    """Named defaults for other flags. `quickstart` trains SmolLM2-135M on word problems on a laptop in minutes.
    `cs336-2026` has its own model and data; the others set an objective, on those of the quickstart or, with
    --model-path, on the defaults below. Default: none with --model-path, else quickstart."""
    n_grpo_steps: PositiveInt = 200
    """Steps to train for: in each, sample a rollout batch and train on it."""
    show: bool = False
    """Print the resolved settings and the loss as a formula, then exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.async_steps and self.engine == "hf":
            raise UsageError(
                f"{self.flag('async_steps')}: samples with the weights of the previous step, but --engine hf shares "
                "the policy's weights; pass --engine vllm, or --async-steps 0"
            )

        if self.sampling_replay and self.engine == "vllm" and self.sampling.truncates and not self.sampling_top_k:
            raise UsageError(
                "--sampling-replay: vLLM returns the tokens that it kept as a list of limited length; pass "
                "--sampling-top-k 100, or another bound"
            )
        if self.kl_reference_steps is not None and self.lora_rank > 0:
            raise UsageError(
                f"{self.flag('kl_reference_steps')}: moves a copy of the model, but with {self.flag('lora_rank')} the "
                "reference is the model without its updates; pass --lora-rank 0"
            )

    @property
    def collective_timeout_s(self) -> float:
        """Return how long other ranks wait for rank 0, which samples in rounds and may restart the engine."""
        return (4 + self.max_refills) * self.engine_deadline_s + 1800

    @property
    def eval_sampling(self) -> Sampling:
        """Return the parameters that draw the responses to a held-out question."""
        return self.for_evaluation(self.sampling)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of all updates of a step."""
        return self.learning_rate * schedule_factor(self.lr_schedule, step, self.n_grpo_steps, self.warmup_steps)

    @property
    def warnings(self) -> list[str]:
        """Return a warning for each setting that is legal but probably a mistake."""
        found = [f"{self.flag('loss_type')} {text}" for text in self.objective.broken_laws]
        if self.passes_per_update > 1:
            found.append(
                f"{self.flag('train_batch_size')} is {self.passes_per_update} passes over the rollout batch from the "
                "same weights: its gradient is that of one pass, which is computed once; --train-batch-size "
                f"{self.rollout_batch_size} takes {self.epochs_per_rollout_batch} off-policy updates instead"
            )
        if self.loss_type in ("gspo", "gspo_token", "luspo") and self.cliprange >= 0.05:
            found.append(
                f"--cliprange {self.cliprange:g} hardly ever binds a mean of log ratios; the papers use 0.0003 (GSPO) "
                "and 0.002 (LUSPO)"
            )
        if self.lora_rank and self.learning_rate < 5e-5:
            found.append(
                f"--learning-rate {self.learning_rate:g} is low for LoRA, which needs about ten times the rate of "
                "full training, such as 1e-4"
            )
        if self.warmup_steps >= self.n_grpo_steps:
            found.append(
                f"--warmup-steps {self.warmup_steps} does not end before the last of {self.n_grpo_steps} steps, so "
                "--learning-rate is never reached"
            )
        if self.curriculum_steps > self.n_grpo_steps:
            found.append(
                f"--curriculum-steps {self.curriculum_steps} exceeds --n-grpo-steps {self.n_grpo_steps}, so the "
                "hardest questions are never asked"
            )
        return found
