"""Build the components of a run."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.engines.factory import make_engine
from drivers.engines.hf import HFReplica, end_token_ids
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import EngineOnRankZero
from drivers.grading.loading import BUILT_IN
from drivers.grading.pool import GradingPool, start_grading
from drivers.grading.verdicts import Grader, make_inline_grader
from drivers.policy import fsdp
from drivers.policy.devices import choose_devices, choose_dtype
from drivers.policy.loading import context_length, load_policy, load_tokenizer, resolve_model, tune_malloc
from drivers.policy.lora import add_lora
from drivers.policy.optimizer import training_state_bytes
from drivers.policy.weight_gatherer import WeightGatherer
from drivers.runs.checkpoint import precision_of, read_facts
from drivers.runs.folder import abandon_run_folder, release_run_lock
from drivers.runs.resume import RUN_MARKER, open_run_folder
from drivers.settings.groups import EngineSettings, PromptSettings, TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.settings.reward_spec import check_file
from drivers.tasks.questions import Prompt, Question, easiest_first, load_examples, load_prompt, make_questions
from drivers.training.memory import configure_memory, weight_bytes
from drivers.training.run import Run
from drivers.training.state import fingerprint, validate_resume


class Components(NamedTuple):
    """What `train` is given beside its settings."""

    policy: nn.Module
    engine: RolloutEngine
    grade: Grader
    train_set: Sequence[Question]
    val_set: Sequence[Question]
    reference: nn.Module | None = None
    """What a divergence is taken from: the model as it was before training, frozen."""

    def close(self) -> None:
        """End the processes that sample and grade."""
        try:
            self.engine.close()
        finally:
            if isinstance(self.grade, GradingPool):
                self.grade.close()


def setup_grpo_run(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
    """Everything that the settings name."""
    examples = load_examples("--data-path", config.data_path)
    if len(examples) < config.n_prompts_per_rollout_batch:
        raise UsageError(
            f"--data-path {config.data_path}: holds {len(examples)} questions, and a step asks "
            f"{config.n_prompts_per_rollout_batch} different ones (rollout_batch_size / group_size): "
            "lower --rollout-batch-size or raise --group-size"
        )
    if config.curriculum_steps:
        examples = easiest_first("--curriculum-steps", examples)
    return setup_run(config, display, partial(make_questions, examples, prompt_of(config)))


def prompt_of(config: PromptSettings) -> Prompt:
    """How the settings put a question."""
    return load_prompt(config.prompt_path, config.chat_template, config.system_prompt_path)


def setup_run(
    config: GrpoConfig,
    display: Display,
    make_train_set: Callable[..., Sequence[Question]],
    settings: TrainingSettings | None = None,
) -> tuple[Run, Components]:
    """The parts. Cheap checks first: a bad file stops the run before a model is loaded.

    `make_train_set`: what `make_questions` is once it has its examples. `settings`: the program's own.
    """
    val_examples = load_examples("--val-data-path", config.val_data_path)[: config.n_val_examples]
    check_file(config.reward)
    prompt = prompt_of(config)
    devices = choose_devices(config)
    assert config.model_path is not None  # the command line refuses that
    model_path = distributed.run_on_rank_zero(partial(resolve_model, config.model_path))
    tokenizer = load_tokenizer(model_path, for_chat=config.chat_template)
    context = context_length(model_path)
    train_set, val_set = (
        make(tokenizer, max_new_tokens=config.sampling_max_tokens, context=context)
        for make in (make_train_set, partial(make_questions, val_examples, prompt))
    )
    with ExitStack() as unless_prepared:
        grade: Grader = make_inline_grader(BUILT_IN["r1_zero"])  # of other ranks, which are never asked
        if distributed.is_rank_zero():
            grade = unless_prepared.enter_context(start_grading(config, lambda text: display.say(f"warning: {text}")))
        folder, checkpoint = distributed.run_on_rank_zero(partial(open_run_folder, config, display.say))
        data = fingerprint(train_set)
        try:
            if checkpoint is not None:
                validate_resume(config, read_facts(checkpoint), data)
            # In a prompt and a response of sampling_max_tokens there is room for each demonstration too.
            longest = max(question.n_tokens(config.sampling_max_tokens) for question in (*train_set, *val_set))
            longest -= config.sampling_max_tokens
            before = None if checkpoint is None else precision_of(checkpoint)
            policy, reference, engine = load_models(config, display, model_path, tokenizer, devices, longest, before)
        except BaseException:
            if distributed.is_rank_zero() and checkpoint is None:
                abandon_run_folder(folder, RUN_MARKER)
            release_run_lock(folder)
            raise
        display.say(f"{len(train_set)} training and {len(val_set)} held-out questions; run folder {folder}/")
        run = Run(config, folder, tokenizer, display, checkpoint, settings, data)
        unless_prepared.pop_all()
    for warning in config.warnings:
        run.warn(warning)
    return run, Components(policy, engine, grade, train_set, val_set, reference)


def load_models(
    config: GrpoConfig,
    display: Display,
    model_path: str,
    tokenizer: Any,
    devices: tuple[torch.device, torch.device],
    longest_prompt: int,
    earlier_dtype: str | None = None,
) -> tuple[nn.Module, nn.Module | None, RolloutEngine]:
    """Policy, frozen reference where one is needed, and engine: what takes long. Says what they are.

    `earlier_dtype`: of the run that is gone on with. Measured anew, `auto` might be another.
    """
    display.say("Loading the model ...")
    policy_device, rollout_device = devices
    asked: str = config.dtype
    if asked == "auto":
        asked = earlier_dtype or ("float32" if config.deterministic else "auto")
    dtype = distributed.run_on_rank_zero(partial(choose_dtype, asked, policy_device))  # it may measure
    if config.deterministic and policy_device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it
        torch.use_deterministic_algorithms(True)
    if policy_device.type == "cpu":
        tune_malloc()
    longest_row = longest_prompt + config.group_size * config.sampling_max_tokens
    load = partial(load_sharded, config, model_path, policy_device, dtype, longest_row)
    policy = load(lora=config.lora_rank > 0)
    if config.chat_template:  # it is saved so, and whoever samples from a checkpoint ends there too
        generation: Any = policy.generation_config
        generation.eos_token_id = end_token_ids(policy, tokenizer)
    reference, reference_bytes = None, 0
    if config.needs_reference and config.lora_rank == 0:  # else the policy without its adapters is it
        reference = load(lora=False).requires_grad_(False)
        reference_bytes = weight_bytes(reference)
    plan = configure_memory(config, policy, longest_prompt, reference_bytes, rollout_device)
    options = EngineOptions(
        model_path=model_path,
        device=rollout_device,
        dtype=dtype,
        max_model_len=longest_prompt + config.sampling_max_tokens,
        seed=config.seed,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=training_state_bytes(policy) + reference_bytes,
        own_process=config.rollout_process == "own" or distributed.size() > 1,
        deadline_s=config.engine_deadline_s,
        urls=config.rollout_url,
    )
    load_copy = partial(load_policy, model_path, policy_device, dtype, longest_row, config.attention)
    engine = make_engine_for_rank(config, options, WeightGatherer(policy, dtype), tokenizer, load_copy, display.say)
    size, several = (
        sum(p.numel() for p in policy.parameters()),
        f"{distributed.size()} x " if distributed.size() > 1 else "",
    )
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    adapted = "" if trained == size else f" ({trained / 1e6:.1f} M of them trained)"
    display.say(
        f"{config.model_path}: {size / 1e6:.0f} M parameters{adapted}, {str(dtype).removeprefix('torch.')}, policy on "
        f"{several}{policy_device}, {config.engine} on {', '.join(config.rollout_url) or rollout_device}"
    )
    display.say(f"memory: {plan}")
    if plan.share is not None and plan.share < config.gpu_memory_utilization:
        display.say(
            f"warning: --gpu-memory-utilization {config.gpu_memory_utilization:g}: beside what training keeps on "
            f"{rollout_device}, vLLM gets {plan.share:.2f} of it"
        )
    if not plan.fits:
        display.say("warning: that may not fit: lower --micro-batch-tokens, or pass --gradient-checkpointing on")
    return policy, reference, engine


def make_engine_for_rank(
    config: EngineSettings,
    options: EngineOptions,
    weights: WeightGatherer,
    tokenizer: Any,
    load_copy: Callable[[], nn.Module],
    say: Callable[[str], None],
) -> RolloutEngine:
    """Start the engine on rank 0; the other ranks help to gather the weights that it needs."""
    if distributed.size() == 1:
        return make_engine(config.engine, options, weights, tokenizer, say)
    if not distributed.is_rank_zero():
        return EngineOnRankZero(None, weights)
    if config.engine == "hf":  # `generate` cannot sample from shards
        return EngineOnRankZero(HFReplica(load_copy(), tokenizer, weights), weights)
    return EngineOnRankZero(make_engine(config.engine, options, weights, tokenizer, say), weights)


def load_sharded(
    config: GrpoConfig, model_path: str, device: torch.device, dtype: torch.dtype, longest_row: int, *, lora: bool
) -> nn.Module:
    """The model in `dtype`; of several ranks each keeps its shard, in float32, which is what the optimizer updates."""
    several = distributed.size() > 1
    # The host holds it whole for a moment; it comes to the device a shard at a time.
    place = torch.device("cpu") if several else device
    policy = load_policy(model_path, place, dtype, longest_row, config.attention, on=device)
    if lora:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed, base=str(config.model_path))
    return fsdp.shard(policy, dtype, device) if several else policy
