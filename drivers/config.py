"""Settings: one flat frozen dataclass per program, the recipes, and the command line that joins them."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from drivers.errors import UsageError
from drivers.rollout import Sampling
from grpo_core import Aggregation, LossType

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""The model whose weights come with the environment; `--model-path` takes this name beside a folder or hub name."""

QUICKSTART: dict[str, Any] = {
    "model_path": EMBEDDED_MODEL,
    "data_path": "data/wordadd/train.jsonl",
    "val_data_path": "data/wordadd/validation.jsonl",
    "prompt_path": "data/prompts/wordadd.prompt",
    "n_grpo_steps": 15,
    "learning_rate": 3e-5,
    "rollout_batch_size": 64,
    "train_batch_size": 64,
    "gradient_accumulation_steps": 8,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 32,
    "n_val_examples": 256,
}
RECIPES: dict[str, dict[str, Any]] = {"quickstart": QUICKSTART}
"""Plain data: what a recipe sets, every flag still wins over."""


@dataclass(frozen=True)
class GrpoConfig:
    """Train a language model with GRPO on questions whose answers can be checked."""

    recipe: Literal["quickstart"] | None = None
    """Named defaults for all other flags. `quickstart`: SmolLM2-135M learns word problems on a laptop in minutes.
    It is what runs when neither this nor --model-path is given."""

    model_path: str | None = None
    """Folder or hub name of a Hugging Face causal language model. Alone, it is the run of the defaults below."""
    data_path: str = "data/math/train.jsonl"
    """Training questions: jsonl with `question` and `answer` (drivers/convert_dataset.py makes it)."""
    val_data_path: str = "data/math/validation.jsonl"
    """Held-out questions, the same layout."""
    prompt_path: str = "data/prompts/r1_zero.prompt"
    """Template of a prompt: a text file that contains {question}."""
    reward: Literal["r1_zero", "question_only"] = "r1_zero"
    """How a response is graded: answer inside <answer> tags after </think>, or in \\boxed{} anywhere."""

    n_grpo_steps: int = 200
    """Rollout batches to sample and train on."""
    learning_rate: float = 1e-5
    """Of AdamW, constant; betas (0.9, 0.95), no weight decay."""
    rollout_batch_size: int = 256
    """Responses sampled per step: questions x group size."""
    group_size: int = 8
    """Responses per question."""
    train_batch_size: int = 256
    """Responses per optimizer step; below rollout_batch_size, a step holds several updates (off-policy)."""
    gradient_accumulation_steps: int = 128
    """Micro-batches per optimizer step; one holds train_batch_size / this many responses."""
    epochs_per_rollout_batch: int = 1
    """Passes over each rollout batch; above 1 is off-policy."""

    loss_type: LossType = "reinforce_with_baseline"
    """The per-token objective. `grpo_clip` and `grpo_no_clip` use the ratio to the policy that began the step."""
    cliprange: float = 0.2
    """Half-width of the trust region of `grpo_clip`."""
    aggregation: Aggregation = "sequence_mean"
    """Tokens to loss: mean over each response, mean over all tokens of an optimizer step, or sum over
    sampling_max_tokens (`constant`: with --no-use-std-normalization, Dr. GRPO)."""
    use_std_normalization: bool = True
    """Divide a group's centered rewards by their standard deviation."""
    advantage_eps: float = 1e-6
    """Added to that standard deviation."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    sampling_temperature: float = 1.0
    """Of rollouts and evaluations. Log-probs in the loss are of the same tempered distribution."""
    sampling_min_tokens: int = 4
    """Before this many tokens the sampler may not end a response. It hides the end token in the sampler only, so there
    its log-probs differ from the policy's: the self-check leaves those tokens out."""
    sampling_max_tokens: int = 1024
    """A response is cut off here."""

    eval_steps: int = 5
    """Evaluate before the first step, then every so many, and at the end."""
    n_val_examples: int = 1024
    """Held-out questions per evaluation, one response each; fewer if the file has fewer."""
    n_logged_completions: int = 8
    """Of each evaluation's completions, how many are written out and shown."""
    checkpoint_steps: int = 10
    """Write a checkpoint every so many steps."""
    save_dir: str | None = None
    """Folder of the run; it must not hold another. Left out: a new one under runs/."""
    wandb_project: str | None = "grpo_core"
    """Weights & Biases project; the run is kept offline unless you are logged in. None: no wandb."""
    wandb_run_name: str | None = None
    """Name of the run there; left out: the name of the run's folder."""

    engine: Literal["vllm", "hf"] = "vllm"
    """What samples: vLLM, or the policy's own `generate` (slow, needs nothing else)."""
    policy_device: str = "auto"
    """cpu, cuda or cuda:N. auto: the first GPU, else the CPU."""
    rollout_device: str = "auto"
    """Likewise for vLLM. auto: the second GPU if there is one, else where the policy is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What policy and engine compute in; master weights and optimizer are float32 in any case.
    auto: bfloat16 on a GPU, and on a CPU on which it measures faster."""
    gpu_memory_utilization: float = 0.85
    """Share of its GPU that vLLM may fill; on a GPU shared with the policy, the share while it samples."""
    self_check_tolerance: float | None = None
    """Largest mean |log-prob difference| in nats between vLLM and the policy on vLLM's own samples, before the first
    update and after it; beyond it the run stops. Left out: 0.001 in float32, 0.08 in bfloat16."""
    seed: int = 0
    """Of questions, sampling and shuffling."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _check_number(name, getattr(self, name), "must be greater than 0", above=0)
        for name in _NOT_NEGATIVE:
            _check_number(name, getattr(self, name), "must not be negative", least=0)
        _check_multiple("rollout_batch_size", self.rollout_batch_size, "group_size", self.group_size)
        _check_multiple("rollout_batch_size", self.rollout_batch_size, "train_batch_size", self.train_batch_size)
        _check_multiple(
            "train_batch_size", self.train_batch_size, "gradient_accumulation_steps", self.gradient_accumulation_steps
        )
        if self.group_size == 1 and self.use_std_normalization:
            raise UsageError(
                "group_size=1 has no standard deviation to divide by: "
                "at least 2 is required, or pass --no-use-std-normalization"
            )
        if self.group_size == 1 and self.loss_type != "no_baseline":
            raise UsageError(
                f"group_size=1 makes every advantage 0, so loss_type={self.loss_type} would learn nothing: "
                "at least 2 is required, or pass --loss-type no_baseline"
            )
        if self.sampling_min_tokens > self.sampling_max_tokens:
            raise UsageError(
                f"sampling_min_tokens={self.sampling_min_tokens} must not exceed "
                f"sampling_max_tokens={self.sampling_max_tokens}"
            )
        if self.gpu_memory_utilization > 1:
            raise UsageError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be at most 1")

    @property
    def n_prompts_per_rollout_batch(self) -> int:
        return self.rollout_batch_size // self.group_size

    @property
    def micro_train_batch_size(self) -> int:
        return self.train_batch_size // self.gradient_accumulation_steps

    @property
    def is_off_policy(self) -> bool:
        """Whether some update of a step starts from weights that did not sample the batch."""
        return self.epochs_per_rollout_batch > 1 or self.train_batch_size < self.rollout_batch_size

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether a pass before the first update must keep log-probs; on-policy, each update's own pass has them."""
        return self.is_off_policy and self.loss_type in ("grpo_clip", "grpo_no_clip")

    def normalize_constant(self, n_response_tokens: int) -> float | None:
        """What `aggregation` divides by; the tokens are those of the whole optimizer step."""
        match self.aggregation:
            case "sequence_mean":
                return None
            case "token_mean":
                return float(n_response_tokens)
            case "constant":
                return float(self.sampling_max_tokens)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            n=self.group_size,
            temperature=self.sampling_temperature,
            min_tokens=self.sampling_min_tokens,
            max_tokens=self.sampling_max_tokens,
            stop=stop_strings(self.reward),
        )


_POSITIVE = (
    "n_grpo_steps",
    "learning_rate",
    "rollout_batch_size",
    "group_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "epochs_per_rollout_batch",
    "max_grad_norm",
    "sampling_temperature",
    "sampling_max_tokens",
    "eval_steps",
    "n_val_examples",
    "checkpoint_steps",
    "gpu_memory_utilization",
)
_NOT_NEGATIVE = ("cliprange", "advantage_eps", "sampling_min_tokens", "n_logged_completions")


@dataclass(frozen=True)
class EvaluateConfig:
    """Grade a model's responses to the questions of a jsonl file, and keep them all."""

    model_path: str = EMBEDDED_MODEL
    """Folder or hub name of a Hugging Face causal language model; a checkpoint of train.py is one."""
    data_path: str = "data/wordadd/validation.jsonl"
    """Questions: jsonl with `question` and `answer`."""
    prompt_path: str = "data/prompts/wordadd.prompt"
    """Template of a prompt: a text file that contains {question}."""
    reward: Literal["r1_zero", "question_only"] = "r1_zero"
    """How a response is graded: answer inside <answer> tags after </think>, or in \\boxed{} anywhere."""
    output_dir: str | None = None
    """Where results.json and completions.jsonl go; it must not hold another evaluation's. Left out: a new folder under
    runs/."""

    n_examples: int | None = None
    """Use this many questions, from the top; left out: all."""
    n_samples: int = 1
    """Responses per question."""
    sampling_temperature: float = 1.0
    """0 is greedy."""
    sampling_min_tokens: int = 0
    """Before this many tokens a response may not end."""
    sampling_max_tokens: int = 1024
    """A response is cut off here."""

    engine: Literal["vllm", "hf"] = "vllm"
    """What samples: vLLM, or the model's own `generate`."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, and on a CPU on which it measures faster."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU that vLLM may fill."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        for name in ("n_samples", "sampling_max_tokens", "gpu_memory_utilization"):
            _check_number(name, getattr(self, name), "must be greater than 0", above=0)
        for name in ("sampling_temperature", "sampling_min_tokens"):
            _check_number(name, getattr(self, name), "must not be negative", least=0)
        if self.n_examples is not None:
            _check_number("n_examples", self.n_examples, "must be greater than 0", above=0)

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            n=self.n_samples,
            temperature=self.sampling_temperature,
            min_tokens=self.sampling_min_tokens,
            max_tokens=self.sampling_max_tokens,
            stop=stop_strings(self.reward),
        )


def stop_strings(reward: str) -> tuple[str, ...]:
    """Where a response ends under each reward."""
    return ("</answer>",) if reward == "r1_zero" else ()


def _check_number(
    name: str, value: float, required: str, *, above: float = -math.inf, least: float = -math.inf
) -> None:
    if not (math.isfinite(value) and value > above and value >= least):
        raise UsageError(f"{name}={value} {required}")


def _check_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        lower = value - value % divisor
        nearest = f"{lower} or {lower + divisor}" if lower else f"{divisor}"
        raise UsageError(f"{name}={value} must be a multiple of {divisor_name}={divisor}: {nearest}, say")


def flag_given(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `--flag` among raw arguments, in any spelling that tyro takes; None when it is not there."""
    for index, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if has_value else (arguments[index + 1] if index + 1 < len(arguments) else "")
    return None


def parse_train_config(arguments: Sequence[str]) -> GrpoConfig:
    """Defaults, then the recipe's, then the flags. Without a recipe or a model, the quickstart."""
    recipe = flag_given(arguments, "--recipe")
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if recipe is None and flag_given(arguments, "--model-path") is None and not asks_for_help:
        print("No --model-path and no --recipe: this is the embedded quickstart (--recipe quickstart).", flush=True)
        recipe = "quickstart"
    defaults = GrpoConfig(recipe="quickstart", **QUICKSTART) if recipe == "quickstart" else GrpoConfig()
    config = parse(GrpoConfig, arguments, defaults)
    if config.model_path is None:
        raise UsageError("model_path=None: a folder or hub name is required, or --recipe quickstart, which names one")
    return config


Config = TypeVar("Config", GrpoConfig, EvaluateConfig)


def parse(kind: type[Config], arguments: Sequence[str], defaults: Config) -> Config:
    """The command line over `defaults`; a value that cannot be is one line on stderr and exit status 2."""
    return tyro.cli(kind, args=list(arguments), default=defaults)


def repository_path(path: str) -> Path:
    """`path` from the current folder, or else from the repository's: the shipped data are found from anywhere."""
    shipped = Path(__file__).resolve().parent.parent / path
    return shipped if not Path(path).exists() and shipped.exists() else Path(path)


def exit_with(program: str, error: Exception, status: int) -> None:
    """One clear line instead of a traceback."""
    print(f"{program}: {error}", file=sys.stderr)
    raise SystemExit(status)
