"""Small cases worked out by hand, with the working."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import grpo_core as g

NAN, INF = math.nan, math.inf


def test_masked_reductions_by_row():
    tensor = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, 6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert g.masked_sum(tensor, mask, 1).tolist() == [3.0, 10.0]
    assert g.masked_mean(tensor, mask, 1).tolist() == [1.5, 5.0]
    assert g.masked_mean(tensor, mask).item() == 13 / 4
    assert g.masked_normalize(tensor, mask, 2.0, 1).tolist() == [1.5, 5.0]
    assert g.masked_normalize(tensor, mask, 2.0).item() == 6.5


def test_masked_nan_inside_mask_is_not_hidden():
    tensor, mask = torch.tensor([NAN, 1.0]), torch.tensor([True, False])
    assert g.masked_sum(tensor, mask).isnan()
    assert g.masked_mean(tensor, mask).isnan()


def test_entropy_of_known_distributions():
    """A fair coin has log 2 nats; (1/2, 1/4, 1/4) has 3/2 log 2; a certain outcome has none."""
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert_close(g.compute_entropy(probabilities.log()), math.log(2) * torch.tensor([1.0, 1.5, 0.0]).double())


def test_entropy_of_extreme_logits():
    assert g.compute_entropy(torch.tensor([1e4, -1e4])).item() == 0.0
    assert_close(g.compute_entropy(torch.full((3,), 1e6)).item(), math.log(3))
    assert g.compute_entropy(torch.full((2,), -INF)).isnan()
    assert g.compute_entropy(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_distributions_are_computed_in_float32_or_wider(given, kept):
    logits = torch.tensor([[1.0, 2.0, -3.0]], dtype=given)
    labels = torch.tensor([1], dtype=torch.int32)
    entropy, log_probs = g.compute_entropy(logits), g.select_log_probs(logits, labels)
    assert entropy.dtype == log_probs.dtype == kept
    assert_close(entropy, g.compute_entropy(logits.double()).to(kept), rtol=1e-6, atol=1e-6)
    assert_close(log_probs, g.select_log_probs(logits.double(), labels).to(kept), rtol=1e-6, atol=1e-6)


def test_temperature_of_one_half_squares_odds():
    """Odds of 3:1 become 9:1."""
    logits = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    assert_close(g.select_log_probs(logits, torch.tensor(0), temperature=0.5).exp().item(), 0.9)


def test_group_normalization_of_two_groups():
    """(0, 0, 0, 1): mean 1/4, s = sqrt((3/16 + 9/16) / 3) = 1/2. (2, 2, 4, 4): mean 3, s = sqrt(4 / 3)."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    root = math.sqrt(3) / 2
    assert_close(
        g.normalize_group_rewards(rewards, 4, advantage_eps=0.0),
        torch.tensor([-0.5, -0.5, -0.5, 1.5, -root, -root, root, root]),
    )
    assert g.normalize_group_rewards(rewards, 4, normalize_by_std=False).tolist() == [
        -0.25, -0.25, -0.25, 0.75, -1.0, -1.0, 1.0, 1.0,
    ]  # fmt: skip


def test_group_normalization_ignores_nan_reward():
    advantages = g.normalize_group_rewards(torch.tensor([NAN, 1.0, 0.0, 1.0]), 2, normalize_by_std=False)
    assert advantages.tolist() == [0.0, 0.0, -0.5, 0.5]


def test_group_normalization_keeps_float64_and_promotes_half_precision():
    for given, kept in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        assert g.normalize_group_rewards(torch.tensor([0.0, 1.0], dtype=given), 2).dtype == kept


def test_group_of_one_without_division_has_zero_advantage():
    advantages, rewards, metadata = g.compute_group_normalized_rewards(
        lambda response, truth: {"reward": 0.3, "format_reward": True}, ["o"], ["a"], 1, 1e-6, False
    )
    assert advantages.tolist() == [0.0]
    assert metadata == {
        "reward": rewards.item(),
        "reward_std": 0.0,
        "reward_min": rewards.item(),
        "reward_max": rewards.item(),
        "format_reward": 1.0,
        "zero_std_groups": 1.0,
        "unscored": 0.0,
    }


def test_response_that_could_not_be_scored_is_excluded_from_group():
    """Two of four were scored, 1 and 0: the mean is 1/2, not 1/4, and each is half a unit from it."""
    scores = {"a": 1.0, "b": None, "c": 0.0, "d": None}
    advantages, rewards, metadata = g.compute_group_normalized_rewards(
        lambda response, truth: {"reward": scores[response]} | ({"format_reward": 0.5} if scores[response] else {}),
        list("abcd"), ["x"] * 4, 4, 1e-6, False,
    )  # fmt: skip
    assert advantages.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert rewards.isnan().tolist() == [False, True, False, True]
    assert (metadata["reward"], metadata["reward_min"], metadata["reward_max"]) == (0.5, 0.0, 1.0)
    assert metadata["reward_std"] == pytest.approx(0.5**0.5)
    assert (metadata["unscored"], metadata["zero_std_groups"]) == (0.5, 0.0)
    assert "format_reward" not in metadata  # one of the two that were scored lacks it
    described = g.describe_rewards([{"reward": None}, {"reward": 1.0, "answer_reward": 1.0}], 2)
    assert (described["answer_reward"], described["reward_std"], described["unscored"]) == (1.0, 0.0, 0.5)
    nothing = g.describe_rewards([{"reward": None}] * 2, 2)
    assert (nothing["unscored"], nothing["zero_std_groups"]) == (1.0, 1.0)
    assert all(math.isnan(nothing[name]) for name in ("reward", "reward_std", "reward_min", "reward_max"))
    assert "format_reward" not in nothing


def test_four_losses_of_four_tokens():
    """Ratios 1/2, 1, 3/2, 2 with range 1/4: a good token stops at 5/4, a bad one at 3/4."""
    old = torch.zeros(2, 4, dtype=torch.float64)
    policy = torch.tensor([[0.5, 1.0, 1.5, 2.0]] * 2, dtype=torch.float64).log()
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    clipped, metadata = g.compute_grpo_clip_loss(advantages, policy, old, 0.25)
    assert_close(clipped, torch.tensor([[-1.0, -2.0, -2.5, -2.5], [1.5, 2.0, 3.0, 4.0]]).double())
    assert metadata["is_clipped"].tolist() == [[False, False, True, True], [True, False, False, False]]
    unclipped, _ = g.compute_grpo_no_clip_loss(advantages, policy, old)
    assert_close(unclipped, torch.tensor([[-1.0, -2.0, -3.0, -4.0], [1.0, 2.0, 3.0, 4.0]]).double())
    assert_close(g.compute_naive_policy_gradient_loss(advantages, policy), -advantages * policy)


def test_three_aggregations_of_ragged_batch():
    """Rows (1, 3), (5) and nothing: means 2, 5, 0; sums 4, 5, 0; three tokens; longest possible response 2."""
    losses = torch.tensor([[1.0, 3.0], [5.0, NAN], [INF, NAN]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert_close(g.aggregate_token_losses(losses, mask, "sequence_mean").item(), 7 / 3)
    assert_close(g.aggregate_token_losses(losses, mask, "token_mean", normalize_constant=3.0).item(), 3.0)
    assert_close(g.aggregate_token_losses(losses, mask, "constant", normalize_constant=2.0).item(), 1.5)


def test_one_grpo_step():
    """Two responses of 2 and 1 tokens, A = 1 and -1, ratio 1: loss (-1 + 1) / 2 / K, gradient -A / (2 len K)."""
    policy = torch.tensor([[-1.0, -2.0], [-3.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[1.0], [-1.0]])
    loss, metadata = g.grpo_microbatch_train_step(
        policy, mask, 2, "grpo_clip", None, advantages, policy.detach().clone(), 0.2
    )
    assert loss.item() == 0.0
    assert not loss.requires_grad
    assert_close(policy.grad, torch.tensor([[-0.125, -0.125], [0.25, 0.0]]))
    assert {name: value.item() for name, value in metadata.items()} == {
        "response_tokens": 3.0, "mean_ratio": 1.0, "approx_kl": 0.0,
        "clip_fraction": 0.0, "clip_fraction_low": 0.0, "clip_fraction_high": 0.0,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_garbage_outside_mask_does_not_trigger_anomaly_detection():
    """Whoever looks for a NaN with autograd's own tool must not be led to padding."""
    policy = torch.tensor([[-1.0, NAN]], requires_grad=True)
    mask, old = torch.tensor([[True, False]]), torch.tensor([[-1.0, NAN]])
    with torch.autograd.detect_anomaly():
        g.grpo_microbatch_train_step(policy, mask, 1, "grpo_clip", None, torch.ones(1, 1), old, 0.2)
    assert policy.grad.tolist() == [[-1.0, 0.0]]


def test_step_without_response_tokens_is_zero():
    policy = torch.full((2, 3), NAN, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    loss, metadata = g.grpo_microbatch_train_step(
        policy, nothing, 1, "grpo_clip", None, torch.full((2, 1), NAN), policy.detach().clone(), 0.2
    )
    assert loss.item() == 0.0
    assert (policy.grad == 0.0).all()
    assert all(value.item() == 0.0 for value in metadata.values())


def test_steps_keep_float32_and_float64():
    for dtype in (torch.float32, torch.float64):
        policy = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert g.sft_microbatch_train_step(policy, mask, 1)[0].dtype == dtype
        assert (
            g.grpo_microbatch_train_step(policy, mask, 1, "no_baseline", torch.ones(1, 1, dtype=dtype))[0].dtype
            == dtype
        )


def test_tokenization_of_two_rows():
    """'ab' + 'c' and 'd' + '': the second is padded, and has no response."""
    letters = SimpleNamespace(
        pad_token_id=None,
        eos_token_id=99,
        encode=lambda text, add_special_tokens=True: [1] * add_special_tokens + [ord(letter) for letter in text],
    )
    tensors = g.tokenize_prompt_and_output(["ab", "d"], ["c", ""], letters)
    assert tensors["input_ids"].tolist() == [[1, 97, 98], [1, 100, 99]]
    assert tensors["labels"].tolist() == [[97, 98, 99], [100, 99, 99]]
    assert tensors["response_mask"].tolist() == [[False, False, True], [False, False, False]]


def test_scores_of_a_model_that_predicts_next_token():
    """Odds of 3:1 for the token after this one: log 3/4 where the label is that token, log 1/4 where not."""

    class Successor(nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(logits=math.log(3) * nn.functional.one_hot((input_ids + 1) % 2, 2).double())

    scores = g.get_response_log_probs(Successor(), torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 0]]), True)
    assert_close(scores["log_probs"].exp(), torch.tensor([[0.75, 0.75, 0.25]]).double())
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert_close(scores["token_entropy"], torch.full((1, 3), entropy).double())
    assert set(g.get_response_log_probs(Successor(), torch.tensor([[0]]), torch.tensor([[1]]))) == {"log_probs"}


def test_negative_best_reward_counts_as_best():
    described = g.describe_silent_groups(torch.tensor([-1.0, -1.0, -2.0, -2.0]), 2, best_reward=-1.0)
    assert described == {"groups_all_right": 0.5, "groups_all_wrong": 0.5, "groups_all_other": 0.0}
