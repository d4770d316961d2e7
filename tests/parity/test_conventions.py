"""Where libraries differ, what this one does, as numbers that no other convention gives (docs/conventions.md)."""

import math

import pytest
import torch
from torch.testing import assert_close

import grpo_core as g

NAN = math.nan


def test_the_mean_over_nothing_is_nan():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert g.masked_mean(torch.ones(2, 3), nothing).isnan()
    assert g.masked_mean(torch.ones(2, 3), nothing, 0).isnan().tolist() == [True] * 3
    assert g.masked_normalize(torch.ones(2, 3), nothing, 3.0).item() == 0.0


def test_an_empty_response_adds_zero_and_counts():
    losses, mask = torch.tensor([[3.0], [5.0]]), torch.tensor([[True], [False]])
    assert g.aggregate_token_losses(losses, mask, "sequence_mean").item() == 1.5
    assert g.aggregate_token_losses(losses, mask, "constant", normalize_constant=1.0).item() == 1.5


def test_the_standard_deviation_is_unbiased_and_epsilon_is_added_to_it():
    """(0, 1): deviations 1/2, s = sqrt(1/2); biased it would be 1/2. With epsilon 1: (1/2) / (s + 1)."""
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_close(g.normalize_group_rewards(rewards, 2, advantage_eps=0.0)[1].item(), math.sqrt(0.5))
    assert_close(g.normalize_group_rewards(rewards, 2, advantage_eps=1.0)[1].item(), 0.5 / (math.sqrt(0.5) + 1))


@pytest.mark.parametrize("reward", [0.1, 0.2, 0.7, 1 / 3, 1.1])
@pytest.mark.parametrize("size", [3, 5, 6, 8])
def test_a_constant_group_has_advantage_zero_though_its_float_deviation_may_not_be(reward, size):
    rewards = torch.full((size,), reward)
    assert g.normalize_group_rewards(rewards, size, advantage_eps=0.0).tolist() == [0.0] * size


def test_the_trap_is_real():
    """The plain formula on a constant group: if this ever passes for every size, the range test may go."""
    sizes = [torch.full((size,), 0.1) for size in range(2, 17)]
    assert any(group.std() != 0 or (group - group.mean()).any() for group in sizes)


def test_the_rewards_of_a_group_lie_side_by_side():
    rewards = torch.tensor([0.0, 2.0, 10.0, 14.0])
    assert g.normalize_group_rewards(rewards, 2, normalize_by_std=False).tolist() == [-1.0, 1.0, -2.0, 2.0]


def test_the_clip_is_symmetric_around_a_ratio_of_one():
    """A half-width of 0.2 stops good tokens at 1.2 and bad ones at 0.8, and lets them go as far as they like back."""
    policy = torch.tensor([[0.5, 0.81, 1.19, 1.5]] * 2, dtype=torch.float64).log()
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    loss, metadata = g.compute_grpo_clip_loss(advantages, policy, torch.zeros_like(policy), 0.2)
    assert_close(loss, torch.tensor([[-0.5, -0.81, -1.19, -1.2], [0.8, 0.81, 1.19, 1.5]]).double())
    assert metadata["is_clipped"].tolist() == [[False, False, False, True], [True, False, False, False]]


def test_the_gradient_of_sft_is_that_of_the_assignment():
    """-1 / (42 * 2 * 2) for each response token: constant 42, two rows, two micro-batches."""
    policy = torch.zeros(2, 10, requires_grad=True)
    mask = torch.arange(10).expand(2, 10) >= 4
    loss, _ = g.sft_microbatch_train_step(policy - 1.0, mask, 2, 42.0)
    assert_close(policy.grad[mask], torch.full((12,), -0.005952), rtol=0, atol=1e-6)
    assert not policy.grad[~mask].any()
    assert_close(loss.item(), 12 / (42 * 2 * 2), rtol=1e-6, atol=0)


def test_a_grpo_step_is_a_mean_of_means():
    """Rows of 1 and 3 tokens weigh the same: A = 1 gives -1/2 and -1/6 per token; over all tokens it were -1/4."""
    policy = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    g.grpo_microbatch_train_step(policy, mask, 1, "reinforce_with_baseline", advantages=torch.ones(2, 1))
    assert_close(policy.grad, torch.tensor([[-1 / 2, 0, 0], [-1 / 6, -1 / 6, -1 / 6]]))


def test_token_mean_is_not_divided_by_the_accumulation_steps():
    policy, mask = torch.full((1, 2), -3.0), torch.ones(1, 2, dtype=torch.bool)
    losses = {
        name: g.grpo_microbatch_loss(
            policy, mask, 4, "no_baseline", torch.ones(1, 1), aggregation=name, normalize_constant=2.0
        )[0].item()
        for name in ("sequence_mean", "token_mean", "constant")
    }
    assert losses == {"sequence_mean": 0.75, "token_mean": 3.0, "constant": 0.75}


def test_token_mean_over_ragged_micro_batches_needs_the_count_of_the_whole_batch():
    """1 token at loss 4 and 3 at loss 0: the mean is 1; the mean of the means would be 2."""
    losses = torch.tensor([[4.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    shares = [
        g.aggregate_token_losses(losses[row : row + 1], mask[row : row + 1], "token_mean", normalize_constant=4.0)
        for row in range(2)
    ]
    assert sum(shares).item() == 1.0


def test_dr_grpo_is_centered_advantages_and_a_constant():
    """No mode of its own: (r - mean) and 1 / (N L_max)."""
    advantages = g.normalize_group_rewards(torch.tensor([0.0, 1.0]), 2, normalize_by_std=False)[:, None]
    policy = torch.zeros(2, 2, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    g.grpo_microbatch_train_step(
        policy,
        mask,
        1,
        "reinforce_with_baseline",
        advantages=advantages,
        aggregation="constant",
        normalize_constant=8.0,
    )
    assert_close(policy.grad, torch.tensor([[0.5, 0.5], [-0.5, 0.0]]) / 16)


def test_the_constant_divides_each_response_and_that_of_cs336_2026_the_batch():
    """Five tokens of loss 6 in two responses: 30 / (2 * 3) here; 30 / 6 with Z = N C = 6 there."""
    losses, mask = torch.full((2, 4), 6.0), torch.tensor([[True] * 4, [True, False, False, False]])
    assert g.aggregate_token_losses(losses, mask, "constant", normalize_constant=3.0).item() == 5.0
    assert g.masked_normalize(losses, mask, 6.0).item() == 5.0
    assert g.masked_normalize(losses, mask, 3.0).item() == 10.0


def test_values_under_the_mask_are_replaced_and_not_multiplied():
    policy = torch.tensor([[-1.0, NAN]], requires_grad=True)
    old = torch.tensor([[-1.0, math.inf]])
    loss, _ = g.grpo_microbatch_train_step(
        policy, torch.tensor([[True, False]]), 1, "grpo_no_clip", None, torch.ones(1, 1), old
    )
    assert loss.item() == -1.0
    assert policy.grad.tolist() == [[-1.0, 0.0]]


def test_entropy_of_unreachable_tokens_is_finite_and_so_is_its_gradient():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = g.compute_entropy(logits)
    entropy.sum().backward()
    assert_close(entropy.item(), math.log(2))
    assert_close(logits.grad, torch.zeros(1, 3))


def test_a_count_of_tokens_may_be_an_integer():
    """Beartype's numeric tower: where a float is asked for, an int is one."""
    losses, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    assert g.aggregate_token_losses(losses, mask, "token_mean", normalize_constant=2).item() == 1.0
    assert g.masked_normalize(losses, mask, 2).item() == 1.0
    assert g.compute_grpo_clip_loss(torch.ones(1, 1), losses, losses, 1)[0].tolist() == [[-1.0, -1.0]]
