"""A tiny policy and a task of one letter: GRPO learns it in seconds."""

from types import SimpleNamespace

import torch

from drivers.common.display import Display
from drivers.engines.hf import HFEngine
from drivers.engines.protocol import Completion
from drivers.grading.verdicts import make_inline_grader
from drivers.settings.grpo import GrpoConfig
from drivers.tasks.questions import Example, Question, make_questions
from drivers.training.batch import make_rollout_batch
from drivers.training.run import Run
from tests.tiny import make_tiny_policy, make_tiny_tokenizer

LETTER = "a"
LONG_PROMPT, SHORT_PROMPT = list(range(5, 17)), [7, 8]


def letter_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Return the share of characters that are the wanted letter, which gives a signal from the first step on."""
    share = response.count(ground_truth) / len(response) if response else 0.0
    return {"reward": share, "format_reward": float(bool(response)), "answer_reward": share}


letter_grader = make_inline_grader(letter_reward)


def make_letter_questions(tokenizer, n=4):
    """Return questions with different prompts and one answer, so that a test can tell groups apart."""
    return [
        Question(Example(f"say it {k}", LETTER, f"letters:{k}"), tuple(tokenizer.encode(f"say it {'!' * k} ")))
        for k in range(1, n + 1)
    ]


def ask(prompt, question, tokenizer):
    """Return the token ids of the prompt that asks a question."""
    (made,) = make_questions([Example(question, LETTER, "asked:1")], prompt, tokenizer)
    return made.prompt_token_ids


def make_tiny_config(**changes) -> GrpoConfig:
    """Return settings of 4 prompts with 8 responses of 6 tokens each: a step takes a tenth of a second."""
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


def make_tiny_parts(seed=0):
    """Return the tokenizer, the policy, an engine that shares its weights, and the questions."""
    tokenizer = make_tiny_tokenizer()
    policy = make_tiny_policy(seed).eval()
    return SimpleNamespace(
        tokenizer=tokenizer,
        policy=policy,
        engine=HFEngine(policy, tokenizer),
        questions=make_letter_questions(tokenizer),
    )


def make_run(config, folder, tokenizer):
    """Return a run that logs into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, folder, tokenizer, Display(config.n_grpo_steps))


def make_completion(prompt, tokens, log_probs=None, finish_reason="stop", text="x"):
    """Return a completion whose log-probs are -1 unless given."""
    values = log_probs if log_probs is not None else [-1.0] * len(tokens)
    return Completion(text, tuple(prompt), tuple(tokens), tuple(values), finish_reason)


def make_batch(*pairs):
    """Return a rollout batch of (prompt, response) pairs with rewards of 0."""
    completions = [make_completion(prompt, tokens) for prompt, tokens in pairs]
    return make_rollout_batch(completions, torch.zeros(len(completions)))


def clone_policy(policy):
    """Return a policy with equal weights in its own memory."""
    twin = type(policy)(policy.config).to(next(policy.parameters()).dtype).eval()
    twin.load_state_dict(policy.state_dict())
    return twin


def make_tiny_teacher():
    """Return the policy of `make_tiny_parts`, but sure of its tokens: steps suffice to learn that."""
    teacher = make_tiny_policy()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(4.0)
    return teacher


def flatten_weights(policy):
    """Return all weights of a policy as one vector."""
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def sample_rollouts(config, parts, rewards=None):
    """Return one step's rollouts and their scores; the default rewards give every group a signal."""
    prompts = [question.prompt_token_ids for question in parts.questions]
    completions = parts.engine.generate(prompts, config.sampling, seed=3)
    marks = torch.arange(float(len(completions))) % 3 if rewards is None else rewards
    scores = [{"reward": r, "format_reward": 1.0, "answer_reward": r} for r in marks.tolist()]
    return make_rollout_batch(completions, marks, config.group_size), scores
