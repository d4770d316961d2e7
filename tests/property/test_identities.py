"""Members of the family that are each other in disguise: values, gradients, or both, as each test says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import grpo_core as g
from tests.property.estimators import MEMBERS as ESTIMATORS
from tests.strategies import SHAPES, floats, response_masks, tensors


@st.composite
def batches(draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages of responses, log-probs now and then, and a mask."""
    rows, seq = shape = draw(SHAPES)
    old = draw(tensors(shape, floats(-4, -1.1)))
    advantages, moved = draw(tensors((rows, 1), floats(-2, 2))), draw(tensors(shape, floats(-1, 1)))
    return advantages, old + moved, old, draw(response_masks((rows, seq)))


def slope(policy: Tensor, value) -> Tensor:
    policy = policy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(policy), policy)
    return gradient


@given(batches(), st.sampled_from([1.28, 2.0, 4.0]))
def test_dual_clip_equals_second_bound_on_ratio(batch, bound):
    """Value and gradient: from 1 + eps_h on, cutting the objective at c A is cutting the ratio at delta = c."""
    advantages, policy, old, mask = batch

    def two_sided(log_probs: Tensor) -> Tensor:
        ratio = torch.where(mask, (log_probs - old).exp(), 1.0)
        objective = torch.minimum(ratio.clamp(max=bound) * advantages, ratio.clamp(0.8, 1.28) * advantages)
        return -torch.where(mask, objective, 0.0).sum()

    def dual(log_probs: Tensor) -> Tensor:
        losses, _ = g.compute_grpo_clip_loss(
            advantages, log_probs, old, 0.2, cliprange_high=0.28, dual_clip=bound, response_mask=mask
        )
        return losses.sum()

    assert_close(dual(policy), two_sided(policy), rtol=1e-12, atol=1e-12)
    assert_close(slope(policy, dual), slope(policy, two_sided), rtol=1e-12, atol=1e-12)


def weighted(name: str, weights: Tensor, batch, **options):
    advantages, _, old, mask = batch

    def value(log_probs: Tensor) -> Tensor:
        return g.sum_weighted_losses(getattr(g, name)(advantages, log_probs, old, mask, **options)[0], weights)

    return value


@given(batches(), st.sampled_from([0.0003, 0.1]))
def test_gspo_token_loss_equals_gspo_loss(batch, cliprange):
    """Value and gradient, with one advantage per response and each response weighing the same."""
    policy, mask = batch[1], batch[3]
    response = weighted("compute_gspo_loss", g.compute_sequence_weights(mask), batch, cliprange=cliprange)
    token_weights = g.compute_token_weights(mask, "sequence_mean")
    token = weighted("compute_gspo_token_loss", token_weights, batch, cliprange=cliprange)
    assert_close(token(policy), response(policy), rtol=1e-12, atol=1e-12)
    assert_close(slope(policy, token), slope(policy, response), rtol=1e-12, atol=1e-12)


@given(batches(), st.sampled_from([0.002, 0.1]))
def test_luspo_loss_equals_summed_gspo_token_loss(batch, cliprange):
    """Value and gradient."""
    policy, mask = batch[1], batch[3]
    response = weighted("compute_luspo_loss", g.compute_sequence_weights(mask), batch, cliprange=cliprange)
    token_weights = g.compute_token_weights(mask, "sequence_sum")
    token = weighted("compute_gspo_token_loss", token_weights, batch, cliprange=cliprange)
    assert_close(token(policy), response(policy), rtol=1e-12, atol=1e-12)
    assert_close(slope(policy, token), slope(policy, response), rtol=1e-12, atol=1e-12)


@given(batches())
def test_losses_with_wide_bounds_equal_unclipped_losses(batch):
    """Gradients: a wide clip, a wide CISPO and a wide DPPO are the plain ratio; a wide GMPO is a wide GSPO."""
    advantages, policy, old, mask = batch

    def gradient(name: str, *bounds: float) -> Tensor:
        function = getattr(g, name)
        return slope(policy, lambda p: function(advantages, p, old, *bounds, response_mask=mask)[0].sum())

    plain = gradient("compute_grpo_no_clip_loss")
    for other in (
        gradient("compute_grpo_clip_loss", 1e9),
        gradient("compute_cispo_loss", 0.0, 1e9),
        gradient("compute_dppo_tv_loss", 1.0, 1.0),
        gradient("compute_dppo_kl_loss", 1e9),
    ):
        assert_close(other, plain, rtol=1e-12, atol=1e-12)
    weights = g.compute_sequence_weights(mask)
    gspo, gmpo = (
        slope(policy, weighted(name, weights, batch, cliprange=1e9))
        for name in ("compute_gspo_loss", "compute_gmpo_loss")
    )
    assert_close(gmpo, gspo, rtol=1e-12, atol=1e-12)


@given(batches(), floats(0, 1))
def test_kl_cov_penalty_on_all_tokens_equals_abs_kl_estimate(batch, coefficient):
    """Value: KL-Cov on every token is the plain ratio plus the absolute log ratio, which is the `abs` estimate."""
    advantages, policy, old, mask = batch
    penalized, _ = g.compute_kl_cov_loss(advantages, policy, old, mask, coefficient, response_mask=mask)
    plain, _ = g.compute_grpo_no_clip_loss(advantages, policy, old, response_mask=mask)
    distance = g.estimate_kl(policy, old, "abs", response_mask=mask)
    assert_close(penalized, plain + coefficient * distance, rtol=1e-12, atol=1e-12)


@given(batches())
def test_bypass_gradient_equals_decoupled_gradient(batch):
    """Gradient: kappa (old over sampler) times the plain ratio to old is the plain ratio to the sampler."""
    advantages, policy, old, mask = batch
    sampler = old - 0.25
    kappa = g.compute_importance_ratios(old, sampler, mask, "token")
    decoupled = slope(
        policy,
        lambda p: (kappa * g.compute_grpo_no_clip_loss(advantages, p, old, response_mask=mask)[0]).sum(),
    )
    bypass = slope(policy, lambda p: g.compute_grpo_no_clip_loss(advantages, p, sampler, response_mask=mask)[0].sum())
    assert_close(decoupled, bypass, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("reward", [0.0, 1.0, math.nan, math.inf])
def test_group_of_one_has_zero_advantage_or_raises(name, reward):
    """Zero, or for what needs a deviation an error; against a greedy response there is a comparison."""
    extra = {
        "compute_opo_advantages": {"lengths": torch.tensor([3, 0])},
        "compute_remax_advantages": {"greedy_rewards": torch.tensor([0.0, 0.0])},
        "compute_pass_at_k_advantages": {"k": 1},
        "compute_pkpo_advantages": {"k": 1},
    }.get(name, {})
    rewards = torch.tensor([reward, reward])
    if name == "normalize_group_rewards":
        with pytest.raises(ValueError, match="a group of 1 response has no standard deviation"):
            ESTIMATORS[name](rewards, 1)
        extra = {"normalize_by_std": False}
    expected = reward if name == "compute_remax_advantages" and math.isfinite(reward) else 0.0
    assert ESTIMATORS[name](rewards, 1, **extra).tolist() == [expected, expected]
