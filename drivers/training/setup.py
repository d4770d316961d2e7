"""Build the components of a run from its settings."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.display import Display
from drivers.common.errors import UsageError
from drivers.common.own_functions import check_file
from drivers.engines.conversations import load_rollout
from drivers.engines.factory import describe_start, make_engine
from drivers.engines.hf import HFReplica
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import RolloutEngine, end_token_ids
from drivers.engines.rank_zero import EngineOnRankZero
from drivers.engines.teacher_server import TeacherServer
from drivers.grading.loading import BUILT_IN
from drivers.grading.pool import start_grading
from drivers.grading.verdicts import Grader, make_inline_grader
from drivers.policy import fsdp
from drivers.policy.devices import choose_devices, choose_dtype
from drivers.policy.loading import (
    check_token_ids,
    context_length,
    count_embeddings,
    load_policy,
    load_tokenizer,
    name_flag,
    resolve_model,
    tune_malloc,
)
from drivers.policy.lora import add_lora
from drivers.policy.optimizer import training_state_bytes
from drivers.policy.teacher import resolve_teacher
from drivers.policy.weights import WeightGatherer
from drivers.runs.checkpoint import check_saving, read_dtype, read_state_values
from drivers.runs.folder import abandon_run_folder
from drivers.runs.lock import release_run_lock
from drivers.runs.resume import RUN_MARKER, open_run_folder
from drivers.settings.evaluation import name_sets
from drivers.settings.groups import EngineSettings, PromptSettings, TrainingSettings
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import (
    Prompt,
    Question,
    distinct,
    easiest_first,
    fit_context,
    load_examples,
    load_prompt,
    make_questions,
)
from drivers.training.components import Components
from drivers.training.disk import check_disk
from drivers.training.memory import MemoryPlan, configure_memory
from drivers.training.run import Run
from drivers.training.shortcuts import describe_shortcuts
from drivers.training.state import fingerprint, validate_resume


def setup_grpo_run(config: GrpoConfig, display: Display) -> tuple[Run, Components]:
    """Build the run and the components of train.py."""
    remedy = (
        f" ({config.flag('rollout_batch_size')} / {config.flag('group_size')}); lower --rollout-batch-size or raise "
        "--group-size"
    )
    return setup_run(config, display, load_train_set(config, remedy))


def load_train_set(config: GrpoConfig, remedy: str) -> Callable[..., Sequence[Question]]:
    """Load the questions to train on, which suffice for a step, and return how to make them of a tokenizer."""
    examples, n_needed = load_examples("--data-path", config.data_path), config.n_prompts_per_rollout_batch
    if len(examples) < n_needed:
        raise UsageError(
            f"--data-path {config.data_path}: has {len(examples)} questions, but a step needs {n_needed} different "
            f"ones{remedy}"
        )
    if config.curriculum_steps:
        examples = easiest_first("--curriculum-steps", examples)
    return partial(make_questions, examples, load_prompt_from_settings(config))


def load_prompt_from_settings(config: PromptSettings) -> Prompt:
    """Return the prompt that the settings put around a question."""
    chat = (config.chat_template, config.system_prompt_path, config.chat_date, config.chat_options)
    return load_prompt(config.prompt_path, *chat)


def setup_run(
    config: GrpoConfig,
    display: Display,
    make_train_set: Callable[..., Sequence[Question]],
    settings: TrainingSettings | None = None,
) -> tuple[Run, Components]:
    """Build the run and its components. Cheap checks come first: a bad file is reported before a model is loaded.

    `make_train_set` makes the questions or demonstrations to train on with a tokenizer. `settings` are those of the
    program; default: `config`.
    """
    val_paths = name_sets("--val-data-path", config.val_data_path)
    val_examples = {
        name: load_examples("--val-data-path", path)[: config.n_val_examples] for name, path in val_paths.items()
    }
    check_file("--reward", config.reward)
    prompt = load_prompt_from_settings(config)
    devices = choose_devices(config)
    assert config.model_path is not None  # the command line refuses that
    model_path = distributed.run_on_rank_zero(partial(resolve_model, config.model_path))
    tokenizer = load_tokenizer(model_path, for_chat=config.chat_template)
    rollout = load_rollout(config, tokenizer)
    teacher_path, context = None, context_length(model_path)
    if config.teacher is not None and not config.has_teacher_server:
        find = partial(resolve_teacher, config.teacher, model_path, tokenizer)
        teacher_path = distributed.run_on_rank_zero(find)
        context = min(filter(None, (context, context_length(teacher_path))), default=None)
    fit = partial(fit_context, context=context, long_prompts=config.long_prompts, say=display.say)
    train_set = fit(make_train_set(tokenizer), max_new_tokens=config.sampling_max_tokens)
    eval_tokens = config.eval_sampling.max_tokens
    flag = "--sampling-max-tokens" if config.eval_max_tokens is None else "--eval-max-tokens"
    val_sets = {
        name: fit(make_questions(examples, prompt, tokenizer), max_new_tokens=eval_tokens, flag=flag)
        for name, examples in val_examples.items()
    }
    different, held_out = distinct(train_set), list(chain(*val_sets.values()))
    check_token_ids(model_path, tokenizer, (*different, *held_out))
    with ExitStack() as on_failure:
        grade: Grader = make_inline_grader(BUILT_IN["r1_zero"])  # a placeholder: only rank 0 grades
        if distributed.is_rank_zero():
            grade = on_failure.enter_context(start_grading(config, lambda text: display.say(f"warning: {text}")))
        folder, checkpoint = distributed.run_on_rank_zero(partial(open_run_folder, config, display.say))
        data = fingerprint(train_set)
        try:
            if checkpoint is not None:
                validate_resume(config, read_state_values(checkpoint), data)
            # A prompt with a response of sampling_max_tokens is at least as long as any demonstration.
            longest = max(question.n_tokens(config.sampling_max_tokens) for question in (*different, *held_out))
            trained = max(question.n_tokens(config.sampling_max_tokens) for question in different)
            asked = max(question.n_tokens(eval_tokens) for question in held_out)
            server = (
                connect_teacher(config, model_path, tokenizer, trained, display) if config.has_teacher_server else None
            )
            policy, reference, teacher, engine = load_models(
                config,
                display,
                model_path,
                teacher_path,
                tokenizer,
                devices,
                longest_prompt=longest - config.sampling_max_tokens,
                max_model_len=max(trained, asked),
                checkpoint_dtype=None if checkpoint is None else read_dtype(checkpoint),
            )
            step = 0 if checkpoint is None else int(read_state_values(checkpoint)["step"])
            disk_warning = check_disk(config, policy, folder, step)
        except BaseException:
            if distributed.is_rank_zero() and checkpoint is None:
                abandon_run_folder(folder, RUN_MARKER)
            release_run_lock(folder)
            raise
        repeats = f" ({len(different)} different)" if len(different) < len(train_set) else ""
        sizes = " + ".join(str(len(questions)) for questions in val_sets.values())
        display.say(f"{len(train_set)}{repeats} training and {sizes} held-out questions; run folder {folder}/")
        run = Run(config, folder, tokenizer, display, checkpoint, settings, data)
        on_failure.pop_all()
    for warning in (*config.warnings, *([disk_warning] if disk_warning else [])):
        run.warn(warning)
    val_set, *_ = val_sets.values()
    others = dict(list(val_sets.items())[1:])
    return run, Components(policy, engine, grade, train_set, val_set, reference, others, server or teacher, rollout)


def connect_teacher(
    config: GrpoConfig, model_path: str, tokenizer: Any, longest: int, display: Display
) -> TeacherServer:
    """Return the server of `--teacher`, which was checked. `longest` is the longest prompt with its response."""
    server = TeacherServer(str(config.teacher), config.engine_deadline_s, display.say)
    n_ids = count_embeddings(model_path)
    last_id = int(n_ids) - 1 if math.isfinite(n_ids) else max(tokenizer.get_vocab().values())
    distributed.run_on_rank_zero(partial(server.check, tokenizer, last_id, longest))
    return server


def load_models(
    config: GrpoConfig,
    display: Display,
    model_path: str,
    teacher_path: str | None,
    tokenizer: Any,
    devices: tuple[torch.device, torch.device],
    *,
    longest_prompt: int,
    max_model_len: int,
    checkpoint_dtype: str | None,
) -> tuple[nn.Module, nn.Module | None, nn.Module | None, RolloutEngine]:
    """Load the policy, the reference and the teacher if they are needed, and the engine; print what they are."""
    policy_device, rollout_device = devices
    dtype = resolve_dtype(config, policy_device, checkpoint_dtype)
    set_up_device(config, policy_device)
    longest_row = longest_prompt + config.group_size * config.sampling_max_tokens
    loader = partial(load_sharded, config, device=policy_device, dtype=dtype, longest_row=longest_row)
    with display.stage("Loading the model"):
        policy, reference = load_policy_and_reference(config, tokenizer, partial(loader, model_path))
        with name_flag("--teacher"):
            teacher = None if teacher_path is None else loader(teacher_path, lora=False).requires_grad_(False)
    distributed.run_on_rank_zero(partial(check_saving, model_path, policy, tokenizer))
    frozen_bytes = sum(training_state_bytes(model) for model in (reference, teacher) if model is not None)
    plan = configure_memory(config, policy, longest_prompt, frozen_bytes, rollout_device)
    options = EngineOptions(
        model_path=model_path,
        device=rollout_device,
        dtype=dtype,
        max_model_len=max_model_len,
        seed=config.seed,
        gpu_memory_utilization=config.gpu_memory_utilization,
        reserved_bytes=training_state_bytes(policy) + frozen_bytes,
        may_sleep=True,
        own_process=config.rollout_process == "own" or distributed.size() > 1,
        deadline_s=config.engine_deadline_s,
        urls=config.rollout_url,
        adapter=cast(Any, policy).lora_settings if config.lora_push == "adapter" else None,
    )
    load_copy = partial(load_policy, model_path, policy_device, dtype, longest_row, config.attention)
    merges_lora = config.lora_push == "merged"
    weights = WeightGatherer(policy, dtype, as_files=config.engine == "vllm", merges_lora=merges_lora)
    with display.stage(describe_start(config.engine, rollout_device)):
        engine = make_engine_for_rank(config, options, weights, tokenizer, load_copy, display.say)
    for line in describe_setup(config, policy, dtype, devices, plan):
        display.say(line)
    return policy, reference, teacher, engine


def resolve_dtype(config: GrpoConfig, device: torch.device, checkpoint_dtype: str | None) -> torch.dtype:
    """Return the dtype of `--dtype`. For `auto`, a resumed run keeps its dtype; a new one may measure the faster."""
    default = checkpoint_dtype or ("float32" if config.deterministic else "auto")
    name = default if config.dtype == "auto" else config.dtype
    return distributed.run_on_rank_zero(partial(choose_dtype, name, device))


def set_up_device(config: GrpoConfig, device: torch.device) -> None:
    """Turn on deterministic algorithms if asked for, and tune the allocator of a CPU."""
    if config.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        tune_malloc()


def load_policy_and_reference(
    config: GrpoConfig, tokenizer: Any, load: Callable[..., nn.Module]
) -> tuple[nn.Module, nn.Module | None]:
    """Load the policy, and a frozen reference if one is needed. With LoRA, the base model is the reference."""
    policy = load(lora=config.lora_rank > 0)
    if config.chat_template:  # checkpoints store it, so that other programs stop at the same tokens
        generation: Any = policy.generation_config
        generation.eos_token_id = end_token_ids(policy, tokenizer.eos_token_id)
    if not config.needs_reference or config.lora_rank > 0:
        return policy, None
    return policy, load(lora=False).requires_grad_(False)


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


def describe_setup(
    config: GrpoConfig,
    policy: nn.Module,
    dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
    plan: MemoryPlan,
) -> list[str]:
    """Return lines on the model, its memory, and warnings about the memory."""
    policy_device, rollout_device = devices
    n_parameters = sum(p.numel() for p in policy.parameters())
    n_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    trained = "" if n_trained == n_parameters else f" ({n_trained / 1e6:.1f} M trained)"
    ranks = f"{distributed.size()} x " if distributed.size() > 1 else ""
    lines = [
        f"{config.model_path}: {n_parameters / 1e6:.0f} M parameters{trained}, {str(dtype).removeprefix('torch.')}, "
        f"policy on {ranks}{policy_device}, {config.engine} on {', '.join(config.rollout_url) or rollout_device}",
        f"memory: {plan}",
    ]
    lines += describe_shortcuts(policy)
    if plan.share is not None and plan.share < config.gpu_memory_utilization:
        lines.append(
            f"warning: --gpu-memory-utilization {config.gpu_memory_utilization:g}: vLLM gets {plan.share:.2f} of "
            f"{rollout_device}, because training needs the rest"
        )
    if not plan.fits:
        lines.append(
            "warning: the memory may not suffice; lower --micro-batch-tokens or pass --gradient-checkpointing on"
        )
    return lines


def load_sharded(
    config: GrpoConfig, model_path: str, device: torch.device, dtype: torch.dtype, longest_row: int, *, lora: bool
) -> nn.Module:
    """Load the model in `dtype`. With several ranks, each keeps a float32 shard, which the optimizer updates."""
    # Several ranks load into host memory, and move the weights to the device shard by shard.
    first = device if distributed.size() == 1 else torch.device("cpu")
    policy = load_policy(model_path, first, dtype, longest_row, config.attention, on=device)
    if lora:
        add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed, base=str(config.model_path))
    return fsdp.shard(policy, dtype, device)
