"""Every flag has an effect: a setting that is changed alone changes a call, a token, a number, a file or an error."""

import copy
import json
import math
import random
import sys
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drivers import train as train_program
from drivers.common.display import Display
from drivers.common.errors import TrainingAbortedError, UsageError
from drivers.engines.conversations import load_rollout
from drivers.evaluation import standalone
from drivers.expert_iteration import iterate
from drivers.grading import pool
from drivers.grading.verdicts import Graded
from drivers.runs.lock import release_run_lock
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.imitation import ExpertIterationConfig, SftConfig
from drivers.sft import choose_demonstrations, fine_tune
from drivers.train import train
from drivers.training import setup
from drivers.training.components import Components
from drivers.training.run import Run
from drivers.training.self_check import check_evaluation_engine
from tests.drivers.helpers.letters import make_completion, make_letter_questions
from tests.drivers.helpers.runs import (
    LETTER_RESPONSES,
    TINY_EXPERT_ITERATION,
    TINY_SFT,
    drop_times,
    make_held_out_questions,
    make_letter_demonstrations,
    read_rows,
)
from tests.tiny import CHARACTERS, make_tiny_policy, make_tiny_tokenizer, save_tiny

PASSED_ON = ("learning_rate", "entropy_coef", "shaped_reward")
"""Logged numbers that show only that a setting was read, not that it had an effect."""


@dataclass(frozen=True)
class Row:
    """A probe that sees a setting, the value that it is changed to, and settings that it needs in both cases."""

    probe: str
    value: Any
    context: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)
    """Settings that must change with it, because no legal combination changes it alone."""


# --- probes ----------------------------------------------------------------------------------------------------------
class DrawingEngine:
    """An engine that draws responses and log-probs from its seed alone, without a model, and records its calls."""

    def __init__(self):
        self.calls, self.version = [], None

    def load_weights(self, version):
        self.version = version
        self.calls.append(("push", version))

    def sleep(self):
        self.calls.append(("sleep",))

    def received(self):
        return []

    def close(self):
        self.calls.append(("close",))

    def generate(self, prompts, sampling, *, seed):
        self.calls.append(("generate", [tuple(prompt) for prompt in prompts], sampling, seed, self.version))
        draw, completions = random.Random(seed), []
        for prompt in prompts:
            for _ in range(sampling.n):
                length = draw.randint(1, sampling.max_tokens)
                tokens = [draw.randrange(2, len(CHARACTERS) + 2) for _ in range(length)]
                log_probs = [draw.uniform(-5.0, -4.2) for _ in tokens]  # of tokens that are about equally likely
                ended = "length" if length == sampling.max_tokens else "stop"
                text = "".join(CHARACTERS[token - 2] for token in tokens)
                completions.append(make_completion(prompt, tokens, log_probs, ended, text))
        return completions


def grade_by_first_character(responses, ground_truths, questions):
    """Return a reward of 1 for a quarter of the responses, and parts that differ from it."""
    scores = [
        {"reward": float(text[0] in "abcdefghijklmnopqrstuvw"), "format_reward": float(text[-1].isalnum())}
        for text in responses
    ]
    return [Graded(one | {"answer_reward": one["reward"]}, "parsed") for one in scores]


@pytest.fixture(scope="module")
def shared():
    """Return what the probes share: models whose weights are put back before each use, and all observations."""
    tokenizer = make_tiny_tokenizer()
    policy, reference = make_tiny_policy(0), make_tiny_policy(5)
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    return SimpleNamespace(tokenizer=tokenizer, policy=policy, reference=reference, weights=weights, seen={})


@pytest.fixture
def probes(shared, tmp_path, monkeypatch):
    """Return the probes by name. Each takes settings and returns what can be observed of them."""
    folders = iter(range(1000))

    def new_folder():
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return folder

    def observe_loop(kind, loop, config, settings=None):
        """Return what a loop asks the engine, logs, saves and leaves in the weights."""
        seen, engine, folder = {"saved": [], "wandb": []}, DrawingEngine(), new_folder()
        shared.policy.load_state_dict(shared.weights)
        shared.policy.zero_grad()
        wandb = SimpleNamespace(
            init=lambda project, name, **_: seen["wandb"].append((project, name)) or SimpleNamespace(),
            Settings=lambda **_: None,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "wandb", wandb)
            patch.setattr("drivers.runs.log.describe_environment", dict)
            patch.setattr("drivers.training.run.draw_curves", lambda _: None)
            patch.setattr(
                "drivers.training.checkpointer.save_checkpoint", lambda _, folder: seen["saved"].append(folder.name)
            )
            patch.setattr(
                "drivers.training.checkpointer.prune_checkpoints",
                lambda _, accuracies, keep: seen["saved"].append(keep),
            )
            run = Run(config, folder, shared.tokenizer, Display(1, quiet=True), settings=settings)
            components = Components(
                shared.policy,
                engine,
                grade_by_first_character,
                make_letter_questions(shared.tokenizer, n=6),
                make_held_out_questions(shared.tokenizer, n=2),
                copy.deepcopy(shared.reference) if config.needs_reference else None,  # it may move
                teacher=shared.reference if config.teacher else None,
                rollout=load_rollout(config, shared.tokenizer),
            )
            try:
                loop(components, run)
            except (UsageError, TrainingAbortedError) as error:
                seen["error"] = str(error)
            finally:
                run.finish()
        rows = [drop_times(row) for row in read_rows(folder)]
        seen["rows"] = [{key: value for key, value in row.items() if key not in PASSED_ON} for row in rows]
        seen["completions"] = (folder / "completions.jsonl").read_text()
        seen["calls"] = engine.calls
        seen["weights"] = [tensor.tolist() for tensor in shared.policy.state_dict().values()]
        if run._state is not None:
            seen["moments"] = [tensor.tolist() for tensor in run.state.tensors().values()]
        return seen

    def train_probe(settings):
        config = GrpoConfig(**LOOP | settings)
        return observe_loop("train", lambda components, run: train(config, components, run), config)

    def sft_probe(settings):
        demonstrations = make_letter_demonstrations(*LETTER_RESPONSES)
        config = SftConfig(**TINY_SFT | {"self_check_tolerance": 1e9} | settings)
        grpo = config.as_grpo(len(demonstrations))
        return observe_loop("sft", lambda parts, run: fine_tune(grpo, parts, demonstrations, run), grpo, config)

    def expert_probe(settings):
        small = {"n_ei_steps": 1, "question_batch_size": 2, "group_size": 4, "self_check_tolerance": 1e9}
        config = ExpertIterationConfig(**TINY_EXPERT_ITERATION | small | settings)
        return observe_loop("ei", lambda parts, run: iterate(config, parts, run), config.as_grpo(), config)

    def patch_loading(patch, seen):
        """Record what is started instead of starting it; models are loaded."""

        class Pool:
            def __init__(self, *arguments, warn, **named):
                seen["grading"] = (arguments, named)

            def load(self):
                pass

            def close(self):
                pass

            def __enter__(self):
                return grade_by_first_character

            def __exit__(self, *_):
                pass

        def make_engine(kind, options, weights, tokenizer, say=print):
            seen["engine"] = (kind, options)
            return DrawingEngine()

        def choose_dtype(name, device):
            seen["dtype"] = name
            return torch.bfloat16 if name == "bfloat16" else torch.float32

        patch.setattr(pool, "GradingPool", Pool)
        for module in (setup, standalone):
            patch.setattr(module, "make_engine", make_engine)
            patch.setattr(module, "choose_dtype", choose_dtype)

    def write_files(folder):
        """Write two models, two data files, two prompts and a system message."""
        for name, seed in (("model", 0), ("other-model", 1)):
            save_tiny(folder / name, seed)
            tokenizer = make_tiny_tokenizer()
            tokenizer.chat_template = CHAT
            tokenizer.save_pretrained(folder / name)
        for name, numbers in (("train", range(9)), ("other", range(9, 0, -1)), ("held-out", range(20, 24))):
            rows = [{"question": f"{n}?", "answer": str(n), "pass_rate": n / 30} for n in numbers]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "repeated.jsonl").write_text((folder / "train.jsonl").read_text() * 2)
        long = [{"question": "1" * n, "answer": "1"} for n in (600, *range(1, 9))]
        (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
        for name, text in (("plain", "{question} "), ("polite", "please {question} "), ("system", "be brief")):
            (folder / f"{name}.prompt").write_text(text)

    def setup_probe(settings):
        """Return what is built for a run, without its loop."""
        folder, seen = new_folder(), {}
        write_files(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch_loading(patch, seen)
            patch.setattr(setup, "tune_malloc", lambda: None)
            try:
                config = GrpoConfig(**SETUP | settings)
                run, parts = setup.setup_grpo_run(config, Display(1))
            except UsageError as error:
                return seen | {"error": str(error)}
            release_run_lock(run.folder)
        seen["run"] = (run.folder.name if config.save_dir else run.folder.name.split("-")[0], run.step)
        for name in ("train_set", "val_set"):
            seen[name] = [(question.prompt_token_ids, question.answer) for question in getattr(parts, name)]
        seen["other_val_sets"] = {name: len(questions) for name, questions in parts.other_val_sets.items()}
        policy, teacher = parts.policy, parts.teacher
        if teacher is not None:
            seen["teacher"] = sum(p.double().sum().item() for p in teacher.parameters())
            seen["teacher_is_frozen"] = not any(p.requires_grad for p in teacher.parameters())
        seen["policy"] = {name: (tuple(p.shape), p.requires_grad) for name, p in policy.named_parameters()}
        seen["weights"] = sum(p.double().sum().item() for p in policy.parameters())
        seen["ends"] = policy.generation_config.eos_token_id
        seen["attention"] = policy.config._attn_implementation
        seen["checkpointing"] = policy.is_gradient_checkpointing
        seen["scales"] = {str(module.scaling) for module in policy.modules() if hasattr(module, "scaling")}
        seen["types"] = {p.dtype for p in policy.parameters()}
        return seen

    def folder_probe(settings):
        """Return the first word of the name of a run's folder."""
        return setup_probe({"save_dir": None} | settings)["run"]

    def check(config, engine, policy, prompts):
        """Run the self-check of evaluate.py; its requests would hide that a setting does not reach the others."""
        n_calls = len(engine.calls)
        check_evaluation_engine(config, engine, policy, prompts)
        del engine.calls[n_calls:]

    def evaluate_probe(settings):
        """Return what evaluate.py starts, asks, prints and writes."""
        folder, seen = new_folder(), {}
        write_files(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch_loading(patch, seen)
            engines = []
            start = standalone.make_engine
            patch.setattr(standalone, "make_engine", lambda *a: engines.append(start(*a)) or engines[-1])
            patch.setattr(standalone, "print_results", lambda *a: seen.setdefault("shown", []).append(a[1].n_shown))
            patch.setattr(standalone, "describe_environment", dict)
            loaded = standalone.load_policy
            patch.setattr(
                standalone,
                "load_policy",
                lambda path, *others, attention: (
                    seen.setdefault("loaded", []).append((path, attention))
                    or loaded(path, *others, attention=attention)
                ),
            )
            try:
                result = standalone.evaluate(EvaluateConfig(**EVALUATE | settings), check)
            except (UsageError, TrainingAbortedError) as error:
                return seen | {"error": str(error)}
            written = json.loads((result / "results.json").read_text())
            seen["completions"] = (result / "completions.jsonl").read_text()
        del written["config"], written["environment"]
        seen |= {"folder": result.name, "written": written, "calls": [engine.calls for engine in engines]}
        return seen

    def main_probe(settings):
        """Return whether the program trains or prints its settings."""
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_program, "parse_train_config", lambda _: GrpoConfig(**LOOP | settings))
            patch.setattr(train_program, "run_training", lambda *_: seen.append("trains"))
            patch.setattr(train_program, "show", lambda _: seen.append("shows") or "")
            train_program.main([])
        return seen

    def demonstrations_probe(settings):
        """Return the demonstrations that sft.py takes."""
        folder = new_folder()
        for name, first in (("sft", 0), ("other", 5)):
            rows = [{"question": f"{n}?", "response": "aZ"[n % 2], "answer": str(n)} for n in range(first, first + 12)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch_loading(patch, {})
            settings = {"model_path": "m", "data_path": "sft.jsonl"} | settings
            return choose_demonstrations(SftConfig(**settings), say=lambda _: None)

    return {
        "train": train_probe,
        "sft": sft_probe,
        "expert": expert_probe,
        "setup": setup_probe,
        "folder": folder_probe,
        "evaluate": evaluate_probe,
        "main": main_probe,
        "demonstrations": demonstrations_probe,
    }


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<pad>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ strftime_now('%d') + ' assistant ' }}{% endif %}"
    "{% if brief %}{{ 'so ' }}{% endif %}"
)
LOOP = {
    "model_path": "tiny",
    "n_grpo_steps": 1,
    "learning_rate": 1e-2,
    "rollout_batch_size": 16,
    "group_size": 4,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "sampling_min_tokens": 0,
    "sampling_max_tokens": 6,
    "eval_steps": 100,
    "checkpoint_steps": 100,
    "wandb_project": None,
    "engine": "hf",
    "dtype": "float32",
    "self_check_tolerance": 1e9,
}
SETUP = LOOP | {
    "model_path": "model",
    "data_path": "train.jsonl",
    "val_data_path": ("held-out.jsonl",),
    "prompt_path": "plain.prompt",
    "save_dir": "run",
    "engine": "vllm",
    "policy_device": "cpu",
    "dtype": "auto",
}
EVALUATE = {
    "model_path": "model",
    "data_path": ("train.jsonl",),
    "prompt_path": "plain.prompt",
    "device": "cpu",
    "n_examples": 2,
    "sampling_max_tokens": 6,
    "output_dir": "out",
    "dtype": "float32",
    "self_check_tolerance": 1e9,
}

# --- the table -------------------------------------------------------------------------------------------------------
EPOCHS = {"epochs_per_rollout_batch": 2}
CLIP = EPOCHS | {"loss_type": "grpo_clip"}
CISPO, SAPO = EPOCHS | {"loss_type": "cispo"}, EPOCHS | {"loss_type": "sapo"}
COVARIANCE = EPOCHS | {"loss_type": "clip_cov", "covariance_fraction": 0.5}
PENALIZED = EPOCHS | {"loss_type": "kl_cov", "covariance_fraction": 0.5}
WEIGHTED = {"importance": "truncate"}
KL = EPOCHS | {"kl_coef": 0.5}
TWO_STEPS = {"n_grpo_steps": 2}
OWN_PROCESS = {"rollout_process": "own"}
LORA = {"lora_rank": 2}
TAUGHT = {"teacher": "somewhere"}
CONVERSATIONS = "tests.drivers.helpers.conversations"
TRAIN_ROWS = {
    # what is built before the loop
    "model_path": Row("setup", "other-model"),
    "dtype": Row("setup", "bfloat16"),
    "policy_device": Row("setup", "cuda:99"),
    "attention": Row("setup", "sdpa"),
    "gradient_checkpointing": Row("setup", "on"),
    "lora_rank": Row("setup", 2),
    "lora_alpha": Row("setup", 5, LORA),
    "lora_push": Row("setup", "adapter", LORA),
    "prompt_path": Row("setup", "polite.prompt"),
    "chat_template": Row("setup", True),
    "system_prompt_path": Row("setup", "system.prompt", {"chat_template": True}),
    "chat_template_args": Row("setup", ("brief=true",), {"chat_template": True}),
    "chat_date": Row("setup", "2026-11-28", {"chat_template": True, "chat_date": "2026-11-29"}),
    "long_prompts": Row("setup", "refuse", {"long_prompts": "drop", "data_path": "long.jsonl"}),
    "data_path": Row("setup", "other.jsonl"),
    "val_data_path": Row("setup", ("other.jsonl",)),
    "n_val_examples": Row("setup", 2),
    "reward": Row("setup", "question_only"),
    "reward_mix": Row("setup", ("a=1",), {"reward": "math:floor"}),
    "grader_workers": Row("setup", 3),
    "grader_deadline_s": Row("setup", 3.0),
    "engine": Row("setup", "hf"),
    "gpu_memory_utilization": Row("setup", 0.25),
    "rollout_device": Row("setup", "cuda:99"),
    "rollout_process": Row("setup", "own"),
    "rollout_url": Row("setup", ("http://127.0.0.1:1",)),
    "engine_deadline_s": Row("setup", 5.0, OWN_PROCESS),
    "save_dir": Row("setup", "elsewhere"),
    "resume": Row("setup", "nowhere"),
    "deterministic": Row("setup", True),
    "recipe": Row("folder", "quickstart"),
    "show": Row("main", True),
    # what is sampled
    "sampling_temperature": Row("train", 0.5),
    "sampling_min_tokens": Row("train", 2),
    "sampling_max_tokens": Row("train", 5),
    "sampling_stop": Row("train", ("x",)),
    "sampling_top_p": Row("train", 0.5),
    "sampling_top_k": Row("train", 3),
    "sampling_min_p": Row("train", 0.5),
    "sampling_replay": Row("train", True, {"sampling_top_p": 0.5}),
    "rollout": Row("train", f"{CONVERSATIONS}:interrupt"),
    "rollout_deadline_s": Row("train", 0.01, {"rollout": f"{CONVERSATIONS}:hesitate"}),
    "seed": Row("train", 1),
    "rollout_batch_size": Row("train", 32),
    "group_size": Row("train", 8),
    "max_refills": Row("train", 2),
    "curriculum_steps": Row("train", 50),
    "async_steps": Row("train", 1, TWO_STEPS | WEIGHTED | {"engine": "vllm"}),
    # the objective
    "loss_type": Row("train", "grpo_clip", EPOCHS),
    "advantage": Row("train", "leave_one_out"),
    "aggregation": Row("train", "token_mean"),
    "use_std_normalization": Row("train", False),
    "advantage_eps": Row("train", 0.5),
    "std_correction": Row("train", 0),
    "pass_k": Row("train", 2, {"advantage": "pass_at_k"}),
    "reward_weights": Row("train", (0.2, 1.0), {"advantage": "gdpo"}),
    "length_penalty": Row("train", "soft_overlong"),
    "overlong_buffer": Row("train", 4, {"length_penalty": "soft_overlong"}),
    "cliprange": Row("train", 0.01, CLIP | {"cliprange_high": 0.3}),
    "cliprange_high": Row("train", 0.01, CLIP),
    "dual_clip": Row("train", 1.001, CLIP),
    "ratio_low": Row("train", 0.99, CISPO),
    "ratio_high": Row("train", 1.01, CISPO),
    "sapo_temperatures": Row("train", (1.0, 3.0), SAPO),
    "dro_penalty": Row("train", 5.0, EPOCHS | {"loss_type": "dro"}),
    "covariance_fraction": Row("train", 0.1, PENALIZED),
    "covariance_bounds": Row("train", (0.0, 5.0), COVARIANCE),
    "kl_cov_coef": Row("train", 5.0, PENALIZED),
    "positive_nll_coef": Row("train", 0.5),
    "mask_truncated": Row("train", True),
    "top_entropy_fraction": Row("train", 0.5),
    "rejected_tokens": Row("train", "drop", {"top_entropy_fraction": 0.5, "aggregation": "token_mean"}),
    "empty_responses": Row("train", "drop", {"mask_truncated": True}),
    "old_policy": Row("train", "sampler", CLIP),
    "importance": Row("train", "truncate"),
    "importance_level": Row("train", "sequence", WEIGHTED),
    "importance_measure": Row("train", "k3", {"importance": "reject", "importance_high": 1.3}),
    "importance_low": Row("train", 0.9, {"importance": "mask"}),
    "importance_high": Row("train", 1.01, WEIGHTED),
    "self_normalize": Row("train", True, WEIGHTED),
    "off_policy_threshold": Row("train", 0.01),
    "second_moment_threshold": Row("train", 0.02),
    "kl_coef": Row("train", 0.25, KL),
    "kl_estimator": Row("train", "k2", KL),
    "kl_in": Row("train", "reward", KL, {"kl_estimator": "k1"}),
    "kl_reference": Row("train", "sampler", KL),
    "kl_reference_steps": Row("train", 1, KL | TWO_STEPS),
    "kl_reference_share": Row("train", 0.5, KL | TWO_STEPS | {"kl_reference_steps": 1}),
    "teacher": Row("train", "somewhere"),
    "teacher_coef": Row("train", 0.5, TAUGHT),
    "teacher_only": Row("train", True, TAUGHT),
    "entropy_coef": Row("train", 0.1),
    "entropy_target": Row("train", 9.0),
    # the update
    "learning_rate": Row("train", 2e-2),
    "warmup_steps": Row("train", 1),
    "lr_schedule": Row("train", "linear", TWO_STEPS),
    "weight_decay": Row("train", 0.1),
    "adam_betas": Row("train", (0.5, 0.95)),
    "adam_epsilon": Row("train", 1.0),
    "train_batch_size": Row("train", 8),
    "micro_batch_tokens": Row("train", 40),
    "max_grad_norm": Row("train", 1e-3),
    "gradient_accumulation_steps": Row("train", 4),
    "epochs_per_rollout_batch": Row("train", 2),
    # the run
    "n_grpo_steps": Row("train", 2),
    "eval_steps": Row("train", 1, TWO_STEPS),
    "eval_samples": Row("train", 2),
    "eval_temperature": Row("train", 0.5),
    "eval_top_p": Row("train", 0.5),
    "eval_max_tokens": Row("train", 5),
    "checkpoint_steps": Row("train", 1, TWO_STEPS),
    "keep_checkpoints": Row("train", 1),
    "n_logged_completions": Row("train", 1),
    "wandb_project": Row("train", "project"),
    "wandb_run_name": Row("train", "name", {"wandb_project": "project"}),
    "on_anomaly": Row("train", "stop", {"sampling_max_tokens": 1}),
    "self_check_tolerance": Row("train", 1e-9),
}
SFT_ROWS = {
    "epochs": Row("sft", 2),
    "seed": Row("sft", 1),
    "train_batch_size": Row("sft", 5),
    "n_examples": Row("demonstrations", 3),
    "correct_only": Row("demonstrations", True),
    "data_path": Row("demonstrations", "other.jsonl"),
}
EXPERT_ROWS = {
    "n_ei_steps": Row("expert", 2),
    "question_batch_size": Row("expert", 3),
    "group_size": Row("expert", 5),
    "train_batch_size": Row("expert", 1),
    "epochs": Row("expert", 1),
}
EVALUATE_ROWS = {
    "model_path": Row("evaluate", "other-model"),
    "dtype": Row("evaluate", "bfloat16"),
    "attention": Row("evaluate", "eager"),
    "prompt_path": Row("evaluate", "polite.prompt"),
    "chat_template": Row("evaluate", True),
    "system_prompt_path": Row("evaluate", "system.prompt", {"chat_template": True}),
    "chat_template_args": Row("evaluate", ("brief=true",), {"chat_template": True}),
    "chat_date": Row("evaluate", "2026-11-28", {"chat_template": True, "chat_date": "2026-11-29"}),
    "long_prompts": Row("evaluate", "refuse", {"long_prompts": "drop", "data_path": ("long.jsonl",)}),
    "reward": Row("evaluate", "question_only"),
    "reward_mix": Row("evaluate", ("a=1",), {"reward": "math:floor"}),
    "grader_workers": Row("evaluate", 3),
    "grader_deadline_s": Row("evaluate", 3.0),
    "sampling_temperature": Row("evaluate", 0.5),
    "sampling_min_tokens": Row("evaluate", 2),
    "sampling_max_tokens": Row("evaluate", 5),
    "sampling_stop": Row("evaluate", ("x",)),
    "sampling_top_p": Row("evaluate", 0.5),
    "sampling_top_k": Row("evaluate", 3),
    "sampling_min_p": Row("evaluate", 0.5),
    "rollout": Row("evaluate", f"{CONVERSATIONS}:interrupt"),
    "rollout_deadline_s": Row("evaluate", 0.01, {"rollout": f"{CONVERSATIONS}:hesitate"}),
    "seed": Row("evaluate", 1),
    "engine": Row("evaluate", "hf"),
    "gpu_memory_utilization": Row("evaluate", 0.25),
    "data_path": Row("evaluate", ("other.jsonl",)),
    "n_examples": Row("evaluate", 3),
    "n_samples": Row("evaluate", 2),
    "device": Row("evaluate", "cuda:99"),
    "output_dir": Row("evaluate", "elsewhere"),
    "compare_to": Row("evaluate", "other-model"),
    "n_shown": Row("evaluate", 0),
    "self_check_tolerance": Row("evaluate", 1e-9),
}


SEEN_BY_AN_ERROR = (
    *("policy_device", "rollout_device", "device", "resume", "on_anomaly", "self_check_tolerance", "long_prompts"),
    "rollout_deadline_s",
)
"""Settings whose changed value ends the run with an error, on any machine."""


def assert_has_effect(name, row, probes, shared):
    """Check that the row's probe sees the changed setting."""
    probe = probes[row.probe]

    def observe(settings):
        key = (row.probe, repr(sorted(settings.items())))
        if key not in shared.seen:
            shared.seen[key] = probe(settings)
        return shared.seen[key]

    before, after = observe(row.context), observe(row.context | {name: row.value} | row.also)
    assert "error" not in before, before["error"]
    assert ("error" in after) == (name in SEEN_BY_AN_ERROR), after["error"]
    # A comparison by pytest would print both observations.
    assert (after == before) is False, f"{name}={row.value!r} changes nothing"


@pytest.mark.medium
@pytest.mark.parametrize("name", [one.name for one in fields(GrpoConfig)])
def test_train_flag_has_an_effect(name, probes, shared):
    assert_has_effect(name, TRAIN_ROWS[name], probes, shared)


def list_own_flags(kind, *changed):
    """Return the names of the settings that train.py lacks, and of those that mean something else there."""
    return [*(one.name for one in fields(kind) if one.name not in TRAIN_ROWS), *changed]


@pytest.mark.parametrize("name", list_own_flags(SftConfig, "seed", "train_batch_size", "data_path"))
def test_sft_flag_has_an_effect(name, probes, shared):
    assert_has_effect(name, SFT_ROWS[name], probes, shared)


@pytest.mark.medium
@pytest.mark.parametrize("name", list_own_flags(ExpertIterationConfig, "group_size", "train_batch_size"))
def test_expert_iteration_flag_has_an_effect(name, probes, shared):
    assert_has_effect(name, EXPERT_ROWS[name], probes, shared)


@pytest.mark.parametrize("kind", [SftConfig, ExpertIterationConfig], ids=["sft", "expert_iteration"])
def test_imitation_flag_that_train_has_reaches_its_parts(kind):
    """Below the loop, all programs read the settings of train.py."""
    own = {"train_batch_size", "group_size"} if kind is ExpertIterationConfig else set()
    names = [one.name for one in fields(kind)]
    for name in set(names) & TRAIN_ROWS.keys() - own:
        row = TRAIN_ROWS[name]
        context = {key: value for key, value in row.context.items() if key in names}
        settings = kind(**{"model_path": "m", "sampling_min_tokens": 0} | context | {name: row.value})
        config = settings.as_grpo(10) if kind is SftConfig else settings.as_grpo()
        assert getattr(config, name) == row.value, name


@pytest.mark.medium
@pytest.mark.parametrize("name", [one.name for one in fields(EvaluateConfig)])
def test_evaluate_flag_has_an_effect(name, probes, shared):
    assert_has_effect(name, EVALUATE_ROWS[name], probes, shared)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["train", "sft", "expert", "setup", "evaluate"])
def test_probe_of_equal_settings_is_equal(name, probes):
    """Otherwise any setting would seem to have an effect."""
    assert probes[name]({}) == probes[name]({})


def test_setup_models_have_the_type_that_was_chosen(probes):
    assert probes["setup"]({})["types"] == {torch.float32}
    assert probes["setup"]({"dtype": "bfloat16"})["types"] == {torch.bfloat16}


def test_setup_options_of_the_engine_follow_the_settings(probes):
    settings = {"seed": 3, "gpu_memory_utilization": 0.25, "rollout_process": "own", "engine_deadline_s": 5.0}
    seen = probes["setup"](settings)
    kind, options = seen["engine"]
    assert (kind, options.seed, options.gpu_memory_utilization) == ("vllm", 3, 0.25)
    assert (options.own_process, options.deadline_s, options.urls, options.dtype) == (True, 5.0, (), torch.float32)
    prompts = [prompt for name in ("train_set", "val_set") for prompt, _ in seen[name]]
    assert options.max_model_len == max(map(len, prompts)) + 6
    url = "http://127.0.0.1:1"
    assert probes["setup"]({"rollout_url": (url,)})["engine"][1].urls == (url,)


def test_setup_plans_memory_for_the_longest_prompt(probes, monkeypatch):
    plan, planned = setup.configure_memory, []
    monkeypatch.setattr(setup, "configure_memory", lambda *given: planned.append(given[2]) or plan(*given))
    seen = probes["setup"]({"sampling_max_tokens": 7})
    assert planned == [max(len(prompt) for name in ("train_set", "val_set") for prompt, _ in seen[name])]


def test_setup_of_several_held_out_sets(probes, capsys):
    """The first is the one of a single set; the engine has room for the longest response of either kind."""
    paths = ("held-out.jsonl", "easy=other.jsonl", "train.jsonl")
    single = probes["setup"]({})
    capsys.readouterr()
    seen = probes["setup"]({"val_data_path": paths, "n_val_examples": 3})
    assert "9 training and 3 + 3 + 3 held-out questions" in capsys.readouterr().out
    assert seen["val_set"] == single["val_set"][:3]
    assert seen["other_val_sets"] == {"easy": 3, "train": 3}
    longest = len(single["val_set"][0][0])  # of two digits; those to train on have one
    assert single["engine"][1].max_model_len == longest + 6
    for eval_max_tokens, room in ((40, longest + 40), (4, longest - 1 + 6)):
        options = probes["setup"]({"eval_max_tokens": eval_max_tokens})["engine"][1]
        assert options.max_model_len == room
    problem = probes["setup"]({"eval_max_tokens": 600})["error"]
    assert "4 of 4 questions do not fit into the model's context of 512 tokens with --eval-max-tokens 600" in problem
    assert problem.endswith("; lower --eval-max-tokens or remove them")


def test_setup_teacher_is_a_second_frozen_model_that_memory_is_left_for(probes):
    alone, other = probes["setup"]({}), probes["setup"]({"model_path": "other-model"})
    for lora in ({}, LORA):
        seen = probes["setup"]({"teacher": "other-model"} | lora)
        assert (seen["teacher"], seen["teacher_is_frozen"]) == (other["weights"], True)
    seen = probes["setup"]({"teacher": "other-model"})
    assert seen["weights"] == alone["weights"] != seen["teacher"]
    more = seen["engine"][1].reserved_bytes - alone["engine"][1].reserved_bytes
    assert more == 4 * sum(math.prod(shape) for shape, _ in seen["policy"].values())


def test_setup_tells_how_many_questions_are_different(probes, capsys):
    probes["setup"]({})
    assert "9 training and " in capsys.readouterr().out
    probes["setup"]({"data_path": "repeated.jsonl"})
    assert "18 (9 different) training and " in capsys.readouterr().out


def test_setup_chat_template_ends_responses_at_the_end_of_a_turn(probes):
    """The template of the probe ends a turn with the padding token, number 0."""
    assert probes["setup"]({})["ends"] == 1
    assert probes["setup"]({"chat_template": True})["ends"] == [0, 1]
