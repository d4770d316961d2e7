"""Settings of train.py."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from drivers.common.errors import UsageError
from drivers.settings.base import Settings, check_multiple, check_number, stop_strings
from drivers.settings.legality import EQUAL_GROUP_ADVANTAGES, RATIO_OBJECTIVES, check_combination
from drivers.settings.objectives import AdvantageName, ObjectiveName
from drivers.settings.reward_spec import check_reward, parse_mix
from drivers.settings.sampling import Sampling
from grpo_core import Aggregation, Counting, ImportanceLevel, KLEstimator

RecipeName = Literal[
    "quickstart",
    "grpo",
    "dr-grpo",
    "dapo",
    "gspo",
    "gspo-token",
    "gmpo",
    "luspo",
    "cispo",
    "sapo",
    "vespo",
    "dppo-tv",
    "dppo-kl",
    "clip-cov",
    "kl-cov",
    "rloo",
    "reinforce-plus-plus",
    "reinforce-plus-plus-baseline",
    "lite-ppo",
    "gdpo",
    "opo",
    "gpg",
    "maxrl",
    "remax",
    "pass-at-k",
    "pkpo",
    "entropy",
    "cs336",
    "trl-default",
    "verl-default",
    "openrlhf-default",
    "prime-rl-default",
    "open-instruct-default",
    "oat-default",
    "nano-aha-default",
    "skyrl-default",
]


@dataclass(frozen=True)
class GrpoConfig(Settings):
    """Train a language model with GRPO on questions whose answers can be checked."""

    program: ClassVar[str] = "train.py"
    title: ClassVar[str] = "GRPO"
    more: ClassVar[str] = "--n-grpo-steps"

    recipe: RecipeName | None = None
    """Named defaults for other flags. `quickstart`: SmolLM2-135M learns word problems on a laptop in minutes; it is
    what runs when neither this nor --model-path is given. Any other sets an objective, on the model and data of the
    quickstart or, with --model-path, on the defaults below."""

    model_path: str | None = None
    """Folder or hub name of a Hugging Face causal language model. Alone, it is the run of the defaults below."""
    data_path: str = "data/math/train.jsonl"
    """Training questions: jsonl with `question` and `answer` (drivers/convert_dataset.py makes it)."""
    val_data_path: str = "data/math/validation.jsonl"
    """Held-out questions, the same layout."""
    prompt_path: str = "data/prompts/r1_zero.prompt"
    """Template of a prompt: a text file that contains {question}."""
    reward: str = "r1_zero"
    """How a response is graded. `r1_zero`: answer inside <answer> tags after </think>; `question_only`: in \\boxed{}
    anywhere; `countdown`: the tags around an expression of the given numbers; or a function of your own,
    `my_module:function` or `path/to/file.py:function` (docs/grading.md)."""

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
    """Micro-batches per optimizer step; one holds train_batch_size / this many responses. Given, it wins over a
    recipe's --micro-batch-tokens."""
    epochs_per_rollout_batch: int = 1
    """Passes over each rollout batch; above 1 is off-policy."""

    loss_type: ObjectiveName = "reinforce_with_baseline"
    """The objective. All but the first two use the ratio to the policy that began the step (--old-policy). `gspo`,
    `gmpo` and `luspo` have one loss per response, all others one per token."""
    cliprange: float = 0.2
    """How far below 1 a ratio counts (`gmpo`: a log ratio below 0, in nats; `dppo_tv`: a difference of probabilities;
    `dppo_kl`: a divergence in nats)."""
    aggregation: Aggregation = "sequence_mean"
    """Tokens to loss: mean over each response, mean over all tokens of an optimizer step, mean over the tokens of each
    question, sum over each response, or that over sampling_max_tokens (`constant`: with --no-use-std-normalization,
    Dr. GRPO)."""
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
    """Of the responses of each step and each evaluation, how many are written out, token by token."""
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

    advantage: AdvantageName = "group"
    """From rewards to advantages. `group`: centered in the group and, with --use-std-normalization, scaled by it."""
    std_correction: Literal[0, 1] = 1
    """Of `group`: 1 divides the variance by G - 1, 0 by G."""
    pass_k: int = 4
    """The k of `pass_at_k` and `pkpo`."""
    reward_weights: tuple[float, float] = (1.0, 1.0)
    """Of `gdpo`: weights of the format reward and the answer reward. With --reward-mix it compares what that names,
    by the weights there."""
    length_penalty: Literal["none", "soft_overlong", "cosine"] = "none"
    """Added to the reward before advantages are taken. `soft_overlong`: down to -1 over the last --overlong-buffer
    tokens. `cosine`: in place of the reward, 2 to 1 for a right answer and -10 to 0 for a wrong one, by length; -10
    for one that was cut off."""
    overlong_buffer: int | None = None
    """Of `soft_overlong`, in tokens; left out: a fifth of sampling_max_tokens."""
    max_refills: int = 0
    """Dynamic sampling: groups without signal are replaced by those of new questions, in at most so many further
    rounds; what is missing then is left out, with a warning. 0: groups without signal stay."""

    cliprange_high: float | None = None
    """How far above 1 a ratio counts; left out: --cliprange."""
    dual_clip: float | None = None
    """Of `grpo_clip`: ratios of tokens with a negative advantage are cut here."""
    ratio_low: float = 0.0
    """Of `cispo`: weights are raised to this ratio."""
    ratio_high: float = 5.0
    """Of `cispo`: weights are cut at this ratio."""
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    """Of `sapo`: for positive and for other advantages."""
    covariance_fraction: float = 2e-4
    """Of `clip_cov` and `kl_cov`: share of the tokens of an optimizer step that is dropped or penalized."""
    covariance_bounds: tuple[float, float] = (1.0, 5.0)
    """Of `clip_cov`: between these covariances of advantage and log-prob."""
    kl_cov_coef: float = 1.0
    """Of `kl_cov`: weight of |log ratio| on the penalized tokens."""

    mask_truncated: bool = False
    """Leave responses that were cut off, and their tokens, out of the loss and its token counts (overlong filtering);
    --empty-responses says whether they still count as responses."""
    top_entropy_fraction: float | None = None
    """Take the loss over this share of an optimizer step's tokens, those of the highest entropy. Left out: all."""
    off_policy_threshold: float | None = None
    """Leave out responses with a negative advantage that the policy finds less likely than the sampler did by more
    than this, in nats per token (off-policy sequence masking). Left out: none."""
    rejected_tokens: Counting = "count"
    """Whether tokens left out by an importance ratio, an entropy or a covariance count in the denominators. Those of
    --off-policy-threshold always do."""
    empty_responses: Counting = "count"
    """Whether responses without tokens (left) count in the number of responses."""

    old_policy: Literal["trainer", "sampler"] = "trainer"
    """Whose log-probs a ratio is taken to: the trainer's own at the start of the step, or the sampler's as they came
    (two policies instead of three: the ratio then makes up for the sampler too)."""
    importance: Literal["none", "truncate", "mask", "reject"] = "none"
    """Make up for a sampler whose log-probs differ from the trainer's: weigh the objective by their ratio, cut at the
    bounds or 0 beyond them, or leave out what lies beyond them."""
    importance_level: ImportanceLevel = "token"
    """The ratio of a token, or the product (`sequence`) or geometric mean of those of a response."""
    importance_low: float = 0.0
    """Lower bound of the ratio."""
    importance_high: float = 2.0
    """Upper bound of the ratio."""
    self_normalize: bool = False
    """Divide importance weights by their mean over the optimizer step."""

    kl_coef: float = 0.0
    """Weight of the divergence from a reference; above 0, --kl-reference model holds a second copy of the model."""
    kl_estimator: KLEstimator = "k3"
    """Its estimate, token by token; in the loss k2 and ratio_k3 descend KL(policy, reference), k3 the other way."""
    kl_in: Literal["loss", "reward"] = "loss"
    """As a term of the loss, or subtracted from the advantages as reward-to-go (with k1)."""
    kl_reference: Literal["model", "sampler"] = "model"
    """To the model that training began from, or to the policy that sampled."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    entropy_target: float | None = None
    """Nats per token: in a step whose responses have less, by `rollout_entropy`, the coefficient rises by 0.005 and is
    applied; in any other it falls, within [0, 1], and is not. Left out: it is constant."""

    sampling_top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability. Below 1 the sampler's log-probs are of
    another distribution than the policy's: ratios to the sampler are refused."""
    micro_batch_tokens: int | None = None
    """Micro-batches of at most so many tokens, padding counted, in place of --gradient-accumulation-steps. However a
    batch is cut, the gradient is the same: more is faster, and takes more memory."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Of the policy. Flash attention, where it is installed, packs responses into one sequence without padding; the
    others share a group's prompt where that is cheaper. auto: sdpa, or eager for short rows on a CPU."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep what enters each layer and run it again in the backward pass: a third more time, far less memory. auto:
    where a micro-batch would not fit otherwise."""
    async_steps: Literal[0, 1] = 0
    """1: while a batch is trained on, vLLM samples the next one with the weights from before the update, on a GPU of
    its own or on shared cores. One update off-policy: it asks for --importance, or --old-policy sampler."""
    rollout_process: Literal["auto", "own", "shared"] = "auto"
    """Whether vLLM runs in a process of its own. auto: on a second GPU, where it must; on the CPU it may."""
    engine_deadline_s: float = 3600.0
    """In a process of its own, vLLM is ended and started again after so many seconds without an answer."""
    rollout_url: tuple[str, ...] = ()
    """Addresses of vLLM servers to sample with, in place of an engine of this program: http://HOST:PORT, any number
    of them. docs/scaling.md has the command that starts one."""
    lora_rank: int = 0
    """Above 0, train low-rank updates of the linear layers in place of the weights themselves (LoRA); checkpoints hold
    the merged model, and the update in a folder `adapter`."""
    lora_alpha: int = 32
    """Updates are scaled by lora_alpha / lora_rank."""
    reward_mix: tuple[str, ...] = ()
    """Of a --reward of your own that returns several numbers by name: the reward is their sum, weighted by these,
    `name=weight` each."""
    grader_workers: int = 0
    """Processes that grade; 0: half of the cores, at most 8."""
    grader_deadline_s: float = 10.0
    """Seconds for the grade of one response. What takes longer is not scored, and nothing is learned from it."""
    sampling_stop: tuple[str, ...] | None = None
    """Texts that end a response. Left out: </answer> under r1_zero and countdown, else none."""
    keep_checkpoints: int | None = None
    """Keep the newest so many and the best by held-out accuracy, and remove all others. Left out: of older ones the
    model is kept."""
    on_anomaly: Literal["auto", "stop", "skip", "warn"] = "auto"
    """What a loss, gradient, reward, entropy or distance to the sampler out of its range does: end the run, leave the
    update out, or no more than be told; docs/reliability.md has the limits. auto: stop where a number is not finite,
    else warn."""
    deterministic: bool = False
    """The same command gives the same bits on the same machine: float32 where --dtype is auto, for that is measured,
    and on a GPU torch's deterministic algorithms."""
    chat_template: bool = False
    """For instruct models: what --prompt-path makes of a question is the user's message in the tokenizer's chat
    template, and the token that ends a turn there ends a response."""
    system_prompt_path: str | None = None
    """Text file of the system message before it. Left out: none, or what the chat template has for one."""
    curriculum_steps: int = 0
    """Begin with easy questions: over so many steps, those drawn from grow from the easiest to all, by the `pass_rate`
    of their lines (drivers/pass_rates.py measures it). 0: all, from the first step."""
    resume: str | None = None
    """Go on with a run: its folder, or one of its checkpoints; the run's own settings hold where no flag says
    otherwise. `auto`: what is in --save-dir, if anything is."""
    show: bool = False
    """Print the resolved settings and the loss as a formula, and stop."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            check_number(name, getattr(self, name), "must be greater than 0", above=0)
        for name in _NOT_NEGATIVE:
            check_number(name, getattr(self, name), "must not be negative", least=0)
        check_multiple("rollout_batch_size", self.rollout_batch_size, "group_size", self.group_size)
        check_multiple("rollout_batch_size", self.rollout_batch_size, "train_batch_size", self.train_batch_size)
        if self.micro_batch_tokens is None:
            steps = self.gradient_accumulation_steps
            check_multiple("train_batch_size", self.train_batch_size, "gradient_accumulation_steps", steps)
        else:
            check_number("micro_batch_tokens", self.micro_batch_tokens, "must be greater than 0", above=0)
        for name, high in (("top_entropy_fraction", 1.0), ("covariance_fraction", 1.0), ("sampling_top_p", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= high:
                raise UsageError(f"{name}={value} must be greater than 0 and at most {high:g}")
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and math.isnan(number):
                    raise UsageError(f"{name}={value} must be a number")
        if self.keep_checkpoints is not None:
            check_number("keep_checkpoints", self.keep_checkpoints, "must be greater than 0", above=0)
        for url in self.rollout_url:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise UsageError(f"rollout_url={url}: the address of a server is required, like http://127.0.0.1:8000")
        idle = {"lora_alpha": "lora_rank above 0"} if self.lora_rank == 0 else {}
        idle |= {"gpu_memory_utilization": "no rollout_url"} if self.rollout_url else {}
        idle |= {} if self.chat_template else {"system_prompt_path": "chat_template"}
        for name, other in idle.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"{name}={getattr(self, name)} has no effect: it asks for {other}")
        if self.resume == "auto" and self.save_dir is None:
            raise UsageError("resume=auto: save_dir is required, the folder to go on in; or name a run's folder")
        check_reward(self.reward, self.reward_mix)
        check_combination(self)
        if self.sampling_min_tokens > self.sampling_max_tokens:
            raise UsageError(
                f"sampling_min_tokens={self.sampling_min_tokens} must not exceed "
                f"sampling_max_tokens={self.sampling_max_tokens}"
            )
        if self.gpu_memory_utilization > 1:
            raise UsageError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be at most 1")

    @property
    def collective_timeout_s(self) -> float:
        """How long the other ranks may have to wait for the first: it asks in rounds, and starts a dead engine."""
        return (4 + self.max_refills) * self.engine_deadline_s + 1800

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
    def warnings(self) -> list[str]:
        """What is legal, and hardly what was meant."""
        said = []
        if self.loss_type in ("gspo", "gspo_token", "luspo") and self.cliprange >= 0.05:
            said.append(
                f"cliprange={self.cliprange:g} hardly ever binds a mean of log ratios: the papers have 0.0003 (GSPO) "
                "and 0.002 (LUSPO)"
            )
        if self.lora_rank and self.learning_rate < 5e-5:
            said.append(
                f"learning_rate={self.learning_rate:g} is low for LoRA, which is trained at about ten times the rate "
                "of whole models: 1e-4, say"
            )
        if self.curriculum_steps > self.n_grpo_steps:
            said.append(
                f"curriculum_steps={self.curriculum_steps} is more than n_grpo_steps={self.n_grpo_steps}: the hardest "
                "questions are never asked"
            )
        return said

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def has_regularization_gradient(self) -> bool:
        """Whether there is a gradient where no group has two different rewards, although these teach nothing then."""
        silent_teach = self.loss_type == "no_baseline" or self.advantage in EQUAL_GROUP_ADVANTAGES
        return (self.has_entropy_bonus or self.kl_coef > 0) and not silent_teach and self.length_penalty == "none"

    @property
    def penalized_tokens(self) -> int:
        """The last tokens before the limit, over which `soft_overlong` grows."""
        return self.sampling_max_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer

    @property
    def uses_current_policy_as_old(self) -> bool:
        """Whether the policy that began the step is still the policy of each pass."""
        return not self.is_off_policy and self.old_policy == "trainer"

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether a pass before the first update must score the rollouts; on-policy, each update's own pass has it."""
        uses_ratio = self.loss_type in RATIO_OBJECTIVES or (self.kl_coef > 0 and self.kl_estimator == "ratio_k3")
        corrects_before = self.importance != "none" and not self.computes_importance_weights_in_forward
        off_policy = self.is_off_policy and uses_ratio and self.old_policy == "trainer"
        return corrects_before or off_policy or self._chooses_by_old_policy

    @property
    def _chooses_by_old_policy(self) -> bool:
        """Whether tokens or rewards are weighed by what the policy said of a whole batch before the update."""
        return (
            self.loss_type in ("clip_cov", "kl_cov")
            or self.top_entropy_fraction is not None
            or (self.kl_coef > 0 and self.kl_in == "reward")
        )

    @property
    def computes_importance_weights_in_forward(self) -> bool:
        """Whether importance weights come from the same pass as the loss: each then needs its own response alone."""
        of_each_response = not self.self_normalize and self.rejected_tokens == "count"
        own_pass = self.uses_current_policy_as_old and not self._chooses_by_old_policy
        return self.importance != "none" and of_each_response and own_pass

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the model is held."""
        return self.kl_coef > 0 and self.kl_reference == "model"

    @property
    def weights_of_parts(self) -> dict[str, float]:
        """Of what `gdpo` normalizes on its own."""
        names = ("format_reward", "answer_reward")
        return parse_mix(self.reward_mix) or dict(zip(names, self.reward_weights, strict=True))

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            n=self.group_size,
            temperature=self.sampling_temperature,
            min_tokens=self.sampling_min_tokens,
            max_tokens=self.sampling_max_tokens,
            stop=stop_strings(self.reward) if self.sampling_stop is None else self.sampling_stop,
            top_p=self.sampling_top_p,
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
    "engine_deadline_s",
    "grader_deadline_s",
    "pass_k",
    "kl_cov_coef",
    "lora_alpha",
)


_NOT_NEGATIVE = (
    "cliprange",
    "advantage_eps",
    "sampling_min_tokens",
    "n_logged_completions",
    "max_refills",
    "ratio_low",
    "kl_coef",
    "entropy_coef",
    "lora_rank",
    "grader_workers",
    "curriculum_steps",
)
