"""Runs of the three training loops on the tiny policy, in this process, and what they log."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from drivers.common.display import Display
from drivers.engines.conversations import load_rollout
from drivers.engines.hf import HFEngine, HFReplica
from drivers.engines.protocol import Completion
from drivers.expert_iteration import iterate
from drivers.grading.verdicts import make_inline_grader
from drivers.policy.weights import PolicyWeights
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.settings.sampling import Sampling
from drivers.sft import fine_tune
from drivers.tasks.demonstrations import WorkedExample, make_demonstrations
from drivers.tasks.questions import Example, Prompt, Question
from drivers.train import train
from drivers.training.components import Components
from drivers.training.launch import save_on_abort
from drivers.training.run import Run
from tests.drivers.helpers.letters import (
    clone_policy,
    flatten_weights,
    letter_grader,
    letter_reward,
    make_letter_questions,
    make_run,
    make_tiny_config,
    make_tiny_parts,
    make_tiny_teacher,
)
from tests.tiny import make_tiny_tokenizer

ON_POLICY: dict = {}
TWO_UPDATES = {"train_batch_size": 16, "gradient_accumulation_steps": 2}
TWO_EPOCHS = {"epochs_per_rollout_batch": 2}
OVERLAPPED = {"async_steps": 1, "engine": "vllm", "importance": "truncate", "loss_type": "grpo_clip"}
SIX_STEPS = {"n_grpo_steps": 6, "learning_rate": 1e-2, "eval_steps": 2, "checkpoint_steps": 1}
SCHEDULED = {"warmup_steps": 2, "lr_schedule": "cosine", "weight_decay": 0.1, "adam_betas": (0.8, 0.9)}
RUN_KINDS = {
    "plain": {},
    "off-policy": {"train_batch_size": 16, "epochs_per_rollout_batch": 2, "loss_type": "grpo_clip", **SCHEDULED},
    "adaptive": {"entropy_target": 6.0, "entropy_coef": 0.01},
    "ahead": {"async_steps": 1, "importance": "truncate", "engine": "vllm"},
    "bfloat16": {"dtype": "bfloat16", "self_check_tolerance": 1.0},
    "curriculum": {"curriculum_steps": 5, "rollout_batch_size": 16, "train_batch_size": 16},
    "following": {"kl_coef": 0.1, "kl_reference_steps": 2, "kl_reference_share": 0.6},
    "taught": {"teacher": "tiny-teacher", "teacher_coef": 0.1},
    "refills": {"max_refills": 2, "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"},
}
TINY_IMITATION = {
    "model_path": "tiny",
    "learning_rate": 1e-2,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 6,
    "eval_steps": 100,
    "checkpoint_steps": 100,
    "wandb_project": None,
    "engine": "hf",
    "dtype": "float32",
}
TINY_SFT = TINY_IMITATION | {"train_batch_size": 4, "micro_batch_tokens": 40}
TINY_EXPERT_ITERATION = TINY_IMITATION | {
    "n_ei_steps": 3,
    "question_batch_size": 4,
    "group_size": 16,
    "train_batch_size": 8,
    "epochs": 2,
    "micro_batch_tokens": 60,
}
# The flags that sft.py and expert_iteration.py have in common.
IMITATION_FLAGS = [
    "model_path",
    "data_path",
    "val_data_path",
    "prompt_path",
    "reward",
    "learning_rate",
    "warmup_steps",
    "lr_schedule",
    "weight_decay",
    "adam_betas",
    "adam_epsilon",
    "train_batch_size",
    "micro_batch_tokens",
    "aggregation",
    "max_grad_norm",
    "sampling_temperature",
    "sampling_min_tokens",
    "sampling_max_tokens",
    "sampling_stop",
    "eval_steps",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "eval_max_tokens",
    "n_val_examples",
    "n_logged_completions",
    "checkpoint_steps",
    "keep_checkpoints",
    "save_dir",
    "wandb_project",
    "wandb_run_name",
    "engine",
    "policy_device",
    "rollout_device",
    "rollout_process",
    "rollout_url",
    "engine_deadline_s",
    "dtype",
    "attention",
    "gradient_checkpointing",
    "gpu_memory_utilization",
    "self_check_tolerance",
    "lora_rank",
    "lora_alpha",
    "lora_push",
    "reward_mix",
    "grader_workers",
    "grader_deadline_s",
    "on_anomaly",
    "deterministic",
    "chat_template",
    "system_prompt_path",
    "chat_template_args",
    "chat_date",
    "long_prompts",
    "seed",
    "resume",
]


def read_rows(folder, phase=None):
    """Return the rows of a run's metrics.jsonl, of one phase if given."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if phase in (None, row["phase"])]


def drop_times(row):
    """Return a row of metrics without durations and speeds, which differ from run to run."""
    timed = ("time_", "rollout_tokens_per_s", "update_tokens_per_s")
    return {name: value for name, value in row.items() if not name.startswith(timed)}


def read_logged_numbers(folder):
    """Return all rows without times and without the rows on saving, which a resumed run repeats."""
    return [drop_times(row) for row in read_rows(folder) if row["phase"] != "save"]


def run_training(folder, reward_fn=letter_reward, other_val_sets=None, **changes):
    """Train the tiny policy with GRPO. Return the policy, its training rows and its evaluation rows."""
    config, parts = make_tiny_config(**changes), make_tiny_parts()
    run = make_run(config, folder, parts.tokenizer)
    parts.policy.to(getattr(torch, config.dtype))
    reference = clone_policy(parts.policy) if config.needs_reference else None
    try:
        grade, sets = make_inline_grader(reward_fn), (parts.questions, parts.questions)
        teacher = make_tiny_teacher() if config.teacher else None
        rollout = load_rollout(config, parts.tokenizer)
        others = other_val_sets or {}
        components = Components(parts.policy, parts.engine, grade, *sets, reference, others, teacher, rollout)
        train(config, components, run)
    finally:
        run.finish()
    return parts.policy, read_rows(folder, "train"), read_rows(folder, "eval")


class SnapshotEngine(HFEngine):
    """An engine with its own copy of the weights, as vLLM has it, that records who sampled what and where."""

    def __init__(self, policy, tokenizer):
        super().__init__(clone_policy(policy), tokenizer)
        self.source, self.busy, self.calls = policy, False, []

    def load_weights(self, version):
        assert not self.busy, "a push while samples are being drawn"
        self._policy.load_state_dict(self.source.state_dict())
        super().load_weights(version)

    def generate(self, prompts, sampling, *, seed):
        self.busy = True
        completions = super().generate(prompts, sampling, seed=seed)
        self.calls.append((threading.current_thread().name, self._version, flatten_weights(self._policy), completions))
        self.busy = False
        return completions


def run_overlapped(folder, **changes):
    """Train with `--async-steps 1`. Return the policy, the engine and the training rows."""
    config, parts = make_tiny_config(**OVERLAPPED | changes), make_tiny_parts()
    run, engine = make_run(config, folder, parts.tokenizer), SnapshotEngine(parts.policy, parts.tokenizer)
    try:
        train(config, Components(parts.policy, engine, letter_grader, parts.questions, parts.questions), run)
    finally:
        run.finish()
    return parts.policy, engine, read_rows(folder, "train")


@dataclass(frozen=True)
class Sampled:
    """A call of `generate` and its answer."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    seed: int
    version: int | None
    completions: list[Completion]


class RecordingEngine(HFEngine):
    """An engine that records its calls in order: "push 1", "sleep", or `Sampled`."""

    def __init__(self, policy, tokenizer):
        super().__init__(policy, tokenizer)
        self.calls = []

    def load_weights(self, version):
        self.calls.append(f"push {version}")
        super().load_weights(version)

    def sleep(self):
        self.calls.append("sleep")

    def generate(self, prompts, sampling, *, seed):
        completions = super().generate(prompts, sampling, seed=seed)
        self.calls.append(Sampled(prompts, sampling, seed, self._version, completions))
        return completions

    @property
    def sampled(self):
        """Return the calls of `generate`."""
        return [call for call in self.calls if isinstance(call, Sampled)]


def make_held_out_questions(tokenizer, n=5):
    """Return questions that differ from those to train on in prompt and answer."""
    return [
        Question(Example(f"spell {k}", "b", f"held-out:{k}"), tuple(tokenizer.encode(f"spell {'?' * k} ")))
        for k in range(1, n + 1)
    ]


def run_recorded(folder, loop, config, settings=None, reward_fn=letter_reward, other_val_sets=None):
    """Call `loop(components, run)` on 6 training and 5 held-out questions. Return what it used, called and logged."""
    parts = make_tiny_parts()
    engine = RecordingEngine(parts.policy, parts.tokenizer)
    train_set, val_set = make_letter_questions(parts.tokenizer, n=6), make_held_out_questions(parts.tokenizer)
    reference = clone_policy(parts.policy) if config.needs_reference else None
    grade = make_inline_grader(reward_fn)
    components = Components(parts.policy, engine, grade, train_set, val_set, reference, other_val_sets or {})
    folder.mkdir(exist_ok=True)
    run = Run(config, folder, parts.tokenizer, Display(config.n_grpo_steps, quiet=True), settings=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drivers.training.run.draw_curves", lambda _: None)  # a second of each run
        try:
            loop(components, run)
        finally:
            run.finish()
    return SimpleNamespace(
        config=config, components=components, engine=engine, run=run, folder=folder, rows=read_rows(folder)
    )


def run_recorded_training(folder, reward_fn=letter_reward, **changes):
    """Train with GRPO. Return what `run_recorded` returns."""
    config = make_tiny_config(**changes)
    return run_recorded(folder, lambda components, run: train(config, components, run), config, reward_fn=reward_fn)


class StopRun(Exception):
    """The engine raises it to stop a run."""


def make_stopping_engine(policy, tokenizer, stop_at):
    """Return an engine that raises StopRun after `stop_at` answers, and the list of its answers."""
    dtype = next(policy.parameters()).dtype
    engine = HFReplica(make_tiny_parts().policy.to(dtype), tokenizer, PolicyWeights(policy, dtype))
    answer, answers = engine.generate, []

    def generate(*arguments, **named):
        if stop_at is not None and len(answers) >= stop_at:
            raise StopRun
        answers.append(answer(*arguments, **named))
        return answers[-1]

    engine.generate = generate
    return engine, answers


def finish_run(run, policy, loop):
    """Call the loop until it ends or stops, then close the run. Return the weights and the optimizer's moments."""
    try:
        loop()
    except StopRun:
        save_on_abort(run, policy, "train again")
    finally:
        run.finish()
    return flatten_weights(policy), {name: tensor.clone() for name, tensor in run.state.tensors().items()}


def run_grpo(folder, checkpoint=None, stop_at=None, publish=False, **settings):
    """Train with GRPO, from a checkpoint if given. Return weights, moments and the number of the engine's answers."""
    config = make_tiny_config(**(SIX_STEPS | settings))
    parts, dtype = make_tiny_parts(), getattr(torch, config.dtype)
    policy = parts.policy.to(dtype)
    reference = make_tiny_parts().policy.to(dtype) if config.needs_reference else None
    teacher = make_tiny_teacher() if config.teacher else None
    engine, answers = make_stopping_engine(policy, parts.tokenizer, stop_at)
    folder.mkdir(exist_ok=True)
    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True), checkpoint)

    def loop():
        sets = (parts.questions, parts.questions)
        models = {"reference": reference, "teacher": teacher}
        rollout = load_rollout(config, parts.tokenizer)
        train(config, Components(policy, engine, letter_grader, *sets, **models, rollout=rollout), run)
        if publish:
            run.checkpointer.publish(run.state, "final_model")

    return *finish_run(run, policy, loop), len(answers)


LETTER_RESPONSES = [letter * n for letter, n in zip("abcde" * 2, (6, 2, 4, 1, 7, 3, 5, 2, 6, 4), strict=True)]


def make_letter_demonstrations(*responses, stop=("</answer>",)):
    """Return one demonstration for each response, with prompts of different lengths."""
    examples = [
        WorkedExample(f"say it {'!' * (1 + k % 3)} ", "a", f"shown:{k}", response, has_prompt=True)
        for k, response in enumerate(responses)
    ]
    return make_demonstrations(examples, Prompt("{question}"), stop, make_tiny_tokenizer())


def run_sft(folder, demonstrations, checkpoint=None, stop_at=None, **changes):
    """Fine-tune on demonstrations. Return weights, moments and the number of the engine's answers."""
    settings = SftConfig(**(TINY_SFT | changes))
    config, parts = settings.as_grpo(len(demonstrations)), make_tiny_parts()
    engine, answers = make_stopping_engine(parts.policy, parts.tokenizer, stop_at)
    folder.mkdir(exist_ok=True)
    run = Run(config, folder, parts.tokenizer, Display(1, quiet=True), checkpoint, settings)

    def loop():
        components = Components(parts.policy, engine, letter_grader, demonstrations, parts.questions)
        fine_tune(config, components, demonstrations, run)

    return *finish_run(run, parts.policy, loop), len(answers)


def has_letter(response: str, ground_truth: str) -> float:
    """Return 1 for a response that contains the letter: about one in eight of the first responses."""
    return float(ground_truth in response)


def run_expert_iteration(folder, reward=has_letter, checkpoint=None, stop_at=None, **changes):
    """Run expert iteration. Return weights, moments and all answers of the engine."""
    settings, parts = ExpertIterationConfig(**(TINY_EXPERT_ITERATION | changes)), make_tiny_parts()
    engine, answers = make_stopping_engine(parts.policy, parts.tokenizer, stop_at)
    folder.mkdir(exist_ok=True)
    run = Run(settings.as_grpo(), folder, parts.tokenizer, Display(1, quiet=True), checkpoint, settings)

    def loop():
        sets, rollout = (parts.questions, parts.questions), load_rollout(settings, parts.tokenizer)
        components = Components(parts.policy, engine, make_inline_grader(reward), *sets, rollout=rollout)
        iterate(settings, components, run)

    return *finish_run(run, parts.policy, loop), answers


def assert_same_state(found, expected):
    """Check that two runs end with the same weights and moments to the last bit."""
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())
