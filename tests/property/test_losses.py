"""Laws of the per-token losses that the battery of test_family.py does not state."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from grpo_core import (
    aggregate_token_losses,
    compute_dpo_loss,
    compute_dppo_kl_loss,
    compute_dppo_tv_loss,
    compute_grpo_clip_loss,
    compute_grpo_no_clip_loss,
    compute_naive_policy_gradient_loss,
)
from tests.oracle import reference
from tests.strategies import CLIPRANGES, GARBAGE, Batch, batches, floats, response_masks, tensors

pytestmark = pytest.mark.usefixtures("each_way")


def exact(actual, expected) -> None:
    assert_close(actual, expected, rtol=0, atol=0)


@given(batches(), CLIPRANGES)
def test_clip_loss_on_policy_gradient_is_that_of_reinforce(batch: Batch, cliprange):
    """At a ratio of 1: -A exactly, from every loss, and nothing is clipped."""
    advantages, policy = batch.advantages, batch.policy_log_probs
    gradients = []
    for loss_of in (
        lambda x: compute_grpo_clip_loss(advantages, x, policy, cliprange)[0],
        lambda x: compute_grpo_no_clip_loss(advantages, x, policy)[0],
        lambda x: compute_naive_policy_gradient_loss(advantages, x),
    ):
        leaf = policy.clone().requires_grad_()
        gradients += torch.autograd.grad(loss_of(leaf).sum(), leaf)
    for gradient in gradients:
        exact(gradient, -advantages.expand_as(policy))
    assert not compute_grpo_clip_loss(advantages, policy, policy, cliprange)[1]["is_clipped"].any()


@given(batches(), CLIPRANGES)
def test_gradient_reaches_policy_only(batch: Batch, cliprange):
    advantages, old = batch.advantages.requires_grad_(), batch.old_log_probs.requires_grad_()
    policy = batch.policy_log_probs.requires_grad_()
    for loss in (
        compute_grpo_clip_loss(advantages, policy, old, cliprange)[0],
        compute_grpo_no_clip_loss(advantages, policy, old)[0],
        compute_naive_policy_gradient_loss(advantages, policy),
    ):
        loss.sum().backward()
    assert policy.grad is not None
    assert advantages.grad is old.grad is None


@given(batches(), CLIPRANGES)
def test_clip_loss_is_never_below_unclipped_loss(batch: Batch, cliprange):
    """Never below the unclipped loss; above it exactly where `is_clipped` says, and then without gradient."""
    policy = batch.policy_log_probs.requires_grad_()
    clipped, metadata = compute_grpo_clip_loss(batch.advantages, policy, batch.old_log_probs, cliprange)
    unclipped, nothing = compute_grpo_no_clip_loss(batch.advantages, policy, batch.old_log_probs)
    assert nothing == {}
    assert (clipped >= unclipped).all()
    assert torch.equal(clipped > unclipped, metadata["is_clipped"])
    clipped.sum().backward()
    gradient_of_unclipped = -(policy - batch.old_log_probs).exp().detach() * batch.advantages
    exact(policy.grad, torch.where(metadata["is_clipped"], 0.0, gradient_of_unclipped))


@given(batches())
def test_clip_loss_with_infinite_range_is_unclipped_loss(batch: Batch):
    inputs = batch.advantages, batch.policy_log_probs, batch.old_log_probs
    exact(compute_grpo_clip_loss(*inputs, float("inf"))[0], compute_grpo_no_clip_loss(*inputs)[0])


@given(batches(), CLIPRANGES, st.sampled_from([0.5, 2.0, 4.0]))
def test_clip_loss_scales_with_advantage(batch: Batch, cliprange, scale):
    inputs = batch.policy_log_probs, batch.old_log_probs, cliprange
    loss, metadata = compute_grpo_clip_loss(scale * batch.advantages, *inputs)
    expected, expected_metadata = compute_grpo_clip_loss(batch.advantages, *inputs)
    exact(loss, scale * expected)
    assert torch.equal(metadata["is_clipped"], expected_metadata["is_clipped"])


@given(batches(), CLIPRANGES, CLIPRANGES)
def test_clip_loss_bound_binds_for_one_sign_of_advantage(batch: Batch, low, high):
    """The clip answers to the sign of the advantage: each bound, 0 included, binds for one sign only."""
    ratio = (batch.policy_log_probs - batch.old_log_probs).exp()
    for advantage, beyond in ((1.0, ratio > 1 + high), (-1.0, ratio < 1 - low)):
        advantages = torch.full_like(batch.advantages, advantage)
        inputs = advantages, batch.policy_log_probs, batch.old_log_probs, low
        assert torch.equal(compute_grpo_clip_loss(*inputs, cliprange_high=high)[1]["is_clipped"], beyond)


@given(batches(), CLIPRANGES, st.sampled_from([1.125, 1.5, 2.0]))
def test_dual_clip_bounds_loss_of_negative_advantage(batch: Batch, cliprange, dual_clip):
    """At most -c A where A is negative, and nothing else changes; the flags say where it was more."""
    inputs = batch.advantages, batch.policy_log_probs, batch.old_log_probs, cliprange
    (single, flags), (dual, more) = (
        compute_grpo_clip_loss(*inputs),
        compute_grpo_clip_loss(*inputs, dual_clip=dual_clip),
    )
    bad = batch.advantages < 0
    exact(dual, torch.where(bad, torch.minimum(single, -dual_clip * batch.advantages), single))
    beyond = bad & ((batch.policy_log_probs - batch.old_log_probs).exp() > dual_clip)
    assert torch.equal(more["is_clipped_dual"], beyond)
    assert torch.equal(more["is_clipped"], flags["is_clipped"] | beyond)


# A probability of 1 is one that is met: of a token that could not be another.
PROBABILITIES = st.integers(1, 64).map(lambda n: n / 64)


@given(PROBABILITIES, PROBABILITIES.filter(lambda p: p < 1))
def test_dppo_thresholds_are_the_distances(old, new):
    """A little below the distance the token is dropped, a little above it is not; never where it moves back."""
    assume(old != new)
    coins = ((old, new), (1 - old, 1 - new))
    divergence = math.fsum(a * math.log(a / b) for a, b in coins if a > 0)
    distance = abs(new - old)
    log_probs = torch.tensor([[new]], dtype=torch.float64).log(), torch.tensor([[old]], dtype=torch.float64).log()
    away = torch.full((1, 1), math.copysign(1.0, new - old), dtype=torch.float64)
    for share, dropped in ((0.99, True), (1.01, False)):
        for advantages, expected in ((away, dropped), (-away, False)):
            by_kl = compute_dppo_kl_loss(advantages, *log_probs, share * divergence)[1]
            by_tv = compute_dppo_tv_loss(advantages, *log_probs, share * distance, share * distance)[1]
            assert by_kl["is_clipped"].item() == by_tv["is_clipped"].item() == expected


@given(batches())
def test_aggregations_agree_for_responses_of_full_length(batch: Batch):
    losses = batch.policy_log_probs
    everything, (rows, seq) = torch.ones_like(batch.response_mask), losses.shape
    expected = losses.mean()
    assert_close(aggregate_token_losses(losses, everything, "sequence_mean"), expected)
    assert_close(aggregate_token_losses(losses, everything, "constant", normalize_constant=float(seq)), expected)
    assert_close(
        aggregate_token_losses(losses, everything, "token_mean", normalize_constant=float(rows * seq)), expected
    )


def test_clip_bound_is_not_rounded_to_type_of_advantages():
    """GSPO's 3e-4 is nothing to bfloat16 around 1: every ratio would be clipped, or none."""
    advantages = torch.tensor([[1.0]], dtype=torch.bfloat16)
    policy, old = torch.tensor([[2e-4, 4e-4]]), torch.zeros(1, 2)
    _, flags = compute_grpo_clip_loss(advantages, policy, old, 3e-4)
    assert flags["is_clipped"].tolist() == [[False, True]]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_aggregate_token_losses_float16_sum_does_not_overflow(aggregation):
    losses, mask = torch.full((1, 4096), 32.0, dtype=torch.float16), torch.ones(1, 4096).bool()
    constant = 4096.0 if aggregation == "token_mean" else None
    assert aggregate_token_losses(losses, mask, aggregation, normalize_constant=constant) == 32.0


# Pairs of responses.


@st.composite
def responses(draw, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of one response per row under policy and reference, and its mask; garbage outside the mask."""
    shape = (rows, draw(st.integers(1, 6)))
    mask, garbage = draw(response_masks(shape)), draw(tensors(shape, GARBAGE))
    policy, reference_policy = (torch.where(mask, draw(tensors(shape, floats(-4, 0))), garbage) for _ in range(2))
    return policy, reference_policy, mask


SMOOTHING = st.sampled_from([0.0, 0.1, 0.4])


@given(data=st.data(), beta=st.sampled_from([0.1, 0.5, 2.0]), smoothing=SMOOTHING)
def test_compute_dpo_loss_and_gradient_match_oracle(data, beta, smoothing):
    rows = data.draw(st.integers(1, 3))
    (chosen, ref_chosen, mask), (rejected, ref_rejected, other) = (data.draw(responses(rows)) for _ in range(2))
    leaves = [tensor.clone().requires_grad_() for tensor in (chosen, rejected, ref_chosen, ref_rejected)]
    losses, metadata = compute_dpo_loss(*leaves, mask, other, beta, label_smoothing=smoothing)
    losses.sum().backward()
    assert leaves[2].grad is leaves[3].grad is None
    for row in range(rows):
        gaps = [
            (ours[row][own[row]].tolist(), theirs[row][own[row]].tolist())
            for ours, theirs, own in ((chosen, ref_chosen, mask), (rejected, ref_rejected, other))
        ]
        value, slope, margin = reference.dpo(*gaps, beta, smoothing)
        assert_close(losses[row, 0].item(), value, rtol=1e-10, atol=1e-12)
        assert_close(metadata["margin"][row, 0].item(), margin, rtol=1e-10, atol=1e-12)
        assert metadata["is_preferred"][row, 0].item() == (metadata["margin"][row, 0].item() > 0)
        assert_close(leaves[0].grad[row], slope * mask[row].double(), rtol=1e-9, atol=1e-12)
        assert_close(leaves[1].grad[row], -slope * other[row].double(), rtol=1e-9, atol=1e-12)
    assert not any(value.requires_grad for value in metadata.values())


@given(data=st.data(), smoothing=SMOOTHING)
def test_compute_dpo_loss_laws(data, smoothing):
    """log 2 at the reference; with both responses exchanged, the other outcome; and finite differences."""
    rows = data.draw(st.integers(1, 3))
    (chosen, ref_chosen, mask), (rejected, ref_rejected, other) = (data.draw(responses(rows)) for _ in range(2))
    same, _ = compute_dpo_loss(ref_chosen, ref_rejected, ref_chosen, ref_rejected, mask, other, 0.5)
    assert_close(same, torch.full((rows, 1), math.log(2), dtype=torch.float64))
    loss, told = compute_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, mask, other, 0.5)
    swapped, _ = compute_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, other, mask, 0.5)
    # The probabilities of the two outcomes add up to 1, and their log-odds are the margin.
    assert_close((-loss).exp() + (-swapped).exp(), torch.ones(rows, 1, dtype=torch.float64))
    assert_close(swapped - loss, told["margin"])
    clean = [torch.where(mask, chosen, 0.0).requires_grad_(), torch.where(other, rejected, 0.0).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda a, b: compute_dpo_loss(a, b, ref_chosen, ref_rejected, mask, other, 0.5, label_smoothing=smoothing)[0],
        clean,
        fast_mode=True,
    )


def test_compute_dpo_loss_of_wild_margins_is_finite():
    far, near, mask = torch.full((1, 1), -1e9), torch.zeros(1, 1), torch.ones(1, 1).bool()
    for chosen, rejected in ((far, near), (near, far)):
        leaf = chosen.clone().requires_grad_()
        losses, _ = compute_dpo_loss(leaf, rejected, near, near, mask, mask, 0.5)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert leaf.grad.isfinite().all()
