"""A run around its loop: the parts that it is built from, and what it shows, writes and checks on the way."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from drivers import ranks
from drivers.checkpoint import (
    TENSORS,
    drop_older_tensors,
    find_checkpoint,
    read_facts,
    read_tensors,
    save_checkpoint,
)
from drivers.config import GrpoConfig
from drivers.curves import draw_curves
from drivers.data import Question, load_examples, load_prompt_template, make_questions
from drivers.display import Display
from drivers.errors import UnsoundRunError, UsageError
from drivers.evaluate import REWARDS, evaluate_policy
from drivers.lora import add_lora
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
from drivers.rollout import FollowingEngine, HFReplica, RolloutEngine, make_engine
from drivers.run_log import NoLog, RunLog, abandon_run_folder, create_run_folder
from drivers.self_check import DEFAULT_TOLERANCE, Agreement, check_engine
from drivers.state import TrainingState
from drivers.weights import PolicyWeights
from grpo_core import RewardFn

N_SELF_CHECK_PROMPTS = 4
EVALUATION_SEED = 1 << 30
RUN_MARKER = "metrics.jsonl"


class Run:
    """The folder, the log and the screen of one training run."""

    def __init__(
        self, config: GrpoConfig, folder: Path, tokenizer: Any, display: Display, checkpoint: Path | None = None
    ) -> None:
        """`checkpoint`: of this run, to go on from; what was logged after it is dropped."""
        self.config, self.folder, self.tokenizer, self.display = config, folder, tokenizer, display
        self.state: TrainingState | None = None
        self._checkpoint = checkpoint
        self._begun_after = -1 if checkpoint is None else int(read_facts(checkpoint)["step"])
        self._log = RunLog(folder, config, after=self._begun_after) if ranks.is_first() else NoLog()
        self._seconds: dict[str, float] = {}
        self._is_in_background = False
        # A thousand tokens tell enough, whatever the length limit of the run.
        longest = min(config.sampling_max_tokens, config.sampling_min_tokens + 64)
        # Not top-p: its log-probs are of another distribution, however well the weights agree.
        self._check_sampling = replace(config.sampling, n=min(8, config.group_size), max_tokens=longest, top_p=1.0)

    @property
    def step(self) -> int:
        """The last step whose updates are all in the weights."""
        return 0 if self.state is None else self.state.step

    def begin(self, state: TrainingState) -> TrainingState:
        """The state of this run: as it is, or filled from the checkpoint."""
        if self._checkpoint is not None:
            try:
                read_tensors(self._checkpoint / TENSORS, state.tensors())
                state.restore(read_facts(self._checkpoint))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"--resume {self._checkpoint}: cannot be gone on from ({error})") from error
            self.display.say(f"Going on after step {state.step}, from {self._checkpoint}/")
        self.state = state
        return state

    def steps(self) -> Iterator[int]:
        """The next one, ... n_grpo_steps."""
        for step in range(self.step + 1, self.config.n_grpo_steps + 1):
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
            tolerance = DEFAULT_TOLERANCE[ranks.computing_dtype(policy)]
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
        if version > self._begun_after:  # that of a start from a checkpoint belongs to no step
            self._log.log("check", version, asdict(agreement))
        self.display.say(f"self-check at step {version}: {agreement}; {tolerance:g} mean allowed")
        return agreement

    def evaluate(
        self, engine: RolloutEngine, questions: Sequence[Question], reward_fn: RewardFn, *, step: int
    ) -> None:
        """Held-out accuracy, logged and shown with some completions. The same noise at every evaluation."""
        with self.phase("evaluate"):
            values, rows = ranks.lead(
                lambda: evaluate_policy(
                    engine, questions, self.config.sampling.alone(), reward_fn, seed=EVALUATION_SEED
                )
            )
        if self.state is not None:
            self.state.accuracies.append(values["accuracy"])
        shown = rows[: self.config.n_logged_completions]
        self._log.log("eval", step, values | {"time_evaluate_s": self._seconds["evaluate"]})
        self._log.log_completions(step, shown)
        self.display.show_evaluation(step, values, shown)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """The step's line everywhere."""
        times = {f"time_{name}_s": seconds for name, seconds in self._seconds.items()}
        speed = {"update_tokens_per_s": values["trained_tokens"] / self._seconds["update"]}
        if "rollout" in self._seconds:  # not where they came with the checkpoint
            speed["rollout_tokens_per_s"] = values["sampled_tokens"] / self._seconds["rollout"]
        values = {**values, **speed, **times, "learning_rate": self.config.learning_rate}
        self._log.log("train", step, values)
        self.display.end_step(step, values)

    def save(self, policy: nn.Module, name: str) -> Path:
        """A checkpoint that transformers and vLLM load, and that training goes on from unless it is in mid-step."""
        assert self.state is not None
        folder, seconds = self.folder / name, dict[str, float]()
        whole = self.state.is_whole and name.startswith("checkpoint")
        with self.display.phase("save", seconds):
            try:
                save_checkpoint(
                    policy,
                    self.tokenizer,
                    folder,
                    facts=self.state.facts() if whole else {"step": self.state.step},
                    tensors=self.state.tensors() if whole else None,
                )
                if whole and ranks.is_first():
                    drop_older_tensors(self.folder, folder)
            except OSError as error:
                raise UnsoundRunError(f"{folder}: no checkpoint can be written ({error})") from error
        self._log.log("save", self.state.step, {"time_save_s": seconds["save"]})
        return folder

    def last_checkpoint(self) -> Path | None:
        """If it holds all that was made since."""
        newest = find_checkpoint(self.folder)
        whole = self.state is not None and self.state.is_whole
        return newest if whole and newest is not None and read_facts(newest)["step"] == self.step else None

    def summary(self) -> str:
        """What the run came to."""
        assert self.state is not None
        first, last = self.state.accuracies[0], self.state.accuracies[-1]
        return f"held-out accuracy {first:.3f} before the first step, {last:.3f} after step {self.step}"

    def finish(self) -> None:
        """Close the log and draw its picture."""
        self._log.close()
        if ranks.is_first():
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
    model_path = ranks.lead(partial(resolve_model, config.model_path))
    tokenizer = load_tokenizer(model_path)
    context = context_length(model_path)
    train_set, val_set = (
        make_questions(part, template, tokenizer, max_new_tokens=config.sampling_max_tokens, context=context)
        for part in (examples, val_examples)
    )
    folder, checkpoint = ranks.lead(partial(open_run_folder, config))
    try:
        longest = max(len(question.prompt_token_ids) for question in (*train_set, *val_set))
        policy, reference, engine = load_models(config, display, model_path, tokenizer, devices, longest)
    except BaseException:
        if ranks.is_first() and checkpoint is None:
            abandon_run_folder(folder, RUN_MARKER)
        raise
    display.say(f"{len(train_set)} training and {len(val_set)} held-out questions; run folder {folder}/")
    run = Run(config, folder, tokenizer, display, checkpoint)
    for warning in config.warnings:
        run.warn(warning)
    return run, Parts(policy, engine, REWARDS[config.reward], train_set, val_set, reference)


def open_run_folder(config: GrpoConfig) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint in it to go on from, if there is one."""
    name = config.recipe or Path(str(config.model_path)).name
    if config.resume is None:
        return create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER), None
    if config.resume != "auto":
        checkpoint = find_checkpoint(Path(config.resume))
        if checkpoint is None:
            raise UsageError(
                f"--resume {config.resume}: a checkpoint with a folder {TENSORS}, or a run that has one, is required"
            )
        return checkpoint.parent, checkpoint
    assert config.save_dir is not None  # the settings refuse that
    folder = Path(config.save_dir)
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:  # ended before its first one
        (folder / RUN_MARKER).unlink(missing_ok=True)
        create_run_folder("--save-dir", config.save_dir, name, marker=RUN_MARKER)
    return folder, checkpoint


def choose_devices(config: GrpoConfig) -> tuple[torch.device, torch.device]:
    """Where the policy of this process and the engine run."""
    policy_device = choose_device("--policy-device", config.policy_device, default_policy_device())
    if ranks.size() > 1:
        policy_device = device_of_rank(config, policy_device)
    if config.rollout_url:
        if config.engine == "hf" or config.rollout_process != "auto" or config.rollout_device != "auto":
            raise UsageError(
                f"--rollout-url {' '.join(config.rollout_url)}: the servers are the engine; --engine vllm is "
                "required, and neither --rollout-device nor --rollout-process"
            )
        return policy_device, policy_device
    if config.engine == "hf":
        elsewhere = policy_device
    elif ranks.size() > 1 and policy_device.type == "cuda":
        elsewhere = torch.device("cuda", int(os.environ["LOCAL_WORLD_SIZE"]))  # the first one after theirs
    else:
        elsewhere = default_rollout_device(policy_device)
    rollout_device = choose_device("--rollout-device", config.rollout_device, elsewhere)
    if rollout_device.type != policy_device.type or (config.engine == "hf" and rollout_device != policy_device):
        raise UsageError(
            f"--rollout-device {rollout_device}: the policy is on {policy_device}; both on the CPU or both on CUDA is "
            "required, and with --engine hf the same device"
        )
    together = rollout_device == policy_device
    if config.rollout_process == "own" and config.engine == "hf":
        raise UsageError("--rollout-process own: --engine hf shares the policy's weights; pass --rollout-process auto")
    if ranks.size() > 1:
        check_device_beside_ranks(config, rollout_device)
        return policy_device, rollout_device
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


def device_of_rank(config: GrpoConfig, policy_device: torch.device) -> torch.device:
    """Each rank has the GPU of its number on its machine."""
    if policy_device.type == "cpu":
        return policy_device
    if config.policy_device != "auto":
        raise UsageError(
            f"--policy-device {config.policy_device}: each rank takes the GPU of its number; pass auto, and choose "
            "GPUs by CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def check_device_beside_ranks(config: GrpoConfig, rollout_device: torch.device) -> None:
    """VLLM has a process of its own there, and a GPU of its own if any."""
    if config.rollout_process == "shared":
        raise UsageError("--rollout-process shared: several ranks need vLLM in a process of its own; pass auto")
    n_local = int(os.environ["LOCAL_WORLD_SIZE"])
    free = range(n_local, torch.cuda.device_count())
    if config.engine == "vllm" and rollout_device.type == "cuda" and rollout_device.index not in free:
        raise UsageError(
            f"--rollout-device {rollout_device}: the {n_local} ranks have the GPUs 0 to {n_local - 1}; one more is "
            "required for vLLM: lower --nproc-per-node, or pass --rollout-url"
        )


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
    load = partial(load_sharded, config, model_path, policy_device, dtype, longest_row)
    policy = load(lora=config.lora_rank > 0)
    reference, reference_bytes = None, 0
    if config.needs_reference:
        reference = load(lora=False).requires_grad_(False)
        reference_bytes = weight_bytes(reference)
    plan = settle_memory(config, policy, longest_prompt, reference_bytes, rollout_device)
    weights = PolicyWeights(policy, dtype)
    engine: RolloutEngine
    if not ranks.is_first():
        engine = FollowingEngine(weights)
    elif config.engine == "hf" and ranks.size() > 1:
        copy = load_policy(model_path, policy_device, dtype, longest_row, config.attention)
        engine = HFReplica(copy, tokenizer, weights)
    else:
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
            own_process=config.rollout_process == "own" or ranks.size() > 1,
            deadline_s=config.engine_deadline_s,
            urls=config.rollout_url,
            say=display.say,
        )
    size, several = sum(p.numel() for p in policy.parameters()), f"{ranks.size()} x " if ranks.size() > 1 else ""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    adapted = "" if trained == size else f" ({trained / 1e6:.1f} M of them trained)"
    display.say(
        f"{config.model_path}: {size / 1e6:.0f} M parameters{adapted}, {str(dtype).removeprefix('torch.')}, policy on "
        f"{several}{policy_device}, {config.engine} on {', '.join(config.rollout_url) or rollout_device}"
    )
    display.say(f"memory: {plan}")
    if not plan.fits:
        display.say("warning: that may not fit: lower --micro-batch-tokens, or pass --gradient-checkpointing on")
    return policy, reference, engine


def load_sharded(
    config: GrpoConfig, model_path: str, device: torch.device, dtype: torch.dtype, longest_row: int, *, lora: bool
) -> nn.Module:
    """The model in `dtype`; of several ranks each keeps its shard, in float32, which is what the optimizer updates."""
    several = ranks.size() > 1
    # The host holds it whole for a moment; it comes to the device a shard at a time.
    place, kept = (torch.device("cpu"), torch.float32) if several else (device, dtype)
    policy = load_policy(model_path, place, kept, longest_row, config.attention, on=device)
    if lora:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed, base=str(config.model_path))
    return ranks.shard(policy, dtype) if several else policy
