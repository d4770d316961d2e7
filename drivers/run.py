"""A run around its loop: the parts that it is built from, and what it shows, writes and checks on the way."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from drivers.checkpoint import save_checkpoint
from drivers.config import GrpoConfig
from drivers.curves import draw_curves
from drivers.data import Question, load_examples, load_prompt_template, make_questions
from drivers.display import Display
from drivers.errors import UnsoundRunError, UsageError
from drivers.evaluate import REWARDS, evaluate_policy
from drivers.memory import settle_memory, weight_bytes
from drivers.models import (
    choose_device,
    choose_dtype,
    context_length,
    default_policy_device,
    default_rollout_device,
    keep_freed_memory,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from drivers.optim import training_state_bytes
from drivers.rollout import RolloutEngine, make_engine
from drivers.run_log import RunLog, abandon_run_folder, create_run_folder
from drivers.self_check import DEFAULT_TOLERANCE, Agreement, check_engine
from grpo_core import RewardFn

N_SELF_CHECK_PROMPTS = 4
EVALUATION_SEED = 1 << 30
RUN_MARKER = "metrics.jsonl"


class Run:
    """The folder, the log and the screen of one training run."""

    def __init__(self, config: GrpoConfig, folder: Path, tokenizer: Any, display: Display) -> None:
        self.config, self.folder, self.tokenizer, self.display = config, folder, tokenizer, display
        self.step = 0
        """The last step whose updates are all in the weights."""
        self._log = RunLog(folder, config)
        self._seconds: dict[str, float] = {}
        self._is_in_background = False
        self._accuracies: list[float] = []
        # A thousand tokens tell enough, whatever the length limit of the run.
        longest = min(config.sampling_max_tokens, config.sampling_min_tokens + 64)
        # Not top-p: its log-probs are of another distribution, however well the weights agree.
        self._check_sampling = replace(config.sampling, n=min(8, config.group_size), max_tokens=longest, top_p=1.0)

    def steps(self) -> Iterator[int]:
        """1, 2, ... n_grpo_steps."""
        for step in range(1, self.config.n_grpo_steps + 1):
            self._seconds.clear()
            self.display.begin_step()
            yield step

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block, and show it as what is going on."""
        return self.display.phase(name, self._seconds, shown=not self._is_in_background)

    def in_background(self) -> "Run":
        """The same run for another thread: its times are its own, and what it does is not shown as going on."""
        twin = copy.copy(self)
        twin._seconds, twin._is_in_background = {}, True
        return twin

    def add_times(self, twin: "Run") -> None:
        """What was done in the background for this step."""
        for name, seconds in twin._seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def sampling_seed(self, step: int, refill: int = 0) -> int:
        """Another noise stream for each step and each refill of it; one response uses one seed."""
        batches = step * (1 + self.config.max_refills) + refill
        return ((self.config.seed << 32) + batches * self.config.rollout_batch_size) % 2**62

    def warn(self, text: str) -> None:
        """What a person should know of a step, and the run survives."""
        self.display.say(f"warning: {text}")

    def check_engine(
        self, engine: RolloutEngine, policy: nn.Module, prompts: Sequence[Question], *, version: int
    ) -> Agreement:
        """Stop the run unless the engine samples from the policy's weights."""
        tolerance = self.config.self_check_tolerance
        if tolerance is None:
            tolerance = DEFAULT_TOLERANCE[next(policy.parameters()).dtype]
        with self.phase("check"):
            agreement = check_engine(
                engine,
                policy,
                [question.prompt_token_ids for question in prompts[:N_SELF_CHECK_PROMPTS]],
                self._check_sampling,
                version=version,
                tolerance=tolerance,
                seed=EVALUATION_SEED - 1,
            )
        self._log.log("check", version, asdict(agreement))
        self.display.say(f"self-check at step {version}: {agreement}; {tolerance:g} mean allowed")
        return agreement

    def evaluate(
        self, engine: RolloutEngine, questions: Sequence[Question], reward_fn: RewardFn, *, step: int
    ) -> None:
        """Held-out accuracy, logged and shown with some completions. The same noise at every evaluation."""
        with self.phase("evaluate"):
            values, rows = evaluate_policy(
                engine, questions, self.config.sampling.alone(), reward_fn, seed=EVALUATION_SEED
            )
        self._accuracies.append(values["accuracy"])
        shown = rows[: self.config.n_logged_completions]
        self._log.log("eval", step, values | {"time_evaluate_s": self._seconds["evaluate"]})
        self._log.log_completions(step, shown)
        self.display.show_evaluation(step, values, shown)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """The step's line everywhere."""
        times = {f"time_{name}_s": seconds for name, seconds in self._seconds.items()}
        speed = {
            "rollout_tokens_per_s": values["sampled_tokens"] / self._seconds["rollout"],
            "update_tokens_per_s": values["trained_tokens"] / self._seconds["update"],
        }
        values = {**values, **speed, **times, "learning_rate": self.config.learning_rate}
        self._log.log("train", step, values)
        self.display.end_step(step, values)

    def save(self, policy: nn.Module, name: str, step: int) -> Path:
        """A checkpoint that transformers and vLLM load."""
        with self.phase("save"):
            try:
                return save_checkpoint(policy, self.tokenizer, self.folder / name, step=step)
            except OSError as error:
                raise UnsoundRunError(f"{self.folder / name}: no checkpoint can be written ({error})") from error

    def summary(self) -> str:
        """What the run came to."""
        first, last = self._accuracies[0], self._accuracies[-1]
        return f"held-out accuracy {first:.3f} before the first step, {last:.3f} after step {self.step}"

    def finish(self) -> None:
        """Close the log and draw its picture."""
        self._log.close()
        draw_curves(self.folder)


class Parts(NamedTuple):
    """What `train` is given beside its settings."""

    policy: nn.Module
    engine: RolloutEngine
    reward_fn: RewardFn
    train_set: list[Question]
    val_set: list[Question]
    reference: nn.Module | None = None
    """What a divergence is taken from: the model as it was before training, frozen."""


def prepare(config: GrpoConfig, display: Display) -> tuple[Run, Parts]:
    """Everything that the settings name. Cheap checks first: a bad file stops the run before a model is loaded."""
    examples = load_examples("--data-path", config.data_path)
    val_examples = load_examples("--val-data-path", config.val_data_path)[: config.n_val_examples]
    if len(examples) < config.n_prompts_per_rollout_batch:
        raise UsageError(
            f"--data-path {config.data_path}: holds {len(examples)} questions, and a step asks "
            f"{config.n_prompts_per_rollout_batch} different ones (rollout_batch_size / group_size): "
            "lower --rollout-batch-size or raise --group-size"
        )
    template = load_prompt_template(config.prompt_path)
    devices = choose_devices(config)
    assert config.model_path is not None  # the command line refuses that
    model_path = resolve_model(config.model_path)
    tokenizer = load_tokenizer(model_path)
    context = context_length(model_path)
    train_set, val_set = (
        make_questions(part, template, tokenizer, max_new_tokens=config.sampling_max_tokens, context=context)
        for part in (examples, val_examples)
    )
    name = config.recipe or Path(config.model_path).name
    folder = create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
    try:
        longest = max(len(question.prompt_token_ids) for question in (*train_set, *val_set))
        policy, reference, engine = load_models(config, display, model_path, tokenizer, devices, longest)
    except BaseException:
        abandon_run_folder(folder, RUN_MARKER)
        raise
    display.say(f"{len(train_set)} training and {len(val_set)} held-out questions; run folder {folder}/")
    run = Run(config, folder, tokenizer, display)
    for warning in config.warnings:
        run.warn(warning)
    return run, Parts(policy, engine, REWARDS[config.reward], train_set, val_set, reference)


def choose_devices(config: GrpoConfig) -> tuple[torch.device, torch.device]:
    """Where the policy and the engine run."""
    policy_device = choose_device("--policy-device", config.policy_device, default_policy_device())
    elsewhere = policy_device if config.engine == "hf" else default_rollout_device(policy_device)
    rollout_device = choose_device("--rollout-device", config.rollout_device, elsewhere)
    if rollout_device.type != policy_device.type or (config.engine == "hf" and rollout_device != policy_device):
        raise UsageError(
            f"--rollout-device {rollout_device}: the policy is on {policy_device}; both on the CPU or both on CUDA is "
            "required, and with --engine hf the same device"
        )
    together = rollout_device == policy_device
    if config.rollout_process == "own" and config.engine == "hf":
        raise UsageError("--rollout-process own: --engine hf shares the policy's weights; pass --rollout-process auto")
    if config.rollout_process == "own" and together and policy_device.type == "cuda":
        raise UsageError(
            f"--rollout-process own: policy and engine take turns on {policy_device}, in one process: a second GPU is "
            "required (--rollout-device), or pass --rollout-process auto"
        )
    if config.rollout_process == "shared" and not together:
        raise UsageError(
            f"--rollout-process shared: vLLM on {rollout_device} and the policy on {policy_device} are two processes; "
            "pass --rollout-process auto"
        )
    if config.async_steps and together and policy_device.type == "cuda":
        raise UsageError(
            f"--async-steps {config.async_steps}: policy and engine take turns on {policy_device}: a second GPU is "
            "required (--rollout-device), or pass --async-steps 0"
        )
    return policy_device, rollout_device


def load_models(
    config: GrpoConfig,
    display: Display,
    model_path: str,
    tokenizer: Any,
    devices: tuple[torch.device, torch.device],
    longest_prompt: int,
) -> tuple[nn.Module, nn.Module | None, RolloutEngine]:
    """Policy, frozen reference where one is needed, and engine: what takes long. Says what they are."""
    display.say("Loading the model ...")
    policy_device, rollout_device = devices
    dtype = choose_dtype(config.dtype, policy_device)
    if policy_device.type == "cpu":
        keep_freed_memory()
    longest_row = longest_prompt + config.group_size * config.sampling_max_tokens
    policy = load_policy(model_path, policy_device, dtype, longest_row, config.attention)
    reference, reference_bytes = None, 0
    if config.needs_reference:
        reference = load_policy(model_path, policy_device, dtype, longest_row, config.attention).requires_grad_(False)
        reference_bytes = weight_bytes(reference)
    plan = settle_memory(config, policy, longest_prompt, reference_bytes, rollout_device)
    engine = make_engine(
        config.engine,
        model_path=model_path,
        policy=policy,
        tokenizer=tokenizer,
        device=rollout_device,
        dtype=dtype,
        max_model_len=longest_prompt + config.sampling_max_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=training_state_bytes(policy) + reference_bytes,
        seed=config.seed,
        own_process=config.rollout_process == "own",
        deadline_s=config.engine_deadline_s,
        say=display.say,
    )
    display.say(
        f"{config.model_path}: {sum(p.numel() for p in policy.parameters()) / 1e6:.0f} M parameters, "
        f"{str(dtype).removeprefix('torch.')}, policy on {policy_device}, {config.engine} on {rollout_device}"
    )
    display.say(f"memory: {plan}")
    if not plan.fits:
        display.say("warning: that may not fit: lower --micro-batch-tokens, or pass --gradient-checkpointing on")
    return policy, reference, engine
