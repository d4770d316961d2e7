"""Groups of settings that programs are composed of; each field is written here once."""

from dataclasses import dataclass
from datetime import date
from typing import ClassVar, Literal

from drivers.common.errors import UsageError
from drivers.settings.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
    check_multiple,
    is_server_address,
)
from drivers.settings.chat_args import ChatValue, parse_chat_args
from drivers.settings.evaluation import EvaluationSettings, name_sets
from drivers.settings.reward_spec import check_reward
from drivers.settings.sampling import ConversationSettings, NucleusSettings
from drivers.settings.schedule import Schedule


# --- model -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model, and the type that it computes in."""

    heading: ClassVar[str] = "model"

    model_path: str | None = None
    """Model to load: a folder or Hugging Face hub name of a causal language model. Default: the quickstart's model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the models compute in; master weights and optimizer state are always float32. `auto` uses bfloat16 on
    a GPU, and on a CPU where bfloat16 measures faster. float16 rounds less than bfloat16, so that policy and sampler
    agree better, but it overflows above 65504: training scales the loss. It is slow on most CPUs."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention of the model. In training, flash attention, if installed, packs responses into one sequence without
    padding; the others compute a group's prompt once where that is cheaper. `auto` is sdpa, or eager for models
    without sdpa and for short rows on a CPU."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings(ModelSettings):
    """The model that is trained."""

    policy_device: str = "auto"
    """Device of the policy: cpu, cuda or cuda:N. `auto` is the first GPU, else the CPU."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each layer's activations in the backward pass: a third more time, far less memory. `auto` does so only
    where a micro-batch would not fit otherwise."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank updates of this rank (LoRA) instead of all weights. Checkpoints contain the merged model, and the
    updates in a folder `adapter`. 0 trains all weights."""
    lora_alpha: PositiveInt = 32
    """Scale LoRA updates by --lora-alpha / --lora-rank."""
    lora_push: Literal["merged", "adapter"] = "merged"
    """Weights that a push of LoRA sends to vLLM: the `merged` model, or the `adapter` alone, after the frozen weights
    were sent once. A push of the adapter is faster; sampling with it is slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank == 0 and self.is_changed("lora_alpha"):
            raise UsageError(f"{self.flag('lora_alpha')}: has no effect without LoRA; pass --lora-rank too")
        if self.lora_rank == 0 and self.is_changed("lora_push"):
            raise UsageError(f"{self.flag('lora_push')}: has no effect without LoRA; pass --lora-rank too")


# --- data ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class PromptSettings(Settings):
    """The prompt that is made of a question."""

    heading: ClassVar[str] = "data"

    prompt_path: str = "data/prompts/r1_zero.prompt"
    """Prompt template: a text file that contains {question}."""
    chat_template: bool = False
    """For instruct models: send the filled template as the user's message through the tokenizer's chat template. The
    token that ends a turn there then ends a response."""
    system_prompt_path: str | None = None
    """Text file with the system message for --chat-template. Default: the message of the chat template, if it has
    one."""
    chat_template_args: tuple[str, ...] = ()
    """Arguments of the chat template, as `name=value` each, such as `enable_thinking=false`. Values are true, false,
    numbers or text. Default: none."""
    chat_date: str | None = None
    """Day that a chat template with a clock shows, like 2026-11-29. Default: the day on which the run began."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """For questions whose prompt leaves no room for --sampling-max-tokens in the model's context: end the program, or
    leave them out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system_prompt_path is not None and not self.chat_template:
            raise UsageError(
                f"{self.flag('system_prompt_path')}: has no effect without a chat template; pass --chat-template too"
            )
        if self.chat_template_args and not self.chat_template:
            raise UsageError(
                f"{self.flag('chat_template_args')}: has no effect without a chat template; pass --chat-template too"
            )
        parse_chat_args(self.chat_template_args)
        if self.chat_date is not None and not self.chat_template:
            raise UsageError(
                f"{self.flag('chat_date')}: has no effect without a chat template; pass --chat-template too"
            )
        if self.chat_template:
            try:
                day = date.today() if self.chat_date is None else date.fromisoformat(self.chat_date)
            except ValueError as error:
                raise UsageError(f"{self.flag('chat_date')}: must be a day like 2026-11-29 ({error})") from error
            # Settings are saved with the run, so that its prompts stay the same when it is resumed on another day.
            object.__setattr__(self, "chat_date", day.isoformat())

    @property
    def chat_options(self) -> dict[str, ChatValue]:
        """Return the arguments of the chat template by name."""
        return parse_chat_args(self.chat_template_args)


@dataclass(frozen=True, kw_only=True)
class DataSettings(PromptSettings):
    """Questions to train on, and held-out questions."""

    data_path: str = "data/math/train.jsonl"
    """Training questions: JSONL with `question` and `answer`, as drivers/convert_dataset.py writes it."""
    val_data_path: tuple[str, ...] = ("data/math/test.jsonl",)
    """Held-out questions; the first file chooses the best checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name_sets("--val-data-path", self.val_data_path)


# --- grading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class GradingSettings(Settings):
    """The reward, and the processes that compute it."""

    heading: ClassVar[str] = "grading"

    reward: str = "r1_zero"
    """Reward, or your own as `file.py:function` (docs/grading.md). `r1_zero` compares the answer inside <answer> tags
    after </think>; `think_answer` allows any white space between the two; `question_only` compares the answer in
    \\boxed{}; `countdown` checks an expression of the given numbers; `gym` asks reasoning-gym's verifier."""
    reward_mix: tuple[str, ...] = ()
    """Weights, as `name=weight` each, of the named numbers that your own --reward function returns. The reward is
    their weighted sum. Default: the function returns the reward itself."""
    grader_workers: NonNegativeInt = 0
    """Number of grading processes. 0 uses half of the cores, at most 8."""
    grader_deadline_s: PositiveFloat = 10.0
    """Seconds to grade one response; a response that takes longer gets no reward and is excluded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self.reward, self.reward_mix)


# --- sampling --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RolloutSettings(ConversationSettings, NucleusSettings):
    """The groups of a GRPO step, and when they are sampled."""

    sampling_replay: bool = False
    """Compute each log-prob and entropy over the tokens that the sampler could draw: what top-k, top-p and min-p kept,
    without the end token below the minimum length. The policy is then the truncated one, and ratios to the sampler
    are those of one set. It needs --sampling-top-k with --engine vllm, to bound the sets."""
    rollout_batch_size: PositiveInt = 256
    """Responses sampled per step: questions times group size."""
    group_size: PositiveInt = 8
    """Responses per question."""
    max_refills: NonNegativeInt = 0
    """Dynamic sampling: replace groups with equal rewards by new questions up to this many times per step; groups
    still missing are dropped with a warning. 0 keeps groups with equal rewards."""
    curriculum_steps: NonNegativeInt = 0
    """Curriculum: over this many steps, grow the training set from the easiest questions to all, ordered by the
    `pass_rate` that drivers/pass_rates.py measures. 0 uses all questions from the first step."""
    async_steps: Literal[0, 1] = 0
    """1 samples the next batch while the current one is trained on, with the weights of the previous step. It needs
    --engine vllm, and --importance or --old-policy sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("rollout_batch_size", self.rollout_batch_size, "group_size", self.group_size)

    @property
    def n_prompts_per_rollout_batch(self) -> int:
        """Return the number of questions of a step."""
        return self.rollout_batch_size // self.group_size


# --- optimizer -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """One optimizer step."""

    heading: ClassVar[str] = "optimizer"

    learning_rate: PositiveFloat = 1e-5
    """Learning rate of AdamW, after --warmup-steps and before it falls with --lr-schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps with a lower, rising learning rate at the start; the next one has --learning-rate."""
    lr_schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, or falling along a line or half a cosine to 0 after the last step of
    the run. A run that is resumed with more steps continues at the rate of the longer run."""
    weight_decay: NonNegativeFloat = 0.0
    """Multiply all trained weights by 1 - learning rate * this in each update (decoupled weight decay)."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Shares that the running means of the gradient and of its square keep in each update."""
    adam_epsilon: PositiveFloat = 1e-8
    """Constant added to the root of the mean square, by which AdamW divides."""
    train_batch_size: PositiveInt = 256
    """Responses per optimizer step. In train.py, fewer than --rollout-batch-size give a step several
    off-policy updates."""
    micro_batch_tokens: PositiveInt | None = None
    """Maximum tokens per micro-batch, padding included. More is faster and takes more memory; the gradient is the
    same. Default: cut by --gradient-accumulation-steps."""
    max_grad_norm: PositiveFloat = 1.0
    """Scale gradients down to this norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise UsageError(f"{self.flag('adam_betas')}: both must be at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class UpdateSettings(OptimizerSettings):
    """The optimizer steps that GRPO takes on one rollout batch."""

    gradient_accumulation_steps: PositiveInt = 128
    """Micro-batches per optimizer step, each of --train-batch-size / --gradient-accumulation-steps responses. If
    given, it overrides the recipe's --micro-batch-tokens."""
    epochs_per_rollout_batch: PositiveInt = 1
    """Passes over each rollout batch. Each pass after the first is off-policy, unless --train-batch-size is as large
    as all passes together: then they have one gradient, which is computed once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_tokens is None:
            steps = self.gradient_accumulation_steps
            check_multiple("train_batch_size", self.train_batch_size, "gradient_accumulation_steps", steps)

    @property
    def micro_train_batch_size(self) -> int:
        """Return the number of responses of a micro-batch."""
        return self.train_batch_size // self.gradient_accumulation_steps


# --- engine ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """The engine that samples."""

    heading: ClassVar[str] = "engine"

    engine: Literal["vllm", "hf"] = "vllm"
    """Engine that samples: vLLM, or the model's own `generate`, which is slow but needs no other package."""
    gpu_memory_utilization: Share = 0.85
    """Share of a GPU's memory that vLLM may use; on a GPU shared with the policy, its share while it samples."""


@dataclass(frozen=True, kw_only=True)
class RolloutEngineSettings(EngineSettings):
    """The engine that samples during training, and where it runs."""

    rollout_device: str = "auto"
    """Device of vLLM: cpu, cuda or cuda:N. `auto` is the second GPU if there is one, else the policy's device."""
    rollout_process: Literal["auto", "own", "shared"] = "auto"
    """Process of vLLM: `own` is a separate one, which can be restarted if it fails. `auto` uses a separate process on
    a second GPU."""
    rollout_url: tuple[str, ...] = ()
    """Sample with these vLLM servers instead of an engine of this program: http://HOST:PORT each. docs/scaling.md
    shows how to start one. Default: no servers."""
    engine_deadline_s: PositiveFloat = 3600.0
    """Restart a separate vLLM process that has not responded for this many seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for url in self.rollout_url:
            if not is_server_address(url):
                raise UsageError(f"--rollout-url {url}: must be a server's address, such as http://127.0.0.1:8000")
        if self.rollout_url and self.is_changed("gpu_memory_utilization"):
            raise UsageError(
                f"{self.flag('gpu_memory_utilization')}: has no effect with --rollout-url; set it where the server is "
                "started"
            )


# --- run and safety --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Files that a run writes, and the steps at which it writes them."""

    heading: ClassVar[str] = "run"

    save_dir: str | None = None
    """Folder of the run; it must not contain another run. Default: a new folder under runs/."""
    resume: str | None = None
    """Resume a run from its folder or from one of its checkpoints. Its settings apply unless overridden by flags.
    `auto` resumes the run in --save-dir, if there is one. Default: start a new run."""
    checkpoint_steps: PositiveInt = 10
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt | None = None
    """Number of recent checkpoints to keep, besides the best one. Default: keep all, but optimizer state only for the
    newest two."""
    n_logged_completions: NonNegativeInt = 8
    """Responses per step and per evaluation to log token by token."""
    wandb_project: str | None = "grpo_core"
    """Weights & Biases project. Runs stay offline unless you are logged in. `None` turns it off."""
    wandb_run_name: str | None = None
    """Name of the run in Weights & Biases. Default: the name of the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume == "auto" and self.save_dir is None:
            raise UsageError("--resume auto: needs the folder of the run; pass --save-dir too, or --resume RUN_FOLDER")


@dataclass(frozen=True, kw_only=True)
class SafetySettings(Settings):
    """Checks of a run, and what happens when one fails."""

    heading: ClassVar[str] = "safety"

    on_anomaly: Literal["auto", "stop", "skip", "warn"] = "auto"
    """When a loss, gradient, reward, entropy or policy-sampler divergence is out of range: stop, skip the update, or
    warn. docs/reliability.md lists the ranges. `auto` stops at numbers that are not finite and warns otherwise."""
    self_check_tolerance: float | None = None
    """Largest mean absolute log-prob difference, in nats, between vLLM and the policy on vLLM's samples, before and
    after the first update; above it the run stops. Default: 0.001 in float32, 0.08 in bfloat16, 0.01
    in float16."""
    deterministic: bool = False
    """Make the same command give the same bits on the same machine. It uses torch's deterministic algorithms on a GPU,
    and float32 where --dtype is auto."""


# --- together --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class TrainingSettings(
    SafetySettings, RunSettings, RolloutEngineSettings, OptimizerSettings, EvaluationSettings, GradingSettings,
    DataSettings, PolicySettings,
):  # fmt: skip
    """The settings of every program that trains."""

    program: ClassVar[str]
    """File name of the program; only the program that started a run can resume it."""
    title: ClassVar[str]
    """Name of the algorithm, as the display shows it."""
    extend_flag: ClassVar[str]
    """The flag that makes a run longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_push == "adapter" and (self.engine == "hf" or self.rollout_url):
            other = self.flag("engine") if self.engine == "hf" else self.flag("rollout_url")
            raise UsageError(
                f"{self.flag('lora_push')}: only a vLLM of this program takes an adapter; pass --lora-push merged, or "
                f"omit {other}"
            )
