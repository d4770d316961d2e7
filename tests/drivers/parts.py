"""A policy, a task and an engine small enough that GRPO learns in seconds."""

from types import SimpleNamespace

import torch

from drivers.common.display import Display
from drivers.engines.hf import HFEngine
from drivers.engines.protocol import Completion
from drivers.grading.verdicts import make_inline_grader
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Example, Question
from drivers.training.batch import make_rollout_batch
from drivers.training.run import Run
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

LETTER = "a"


def letter_reward(response: str, ground_truth: str) -> dict[str, float]:
    """The share of the response's characters that are the asked-for letter: a signal from the first step on."""
    share = response.count(ground_truth) / len(response) if response else 0.0
    return {"reward": share, "format_reward": float(bool(response)), "answer_reward": share}


letter_grader = make_inline_grader(letter_reward)


def letter_questions(tokenizer, n=4):
    """The same letter is asked for by different prompts: groups must not be mixed up to score them, only to learn."""
    return [
        Question(Example(f"say it {k}", LETTER, f"letters:{k}"), tuple(tokenizer.encode(f"say it {'!' * k} ")))
        for k in range(1, n + 1)
    ]


def tiny_config(**changes) -> GrpoConfig:
    """Two letters, 8 responses each, 6 tokens: a step takes a tenth of a second."""
    settings = {
        "model_path": "tiny",
        "n_grpo_steps": 20,
        "learning_rate": 1e-2,
        "rollout_batch_size": 32,
        "group_size": 8,
        "train_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "sampling_min_tokens": 0,
        "sampling_max_tokens": 6,
        "eval_steps": 100,
        "checkpoint_steps": 100,
        "wandb_project": None,
        "engine": "hf",
        "dtype": "float32",
    }
    return GrpoConfig(**(settings | changes))


def tiny_parts(seed=0):
    tokenizer = make_tiny_tokenizer()
    policy = make_tiny_policy(seed).eval()
    return SimpleNamespace(
        tokenizer=tokenizer,
        policy=policy,
        engine=HFEngine(policy, tokenizer),
        questions=letter_questions(tokenizer),
    )


def make_run(config, folder, tokenizer):
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, folder, tokenizer, Display(config.n_grpo_steps))


def completion(prompt, tokens, log_probs=None, finish_reason="stop", text="x"):
    values = log_probs if log_probs is not None else [-1.0] * len(tokens)
    return Completion(text, tuple(prompt), tuple(tokens), tuple(values), finish_reason)


def clone_policy(policy):
    twin = type(policy)(policy.config).to(next(policy.parameters()).dtype).eval()
    twin.load_state_dict(policy.state_dict())
    return twin


def rollouts_of(config, parts, rewards=None):
    """A step's rollouts from the tiny policy, with rewards that make a signal."""
    prompts = [question.prompt_token_ids for question in parts.questions]
    completions = parts.engine.generate(prompts, config.sampling, seed=3)
    marks = torch.arange(float(len(completions))) % 3 if rewards is None else rewards
    scores = [{"reward": r, "format_reward": 1.0, "answer_reward": r} for r in marks.tolist()]
    return make_rollout_batch(completions, marks, config.group_size), scores
