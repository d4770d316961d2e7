"""Settings of the programs that imitate: fine-tuning on demonstrations, and expert iteration."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from drivers.settings.base import Settings, check_number
from drivers.settings.grpo import GrpoConfig
from drivers.settings.recipes import QUICKSTART
from grpo_core import Aggregation


@dataclass(frozen=True)
class Imitation(Settings):
    """What both have; a flag means what it means in train.py."""

    model_path: str | None = None
    """Folder or hub name of a Hugging Face causal language model. Left out: the embedded quickstart."""
    data_path: str = ""
    val_data_path: str = "data/math/validation.jsonl"
    """Held-out questions: jsonl with `question` and `answer`."""
    prompt_path: str = "data/prompts/r1_zero.prompt"
    """Template of a prompt: a text file that contains {question}."""
    reward: str = "r1_zero"
    """How a response is graded. `r1_zero`: answer inside <answer> tags after </think>; `question_only`: in \\boxed{}
    anywhere; `countdown`: the tags around an expression of the given numbers; or a function of your own,
    `my_module:function` or `path/to/file.py:function` (docs/grading.md)."""

    learning_rate: float = 2e-5
    """Of AdamW, constant; betas (0.9, 0.95), no weight decay."""
    train_batch_size: int = 64
    """Responses per optimizer step; the last one of a pass has what is left."""
    micro_batch_tokens: int = 8192
    """Micro-batches of at most so many tokens, padding counted. However a batch is cut, the gradient is the same: more
    is faster, and takes more memory."""
    aggregation: Aggregation = "token_mean"
    """Tokens to loss: mean over all tokens of an optimizer step, mean over each response, sum over each response, or
    that over sampling_max_tokens (`constant`)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    sampling_temperature: float = 1.0
    """Of what is sampled, in evaluations too."""
    sampling_min_tokens: int = 4
    """Before this many tokens the sampler may not end a response."""
    sampling_max_tokens: int = 1024
    """A response is cut off here."""
    sampling_stop: tuple[str, ...] | None = None
    """Texts that end a response. Left out: </answer> under r1_zero and countdown, else none."""

    eval_steps: int = 5
    """Evaluate before the first step, then every so many, and at the end."""
    n_val_examples: int = 1024
    """Held-out questions per evaluation, one response each; fewer if the file has fewer."""
    n_logged_completions: int = 8
    """Of the responses of each step and each evaluation, how many are written out, token by token."""
    checkpoint_steps: int = 10
    """Write a checkpoint every so many steps."""
    keep_checkpoints: int | None = None
    """Keep the newest so many and the best by held-out accuracy, and remove all others. Left out: of older ones the
    model is kept."""
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
    rollout_process: Literal["auto", "own", "shared"] = "auto"
    """Whether vLLM runs in a process of its own. auto: on a second GPU, where it must; on the CPU it may."""
    rollout_url: tuple[str, ...] = ()
    """Addresses of vLLM servers to sample with, in place of an engine of this program: http://HOST:PORT."""
    engine_deadline_s: float = 3600.0
    """In a process of its own, vLLM is ended and started again after so many seconds without an answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What policy and engine compute in; master weights and optimizer are float32 in any case.
    auto: bfloat16 on a GPU, and on a CPU on which it measures faster."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Of the policy. auto: sdpa, or eager for short rows on a CPU."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep what enters each layer and run it again in the backward pass. auto: where a micro-batch would not fit
    otherwise."""
    gpu_memory_utilization: float = 0.85
    """Share of its GPU that vLLM may fill; on a GPU shared with the policy, the share while it samples."""
    self_check_tolerance: float | None = None
    """Largest mean |log-prob difference| in nats between vLLM and the policy on vLLM's own samples. Left out: 0.001 in
    float32, 0.08 in bfloat16."""
    lora_rank: int = 0
    """Above 0, train low-rank updates of the linear layers in place of the weights themselves (LoRA)."""
    lora_alpha: int = 32
    """Updates are scaled by lora_alpha / lora_rank."""
    reward_mix: tuple[str, ...] = ()
    """Of a --reward of your own that returns several numbers by name: the reward is their sum, weighted by these,
    `name=weight` each."""
    grader_workers: int = 0
    """Processes that grade; 0: half of the cores, at most 8."""
    grader_deadline_s: float = 10.0
    """Seconds for the grade of one response. What takes longer is not scored."""
    on_anomaly: Literal["auto", "stop", "skip", "warn"] = "auto"
    """What a loss, gradient or entropy out of its range does: end the run, leave the update out, or no more than be
    told. auto: stop where a number is not finite, else warn."""
    deterministic: bool = False
    """The same command gives the same bits on the same machine."""
    chat_template: bool = False
    """For instruct models: what --prompt-path makes of a question is the user's message in the tokenizer's chat
    template, and the token that ends a turn there ends a response."""
    system_prompt_path: str | None = None
    """Text file of the system message before it. Left out: none, or what the chat template has for one."""
    seed: int = 0
    """Of the order of what is trained on, and of sampling."""
    resume: str | None = None
    """Go on with a run: its folder, or one of its checkpoints; the run's own settings hold where no flag says
    otherwise. `auto`: what is in --save-dir, if anything is."""

    def __post_init__(self) -> None:
        check_number("train_batch_size", self.train_batch_size, "must be greater than 0", above=0)

    def as_grpo(self, **own: Any) -> GrpoConfig:
        """What the parts of train.py are given; it checks all else that is shared.

        -log pi is the loss of REINFORCE without a baseline for a reward of 1.
        """
        known = {field.name for field in fields(GrpoConfig)}
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name in known}
        fixed: dict[str, Any] = {"loss_type": "no_baseline", "use_std_normalization": False}
        return GrpoConfig(**(shared | fixed | own))


@dataclass(frozen=True)
class SftConfig(Imitation):
    """Fine-tune a language model on demonstrations, prompts with the responses that they should have."""

    program: ClassVar[str] = "sft.py"
    title: ClassVar[str] = "SFT"
    more: ClassVar[str] = "--epochs"

    data_path: str = "data/math/sft.jsonl"
    """Demonstrations: jsonl with `response`, and `question`, to which --prompt-path gives its form, or `prompt`, which
    is the whole; perhaps `answer`. A response that ends with no stop string is given the model's end token."""
    epochs: int = 1
    """Passes over the demonstrations."""
    n_examples: int | None = None
    """Train on so many demonstrations, chosen by the seed: those of a smaller number are among those of a larger one.
    Left out: on all."""
    correct_only: bool = False
    """Before that, leave out demonstrations whose response is not graded with 1 against their `answer`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("epochs", self.epochs, "must be greater than 0", above=0)
        if self.n_examples is not None:
            check_number("n_examples", self.n_examples, "must be greater than 0", above=0)
        self.of(self.train_batch_size)

    def of(self, n_examples: int) -> GrpoConfig:
        """Of a run on so many demonstrations."""
        size = self.train_batch_size
        return self.as_grpo(n_grpo_steps=self.epochs * -(-n_examples // size), rollout_batch_size=size, group_size=1)


@dataclass(frozen=True)
class ExpertIterationConfig(Imitation):
    """Train a language model on those of its own responses that are right (expert iteration)."""

    program: ClassVar[str] = "expert_iteration.py"
    title: ClassVar[str] = "Expert iteration"
    more: ClassVar[str] = "--n-ei-steps"

    data_path: str = "data/math/train.jsonl"
    """Training questions: jsonl with `question` and `answer` (drivers/convert_dataset.py makes it)."""
    learning_rate: float = 1e-5
    """Of AdamW, constant; betas (0.9, 0.95), no weight decay."""
    n_ei_steps: int = 5
    """Times to sample, and to train on what is right of it."""
    question_batch_size: int = 512
    """Questions asked per step."""
    group_size: int = 8
    """Responses to each. Those with a reward of 1 are trained on, token for token."""
    epochs: int = 1
    """Passes over them."""
    eval_steps: int = 1
    """Evaluate before the first step, then every so many, and at the end."""
    checkpoint_steps: int = 1
    """Write a checkpoint every so many steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_ei_steps", "question_batch_size", "group_size", "epochs"):
            check_number(name, getattr(self, name), "must be greater than 0", above=0)
        self.of()

    def of(self) -> GrpoConfig:
        """Its optimizer steps have their size from `train_batch_size`: what is right need not be a multiple of it."""
        sampled = self.question_batch_size * self.group_size
        return self.as_grpo(n_grpo_steps=self.n_ei_steps, rollout_batch_size=sampled, train_batch_size=sampled)


_SHARED = ("model_path", "val_data_path", "prompt_path", "sampling_min_tokens", "sampling_max_tokens")


_TASK = {name: QUICKSTART[name] for name in (*_SHARED, "micro_batch_tokens", "n_val_examples", "learning_rate")}


QUICKSTARTS: dict[type[Imitation], dict[str, Any]] = {
    SftConfig: {
        **_TASK,
        "data_path": "data/wordadd/sft.jsonl",
        "correct_only": True,  # with --no-correct-only it learns the form, and to be wrong
        "n_examples": 256,
        "train_batch_size": 32,
    },
    ExpertIterationConfig: {
        **_TASK,
        "data_path": QUICKSTART["data_path"],
        "n_ei_steps": 3,
        "question_batch_size": 32,
        "train_batch_size": 32,
        "epochs": 2,
    },
}
