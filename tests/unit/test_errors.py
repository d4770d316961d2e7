"""Every error of the core: what was given, what was required, what to do."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import grpo_core as g

ONE, MASK, ADVANTAGE = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1)
LETTERS = SimpleNamespace(
    pad_token_id=0, eos_token_id=None, encode=lambda text, add_special_tokens=True: [*text.encode()]
)
NO_PADDING = SimpleNamespace(pad_token_id=None, eos_token_id=None, encode=LETTERS.encode)


def rewards(
    reward_fn=lambda response, truth: {"reward": 1.0}, responses=2, truths="ab", size=2, eps=1e-6, by_std=True
):
    return g.compute_group_normalized_rewards(reward_fn, ["o"] * responses, list(truths), size, eps, by_std)


def step(steps=1, loss_type="reinforce_with_baseline", **arguments):
    return g.grpo_microbatch_loss(ONE, MASK, steps, loss_type, advantages=ADVANTAGE, **arguments)


ERRORS = {
    "normalize_constant=0.0 must be finite and not 0: it divides the sum": lambda: g.masked_normalize(ONE, MASK, 0.0),
    "normalize_constant=nan must be finite and not 0: it divides the sum": lambda: g.masked_normalize(
        ONE, MASK, math.nan
    ),
    "normalize_constant=inf must be finite and not 0: it divides the sum": lambda: g.masked_normalize(
        ONE, MASK, math.inf
    ),
    "temperature=0.0 must be positive and finite; for greedy decoding take the argmax": lambda: g.compute_entropy(
        ONE, temperature=0.0
    ),
    "temperature=nan must be positive and finite; for greedy decoding take the argmax": lambda: g.select_log_probs(
        ONE, torch.tensor([0]), temperature=math.nan
    ),
    "temperature=inf must be positive and finite; for greedy decoding take the argmax": lambda: g.select_log_probs(
        ONE, torch.tensor([0]), temperature=math.inf
    ),
    "labels run from -100 to 1 but the vocabulary has 3 tokens: every label must be in [0, 3), those of masked"
    " positions too": lambda: g.select_log_probs(torch.zeros(2, 3), torch.tensor([-100, 1])),
    "labels run from 3 to 3 but the vocabulary has 3 tokens: every label must be in [0, 3), those of masked positions"
    " too": lambda: g.select_log_probs(torch.zeros(1, 3), torch.tensor([3])),
    "3 rollouts do not fill groups of group_size=2: give whole groups": lambda: g.normalize_group_rewards(
        torch.zeros(3), 2
    ),
    "2 rollouts do not fill groups of group_size=0: give whole groups": lambda: rewards(size=0),
    "5 rollouts do not fill groups of group_size=2: give whole groups": lambda: rewards(responses=5, truths="a" * 5),
    "group_size=1 has no standard deviation: sample at least 2 responses per question, or set"
    " normalize_by_std=False": lambda: rewards(size=1),
    "advantage_eps=-1e-06 must be finite and at least 0": lambda: rewards(eps=-1e-6),
    "advantage_eps=nan must be finite and at least 0": lambda: g.normalize_group_rewards(
        torch.zeros(2), 2, advantage_eps=math.nan
    ),
    "rollout_responses has 2 entries and repeated_ground_truths has 1: give one ground truth per response, and at"
    " least one response": lambda: rewards(truths="a"),
    "rollout_responses has 0 entries and repeated_ground_truths has 0: give one ground truth per response, and at"
    " least one response": lambda: rewards(responses=0, truths=""),
    "reward_fn returned {'score': 1} for rollout 0: it must return a dict with a 'reward'": lambda: rewards(
        lambda response, truth: {"score": 1}
    ),
    "reward_fn returned 1.0 for rollout 0: it must return a dict with a 'reward'": lambda: rewards(
        lambda response, truth: 1.0
    ),
    "reward_fn returned reward=nan for rollout 1: it must be a finite float32": lambda: rewards(
        lambda response, truth: {"reward": float(truth)}, truths=["0", "nan"]
    ),
    "reward_fn returned reward=1e+39 for rollout 0: it must be a finite float32": lambda: rewards(
        lambda response, truth: {"reward": 1e39}
    ),
    "cliprange=-0.1 must be at least 0: it is the half-width of an interval around 1": lambda: (
        g.compute_grpo_clip_loss(ADVANTAGE, ONE, ONE, -0.1)
    ),
    "cliprange=nan must be at least 0: it is the half-width of an interval around 1": lambda: step(
        loss_type="grpo_clip", old_log_probs=ONE, cliprange=math.nan
    ),
    "loss_type='ppo' is unknown: choose one of no_baseline, reinforce_with_baseline, grpo_clip,"
    " grpo_no_clip": lambda: step(loss_type="ppo"),
    "loss_type='no_baseline' needs raw_rewards; got None": lambda: step(loss_type="no_baseline"),
    "loss_type='reinforce_with_baseline' needs advantages; got None": lambda: g.compute_policy_gradient_loss(
        ONE, "reinforce_with_baseline"
    ),
    "loss_type='grpo_clip' needs advantages; got None": lambda: g.compute_policy_gradient_loss(ONE, "grpo_clip"),
    "loss_type='grpo_clip' needs old_log_probs; got None": lambda: step(loss_type="grpo_clip"),
    "loss_type='grpo_clip' needs cliprange; got None": lambda: step(loss_type="grpo_clip", old_log_probs=ONE),
    "loss_type='grpo_no_clip' needs advantages; got None": lambda: g.compute_policy_gradient_loss(ONE, "grpo_no_clip"),
    "loss_type='grpo_no_clip' needs old_log_probs; got None": lambda: step(loss_type="grpo_no_clip"),
    "aggregation='mean' is unknown: choose one of sequence_mean, token_mean, constant": lambda: step(
        aggregation="mean"
    ),
    "aggregation='token_mean' needs normalize_constant; got None": lambda: step(aggregation="token_mean"),
    "aggregation='constant' needs normalize_constant; got None": lambda: step(aggregation="constant"),
    "normalize_constant=0.0 must be positive and finite: it divides the loss": lambda: step(
        aggregation="token_mean", normalize_constant=0.0
    ),
    "normalize_constant=-1.0 must be positive and finite: it divides the loss": lambda: g.sft_microbatch_loss(
        ONE, MASK, 1, -1.0
    ),
    "normalize_constant=nan must be positive and finite: it divides the loss": lambda: step(
        aggregation="constant", normalize_constant=math.nan
    ),
    "gradient_accumulation_steps=0 must be at least 1": lambda: step(0),
    "gradient_accumulation_steps=-1 must be at least 1": lambda: step(
        -1, aggregation="token_mean", normalize_constant=1.0
    ),
    "gradient_accumulation_steps=-2 must be at least 1": lambda: g.sft_microbatch_train_step(ONE, MASK, -2),
    "prompt_strs has 2 entries and output_strs has 1: give one output per prompt, and at least one prompt": lambda: (
        g.tokenize_prompt_and_output(["a", "b"], ["c"], LETTERS)
    ),
    "prompt_strs has 0 entries and output_strs has 0: give one output per prompt, and at least one prompt": lambda: (
        g.tokenize_prompt_and_output([], [], LETTERS)
    ),
    "prompt_strs[1]='' has no token: the first token of the output would have nothing to be predicted from": lambda: (
        g.tokenize_prompt_and_output(["a", ""], ["b", "c"], LETTERS)
    ),
    "tokenizer has neither pad_token_id nor eos_token_id: set one of them, rows need padding": lambda: (
        g.tokenize_prompt_and_output(["a"], ["b"], NO_PADDING)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_the_error_says_what_was_given_and_what_to_do(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ERRORS[message]()


def test_another_failure_of_the_lookup_keeps_its_own_words():
    """Labels in range: whatever went wrong, it was not them."""
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        g.select_log_probs.__wrapped__(torch.zeros(1, 3), torch.zeros(2, 2, dtype=torch.long))
