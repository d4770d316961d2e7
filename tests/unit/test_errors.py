"""Every error of the core states the argument and its value, the problem and the remedy."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped

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


TWO = torch.tensor([1.0, 0.0])
WIDE = torch.ones(1, 2)
WIDE_MASK = torch.ones(1, 2, dtype=torch.bool)
ERRORS = {
    "3 rollouts do not fill groups of group_sizes=[2, 2]: give sizes of at least 1 that add up to 3": lambda: (
        g.compute_gpg_advantages(torch.zeros(3), [2, 2])
    ),
    "2 rollouts do not fill groups of group_sizes=[2, 0]: give sizes of at least 1 that add up to 2": lambda: (
        g.compute_leave_one_out_advantages(TWO, [2, 0])
    ),
    "correction=2 must be 0 or 1": lambda: g.normalize_group_rewards(TWO, 2, correction=2),
    "correction=-1 must be 0 or 1": lambda: g.whiten_over_tokens(ONE, MASK, correction=-1),
    "advantage_eps=-1.0 must be finite and at least 0": lambda: g.whiten_over_tokens(ONE, MASK, advantage_eps=-1.0),
    "advantage_eps=inf must be finite and at least 0": lambda: g.compute_batch_std_advantages(
        TWO, 2, advantage_eps=math.inf
    ),
    "reward_weights=[1.0, 2.0] must be one number per reward, 1 in total": lambda: g.compute_gdpo_advantages(
        TWO[:, None], 2, reward_weights=[1.0, 2.0]
    ),
    "lengths hold -1: each must be at least 0": lambda: g.compute_opo_advantages(TWO, 2, torch.tensor([3, -1])),
    "rewards hold -1.0: each must be at least 0, because their mean is a divisor": lambda: g.compute_maxrl_advantages(
        torch.tensor([1.0, -1.0]), 2
    ),
    "rewards hold 0.5: each must be 0 or 1, because pass@k counts correct answers": lambda: (
        g.compute_pass_at_k_advantages(torch.tensor([1.0, 0.5]), 2, 1)
    ),
    "greedy_rewards=[2 values] must be one value for each of the 1 groups": lambda: g.compute_remax_advantages(
        TWO, 2, TWO
    ),
    "k=3 must be between 1 and the size of the smallest group, 2": lambda: g.compute_pkpo_advantages(TWO, 2, 3),
    "k=0 must be between 1 and the size of the smallest group, 2": lambda: g.compute_pass_at_k_advantages(TWO, 2, 0),
    "k=5 must be between 1 and the number of samples, 4": lambda: g.estimate_pass_at_k(torch.tensor([1]), 4, 5),
    "n_correct must lie between 0 and n_samples for every question": lambda: g.estimate_pass_at_k(
        torch.tensor([5]), 4, 1
    ),
    "cliprange_high=-0.5 must be at least 0: it is the distance of a bound from the center": lambda: (
        g.compute_gspo_loss(ADVANTAGE, ONE, ONE, MASK, 0.1, cliprange_high=-0.5)
    ),
    "dual_clip=1.0 must be above 1: it bounds ratios where the advantage is negative": lambda: (
        g.compute_grpo_clip_loss(ADVANTAGE, ONE, ONE, 0.2, dual_clip=1.0)
    ),
    "ratio_low=2.0 must be between 0 and ratio_high=1.0": lambda: g.compute_cispo_loss(ADVANTAGE, ONE, ONE, 2.0, 1.0),
    "temperature_positive=0.0 must be positive": lambda: g.compute_sapo_loss(ADVANTAGE, ONE, ONE, 0.0),
    "temperature_negative=-1.0 must be positive": lambda: g.compute_sapo_loss(ADVANTAGE, ONE, ONE, 1.0, -1.0),
    "threshold_low=-0.1 must be at least 0: it is a difference of probabilities": lambda: g.compute_dppo_tv_loss(
        ADVANTAGE, ONE, ONE, -0.1
    ),
    "threshold_high=nan must be at least 0: it is a difference of probabilities": lambda: g.compute_dppo_tv_loss(
        ADVANTAGE, ONE, ONE, 0.1, math.nan
    ),
    "threshold=-0.1 must be at least 0: it is a divergence in nats": lambda: g.compute_dppo_kl_loss(
        ADVANTAGE, ONE, ONE, -0.1
    ),
    "kl_coef=-1.0 must be at least 0: it penalizes tokens": lambda: g.compute_kl_cov_loss(
        ADVANTAGE, ONE, ONE, MASK, -1.0
    ),
    "beta=1.0 must be between 0 and 1, both excluded": lambda: g.compute_jensen_shannon_divergence(ONE, ONE, 1.0),
    "temperature=0.0 must be positive": lambda: g.compute_top_k_forward_kl(
        ONE, ONE, torch.tensor([[0]]), temperature=0.0
    ),
    "beta=0.0 must be positive": lambda: g.compute_dpo_loss(ONE, ONE, ONE, ONE, MASK, MASK, 0.0),
    "label_smoothing=0.5 must be at least 0 and below 0.5": lambda: g.compute_dpo_loss(
        ONE, ONE, ONE, ONE, MASK, MASK, 0.1, label_smoothing=0.5
    ),
    "penalty=-1.0 must be at least 0: it penalizes a distance": lambda: g.compute_dro_loss(ADVANTAGE, ONE, ONE, -1.0),
    "fraction=1.5 must be between 0 and 1": lambda: g.select_high_entropy(ONE, MASK, 1.5),
    "fraction=-0.5 must be between 0 and 1": lambda: g.select_high_covariance(ADVANTAGE, ONE, MASK, -0.5),
    "threshold=-1.0 must be at least 0: it bounds a mean of squares": lambda: g.keep_within_second_moment(
        ONE, ONE, MASK, -1.0
    ),
    "level='word' is unknown: choose one of token, sequence, geometric": lambda: g.compute_importance_ratios(
        ONE, ONE, MASK, "word"
    ),
    "level='tokens' is unknown: choose one of token, sequence, geometric (did you mean token?)": lambda: (
        g.compute_importance_divergences(ONE, ONE, MASK, "k2", "tokens")
    ),
    "measure='k1' is unknown: choose one of binary_kl, total_variation, k2, k3": lambda: (
        g.compute_importance_divergences(ONE, ONE, MASK, "k1", "token")
    ),
    "low=3.0 must be between 0 and high=2.0": lambda: g.truncate_importance_weights(ONE, low=3.0, high=2.0),
    "low=-1.0 must be between 0 and high=2.0": lambda: g.mask_importance_weights(ONE, low=-1.0, high=2.0),
    "low=1.0 must be between 0 and high=nan": lambda: g.keep_within_bounds(ONE, low=1.0, high=math.nan),
    "estimator='k4' is unknown: choose one of k1, k2, k3, abs, ratio_k3": lambda: g.estimate_kl(ONE, ONE, "k4"),
    "discount=1.5 must be between 0 and 1": lambda: g.compute_reward_to_go(ONE, MASK, discount=1.5),
    "buffer=9 must be between 0 and max_length=8": lambda: g.compute_soft_overlong_penalty(torch.tensor([1]), 8, 9),
    "max_length=0 must be at least 1": lambda: g.compute_cosine_length_reward(torch.tensor([1]), 0, 2.0, 1.0),
    "step=-0.1 must be at least 0": lambda: g.adapt_entropy_coefficient(0.0, 1.0, 1.0, step=-0.1),
    "low=1.0 must be at most high=0.5": lambda: g.adapt_entropy_coefficient(0.0, 1.0, 1.0, low=1.0, high=0.5),
    "entropy=nan must be finite": lambda: g.adapt_entropy_coefficient(0.0, math.nan, 1.0),
    "confidence=1.0 must be between 0 and 1, both excluded": lambda: g.estimate_mean_interval(TWO, confidence=1.0),
    "values=[] must be at least one number, all of them in [0, 1]": lambda: g.estimate_mean_interval(TWO[:0]),
    "values=[1.5] must be at least one number, all of them in [0, 1]": lambda: g.estimate_mean_interval(
        torch.tensor([1.5])
    ),
    "answers and is_correct must have the same lengths: one verdict per answer": lambda: g.compute_majority_accuracy(
        [["a"]], [[True, False]]
    ),
    "aggregation='prompt_mean' needs group_sizes; got None": lambda: step(aggregation="prompt_mean"),
    "rejected_tokens='keep' is unknown: choose one of count, drop": lambda: g.compute_token_weights(
        MASK, "token_mean", rejected_tokens="keep"
    ),
    "empty_responses='skip' is unknown: choose one of count, drop": lambda: g.compute_sequence_weights(
        MASK, empty_responses="skip"
    ),
    "kept=[shape (1, 2)] must be one column, or as many as response_mask has: 3": lambda: g.compute_token_weights(
        torch.ones(1, 3).bool(), "token_mean", kept=WIDE_MASK
    ),
    "losses have shape (1, 1) (one per response) and weights (1, 2) (one per token): losses of whole responses need"
    " compute_sequence_weights, token losses compute_token_weights": lambda: g.sum_weighted_losses(ONE, WIDE),
    "importance_weights have shape (1, 2) and losses (1, 1): losses of whole responses take one weight per"
    " response": lambda: g.compose_policy_loss(ONE, ONE, importance_weights=WIDE),
    "kl needs token_weights; got None": lambda: g.compose_policy_loss(WIDE, WIDE, kl=WIDE, kl_coef=0.1),
    "nll needs nll_weights; got None": lambda: g.compose_policy_loss(WIDE, WIDE, nll=WIDE, nll_coef=0.1),
    "token_entropy needs token_weights; got None": lambda: g.compose_policy_loss(
        WIDE, WIDE, token_entropy=WIDE, entropy_coef=0.1
    ),
    "normalize_constant=0.0 must be finite and not 0: it divides the sum": lambda: g.masked_normalize(ONE, MASK, 0.0),
    "normalize_constant=nan must be finite and not 0: it divides the sum": lambda: g.masked_normalize(
        ONE, MASK, math.nan
    ),
    "normalize_constant=inf must be finite and not 0: it divides the sum": lambda: g.masked_normalize(
        ONE, MASK, math.inf
    ),
    "temperature=0.0 must be positive and finite: for greedy decoding, use the argmax": lambda: g.compute_entropy(
        ONE, temperature=0.0
    ),
    "temperature=nan must be positive and finite: for greedy decoding, use the argmax": lambda: g.select_log_probs(
        ONE, torch.tensor([0]), temperature=math.nan
    ),
    "temperature=inf must be positive and finite: for greedy decoding, use the argmax": lambda: g.select_log_probs(
        ONE, torch.tensor([0]), temperature=math.inf
    ),
    "labels run from -100 to 1 but the vocabulary has 3 tokens: every label must be in [0, 3), including"
    " those of masked positions": lambda: g.select_log_probs(torch.zeros(2, 3), torch.tensor([-100, 1])),
    "labels run from 3 to 3 but the vocabulary has 3 tokens: every label must be in [0, 3), including those of masked"
    " positions": lambda: g.select_log_probs(torch.zeros(1, 3), torch.tensor([3])),
    "labels[1]=2 is outside of its token set (flat rows): the sampler could not have drawn it; pass the set of the"
    " same position": lambda: g.select_log_probs(
        torch.zeros(2, 3), torch.tensor([1, 2]), kept_ids=torch.tensor([[1, -1], [0, 1]])
    ),
    "labels[0]=1 is outside of its token set (flat rows): the sampler could not have drawn it; pass the set of the"
    " same position": lambda: g.fused_linear_log_probs(
        torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([1]), excluded_ids=torch.tensor([[1]])
    ),
    "kept_ids=[0 to 3] must be token ids in [0, 3), or -1 as padding": lambda: g.select_log_probs(
        torch.zeros(1, 3), torch.tensor([0]), kept_ids=torch.tensor([[0, 3]])
    ),
    "excluded_ids=[-100 to -100] must be token ids in [0, 3), or -1 as padding": lambda: g.compute_entropy(
        torch.zeros(1, 3), excluded_ids=torch.tensor([[-100]])
    ),
    "3 rollouts do not fill groups of group_sizes=2: give whole groups": lambda: g.normalize_group_rewards(
        torch.zeros(3), 2
    ),
    "2 rollouts do not fill groups of group_size=0: give whole groups": lambda: rewards(size=0),
    "5 rollouts do not fill groups of group_size=2: give whole groups": lambda: rewards(responses=5, truths="a" * 5),
    "a group of 1 response has no standard deviation: sample at least 2 per question, or set"
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
    "cliprange=-0.1 must be at least 0: it is the distance of a bound from the center": lambda: (
        g.compute_grpo_clip_loss(ADVANTAGE, ONE, ONE, -0.1)
    ),
    "cliprange=nan must be at least 0: it is the distance of a bound from the center": lambda: step(
        loss_type="grpo_clip", old_log_probs=ONE, cliprange=math.nan
    ),
    "loss_type='ppo' is unknown: choose one of no_baseline, reinforce_with_baseline, grpo_clip,"
    " grpo_no_clip": lambda: step(loss_type="ppo"),
    "loss_type='grpo_clp' is unknown: choose one of no_baseline, reinforce_with_baseline, grpo_clip, grpo_no_clip (did"
    " you mean grpo_clip?)": lambda: step(loss_type="grpo_clp"),
    "loss_type='gspo' must be one of no_baseline, reinforce_with_baseline, grpo_clip, grpo_no_clip: call"
    " compute_gspo_loss for this objective, and compose_policy_loss with its losses": lambda: step(loss_type="gspo"),
    "loss_type='no_baseline' needs raw_rewards; got None": lambda: step(loss_type="no_baseline"),
    "loss_type='reinforce_with_baseline' needs advantages; got None": lambda: g.compute_policy_gradient_loss(
        ONE, "reinforce_with_baseline"
    ),
    "loss_type='grpo_clip' needs advantages; got None": lambda: g.compute_policy_gradient_loss(ONE, "grpo_clip"),
    "loss_type='grpo_clip' needs old_log_probs; got None": lambda: step(loss_type="grpo_clip"),
    "loss_type='grpo_clip' needs cliprange; got None": lambda: step(loss_type="grpo_clip", old_log_probs=ONE),
    "loss_type='grpo_no_clip' needs advantages; got None": lambda: g.compute_policy_gradient_loss(ONE, "grpo_no_clip"),
    "loss_type='grpo_no_clip' needs old_log_probs; got None": lambda: step(loss_type="grpo_no_clip"),
    "aggregation='mean' is unknown: choose one of sequence_mean, token_mean, prompt_mean, sequence_sum,"
    " constant": lambda: step(aggregation="mean"),
    "aggregation='token_mean' needs normalize_constant, the response tokens of the optimizer step; got None": lambda: (
        step(aggregation="token_mean")
    ),
    "aggregation='constant' needs normalize_constant, the length limit of a response; got None": lambda: step(
        aggregation="constant"
    ),
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
    "prompt_strs[1]='' has no token, so no logits predict the first token of the output: give a prompt of at least one"
    " token": lambda: g.tokenize_prompt_and_output(["a", ""], ["b", "c"], LETTERS),
    "tokenizer has neither pad_token_id nor eos_token_id: set one of them to pad rows": lambda: (
        g.tokenize_prompt_and_output(["a"], ["b"], NO_PADDING)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_invalid_argument_raises_with_full_message(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ERRORS[message]()


LOG_PROBS = torch.full((2, 3), -1.0)
TYPE_ERRORS = {
    "grpo_microbatch_loss: advantages is float32 of shape (2,), but must be Float[Tensor, 'batch 1'] | None, here of"
    " shape (2, 1); pass advantages[:, None]": lambda: g.grpo_microbatch_loss(
        LOG_PROBS, LOG_PROBS < 0, 1, "reinforce_with_baseline", advantages=TWO
    ),
    "compute_grpo_clip_loss: advantages is float32 of shape (2,), but must be Float[Tensor, 'batch #seq']; pass"
    " advantages[:, None]": lambda: g.compute_grpo_clip_loss(TWO, LOG_PROBS, LOG_PROBS, 0.2),
    "fused_linear_grpo_loss: advantages is float32 of shape (2,), but must be Float[Tensor, 'batch #seq']; pass"
    " advantages[:, None]": lambda: g.fused_linear_grpo_loss(
        torch.zeros(2, 3, 4),
        torch.zeros(5, 4),
        torch.zeros(2, 3).long(),
        response_mask=LOG_PROBS < 0,
        advantages=TWO,
        old_log_probs=None,
        cliprange=0.2,
    ),
    "sft_microbatch_loss: response_mask is float32 of shape (2, 3), but must be Bool[Tensor, 'batch seq'], here of"
    " shape (2, 3); pass response_mask.bool()": lambda: g.sft_microbatch_loss(LOG_PROBS, LOG_PROBS, 1),
    "sft_microbatch_loss: response_mask is bool of shape (1, 2), but must be Bool[Tensor, 'batch seq'], here of shape"
    " (2, 3); batch is 2 in policy_log_probs; seq is 3 in policy_log_probs": lambda: g.sft_microbatch_loss(
        LOG_PROBS, WIDE_MASK, 1
    ),
    "normalize_group_rewards: rewards is float32 of shape (2, 1), but must be Float[Tensor, 'rollout']; pass"
    " rewards[:, 0]": lambda: g.normalize_group_rewards(TWO[:, None], 2),
    "normalize_group_rewards: rewards is int64 of shape (2,), but must be Float[Tensor, 'rollout']; pass"
    " rewards.float()": lambda: g.normalize_group_rewards(TWO.long(), 2),
    "normalize_group_rewards: rewards is [1.0, 0.0], of type list, but must be Float[Tensor, 'rollout']; pass"
    " torch.as_tensor(rewards)": lambda: g.normalize_group_rewards([1.0, 0.0], 2),
    "compute_grpo_clip_loss: policy_log_probs is float32 of shape (2, 3), but must be Float[Tensor, 'batch seq'];"
    " batch is 3 in advantages": lambda: g.compute_grpo_clip_loss(torch.ones(3, 1), LOG_PROBS, LOG_PROBS, 0.2),
    "normalize_group_rewards: rewards is float32 of shape (2, 3), but must be Float[Tensor, 'rollout']; pass"
    " rewards.flatten()": lambda: g.normalize_group_rewards(LOG_PROBS, 3),
    "normalize_group_rewards: group_sizes is float32 of shape (2,), but must be int | Sequence[int]; pass"
    " group_sizes.tolist()": lambda: g.normalize_group_rewards(TWO, TWO),
    "compute_grpo_clip_loss: cliprange is float32 of shape (), but must be float; pass cliprange.item()": lambda: (
        g.compute_grpo_clip_loss(TWO[:, None], LOG_PROBS, LOG_PROBS, torch.tensor(0.2))
    ),
    "normalize_group_rewards: group_sizes is 2.0, of type float, but must be int | Sequence[int]": lambda: (
        g.normalize_group_rewards(TWO, 2.0)
    ),
}


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_invalid_type_raises_one_line_with_the_change(message):
    with pytest.raises(TypeCheckError, match=f"^{re.escape(message)}$") as raised:
        TYPE_ERRORS[message]()
    assert raised.value.__suppress_context__
    assert raised.value.__cause__ is None  # jaxtyping's own sixty lines would stand above it


def test_wrong_arguments_name_the_function():
    with pytest.raises(TypeError, match=r"^masked_mean: got an unexpected keyword argument 'axis'$") as raised:
        g.masked_mean(ONE, MASK, axis=1)
    assert raised.value.__suppress_context__
    with pytest.raises(TypeError, match=r"^masked_mean: missing a required argument: 'mask'$"):
        g.masked_mean(ONE)


def test_type_error_of_the_users_own_function_is_left_alone():
    @jaxtyped(typechecker=beartype)
    def length(response: str, advantage_eps: Float[torch.Tensor, ""]) -> dict:
        return {"reward": 1.0}

    with pytest.raises(TypeCheckError, match="length") as raised:
        rewards(length)
    assert "typechecking parameter 'advantage_eps'" in str(raised.value)


def test_numpy_numbers_are_numbers():
    expected = g.normalize_group_rewards(TWO, 2, advantage_eps=0.5)
    assert torch.equal(g.normalize_group_rewards(TWO, np.int64(2), advantage_eps=np.float32(0.5)), expected)
    sizes = [np.int32(2), np.int32(2)]
    assert torch.equal(
        g.compute_gpg_advantages(torch.cat([TWO, TWO]), sizes), g.compute_gpg_advantages(torch.cat([TWO, TWO]), 2)
    )
    assert step(np.int64(2))[0] == step(2)[0]


def test_nan_advantage_makes_the_loss_nan():
    loss, _ = g.grpo_microbatch_loss(ONE, MASK, 1, "reinforce_with_baseline", advantages=ADVANTAGE * math.nan)
    assert loss.isnan()


def test_aggregate_token_losses_constant_of_token_mean_is_required():
    """A mean over the tokens of a micro-batch would be a different objective."""
    with pytest.raises(ValueError, match="aggregation='token_mean' needs normalize_constant"):
        g.aggregate_token_losses(torch.ones(1, 2), torch.ones(1, 2).bool(), "token_mean")
