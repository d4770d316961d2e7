"""The optimal baseline of each token, and the probability that two samples of a distribution are equal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import compute_collision_probs, compute_otb_advantages, normalize_group_rewards, select_log_probs
from tests.oracle import estimators as oracle
from tests.property.estimators import UNSCORED
from tests.strategies import GARBAGE, floats, logits_and_labels, masks, tensors


@st.composite
def cases(draw, unscored=True):
    """Rewards, group sizes, log-probs, collision probabilities and a mask of up to 3 groups."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = sum(sizes), draw(st.integers(1, 4))
    reward = floats(-4, 4) | UNSCORED if unscored and draw(st.booleans()) else floats(-4, 4)
    rewards = torch.tensor(draw(st.lists(reward, min_size=shape[0], max_size=shape[0])), dtype=torch.float64)
    logits = draw(tensors((*shape, 3), floats(-3, 3)))
    labels = torch.tensor(
        draw(st.lists(st.integers(0, 2), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    )
    probabilities = logits.softmax(dim=-1)
    log_probs = select_log_probs(logits, labels.view(shape))
    return rewards, sizes, log_probs, probabilities.square().sum(dim=-1), draw(masks(shape))


@given(cases(), st.data())
def test_otb_matches_its_definition_and_reads_nothing_outside_the_mask(case, data):
    rewards, sizes, log_probs, collisions, mask = case
    spoiled = [
        torch.where(mask, values, data.draw(tensors(tuple(mask.shape), GARBAGE))) for values in (log_probs, collisions)
    ]
    advantages = compute_otb_advantages(rewards, sizes, *spoiled, mask)
    groups = [[r if math.isfinite(r) else None for r in part.tolist()] for part in rewards.split(sizes)]
    expected = oracle.otb(groups, log_probs.tolist(), collisions.tolist(), mask.tolist())
    assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7)
    assert (advantages[~mask] == 0).all()
    assert not advantages.requires_grad


@given(cases(unscored=False), st.data())
def test_otb_ignores_order_shift_and_unscored_responses(case, data):
    rewards, sizes, log_probs, collisions, mask = case
    advantages = compute_otb_advantages(*case)
    shift = data.draw(floats(-4, 4))
    shifted = compute_otb_advantages(rewards + shift, sizes, log_probs, collisions, mask)
    assert_close(shifted, advantages, rtol=1e-6, atol=1e-6)
    order = torch.tensor(data.draw(st.permutations(range(sizes[-1])))) + sum(sizes[:-1])
    order = torch.cat([torch.arange(sum(sizes[:-1])), order])
    moved = compute_otb_advantages(rewards[order], sizes, log_probs[order], collisions[order], mask[order])
    assert_close(moved, advantages[order], rtol=1e-9, atol=1e-9)
    more = [torch.cat([values, values[:1]]) for values in (log_probs, collisions, mask)]
    lone = torch.cat([rewards, torch.tensor([math.nan]).double()])
    with_unscored = compute_otb_advantages(lone, [*sizes[:-1], sizes[-1] + 1], *more)
    assert (with_unscored[-1] == 0).all()
    assert_close(with_unscored[:-1], advantages, rtol=1e-9, atol=1e-9)


@given(cases(unscored=False))
def test_otb_weighted_advantages_sum_to_zero_at_the_first_token(case):
    rewards, sizes, log_probs, collisions, _ = case
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    weights = 1 - 2 * log_probs.exp() + collisions
    first = (weights * compute_otb_advantages(rewards, sizes, log_probs, collisions, mask))[:, 0]
    for part in first.split(sizes):
        assert_close(part.sum().item(), 0.0, rtol=0, atol=1e-9)


@given(cases(unscored=False))
def test_otb_of_equal_policies_is_centering(case):
    rewards, sizes, log_probs, collisions, _ = case
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    advantages = compute_otb_advantages(rewards, sizes, log_probs * 0 - 1, collisions * 0 + 0.5, mask)
    centered = normalize_group_rewards(rewards, sizes, normalize_by_std=False)
    assert_close(advantages, centered[:, None].expand(mask.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_otb_degenerate_groups_are_exactly_zero(dtype):
    """Equal rewards, a token that one response has alone, a policy that was certain; and no responses."""
    log_probs, collisions = torch.full((4, 3), -0.7, dtype=dtype), torch.full((4, 3), 0.5, dtype=dtype)
    mask = torch.ones(4, 3).bool()
    mask[1, 1:] = False
    equal, other = torch.full((4,), 0.1, dtype=dtype), torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=dtype)
    assert (compute_otb_advantages(equal, 2, log_probs, collisions, mask) == 0).all()
    advantages = compute_otb_advantages(other, 2, log_probs, collisions, mask)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [[0.5, 0.0, 0.0], [-0.5, 0.0, 0.0], [0.5] * 3, [-0.5] * 3]
    assert (compute_otb_advantages(other, 2, log_probs * 0, collisions * 2, mask) == 0).all()
    assert compute_otb_advantages(other[:0], 2, log_probs[:0], collisions[:0], mask[:0]).shape == (0, 3)


def test_otb_lone_tokens_are_exactly_zero():
    """The product of a weight and a reward, divided by the weight, need not be the reward."""
    log_probs = -torch.linspace(0.1, 3.0, 40).double()[None].expand(2, 40)
    mask = torch.ones(2, 40).bool()
    mask[1] = False
    advantages = compute_otb_advantages(torch.tensor([0.7, 0.1]).double(), 2, log_probs, log_probs.exp(), mask)
    assert (advantages == 0).all()


@given(logits_and_labels(unreachable=True), st.sampled_from([0.5, 1.0, 2.0]))
def test_collision_probs_are_the_sum_of_squares(case, temperature):
    logits, labels = case
    log_probs, sharpened = (
        select_log_probs(logits, labels, temperature=tau) for tau in (temperature, temperature / 2)
    )
    collisions = compute_collision_probs(log_probs.requires_grad_(), sharpened)
    assert not collisions.requires_grad
    rows = [[math.exp(z / temperature) for z in row] for row in logits.tolist()]
    expected = [math.fsum(x * x for x in row) / math.fsum(row) ** 2 for row in rows]
    assert_close(collisions, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert (collisions <= 1).all()


def test_collision_probs_of_certain_and_of_impossible_tokens():
    log_probs = torch.tensor([0.0, 1e-6, -torch.inf])
    values = compute_collision_probs(log_probs, torch.tensor([0.0, 0.0, -torch.inf]))
    assert values[:2].tolist() == [1.0, 1.0]
    assert values[2].isnan()
