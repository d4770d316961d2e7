"""The steps of the CS336 interface, over every loss type and aggregation; the whole family is in test_family.py."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from grpo_core import Aggregation, LossType, grpo_microbatch_loss, grpo_microbatch_train_step
from tests.oracle import reference
from tests.strategies import GARBAGE, Batch, batches, fewer, tensors

MEMBERS = pytest.mark.parametrize(
    ("loss_type", "aggregation"), [(loss, agg) for loss in get_args(LossType) for agg in get_args(Aggregation)]
)
# In tokens; any positive number does.
CONSTANT = 7.0


def run(batch: Batch, loss_type: str, aggregation: str, steps: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient in the log-probabilities, and the metadata."""
    policy = batch.policy_log_probs.detach().clone().requires_grad_()
    loss, metadata = grpo_microbatch_train_step(
        policy,
        batch.response_mask,
        steps,
        loss_type,
        batch.raw_rewards,
        batch.advantages,
        batch.old_log_probs,
        batch.cliprange,
        aggregation=aggregation,
        normalize_constant=CONSTANT,
        group_sizes=1,
    )
    return loss, policy.grad, metadata


def assert_same(actual, expected, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, rtol=rtol, atol=atol)


@MEMBERS
@fewer
@given(batch=batches(), steps=st.integers(1, 3))
def test_grpo_microbatch_loss_matches_scalar_reference(loss_type, aggregation, batch, steps):
    loss, gradient, _ = run(batch, loss_type, aggregation, steps)
    mask = batch.response_mask.tolist()
    share = 1 if aggregation == "token_mean" else steps
    total = 0.0
    for row, column in torch.cartesian_prod(*map(torch.arange, gradient.shape)).tolist():
        weight = reference.token_weight(aggregation, row, mask, CONSTANT) / share if mask[row][column] else 0.0
        value, slope = reference.token_loss(
            loss_type,
            batch.raw_rewards[row, 0].item(),
            batch.advantages[row, 0].item(),
            batch.policy_log_probs[row, column].item(),
            batch.old_log_probs[row, column].item(),
            batch.cliprange,
        )
        total += weight * value
        assert_close(gradient[row, column].item(), weight * slope, rtol=1e-10, atol=1e-12)
    assert_close(loss.item(), total, rtol=1e-10, atol=1e-12)


@MEMBERS
@fewer
@given(batch=batches())
def test_micro_batches_of_one_add_up_to_batch(loss_type, aggregation, batch):
    """k x 1 accumulated = 1 x k at once: losses and gradients, over ragged masks and empty responses."""
    rows = len(batch.response_mask)
    shares = [run(batch.rows(slice(row, row + 1)), loss_type, aggregation, rows) for row in range(rows)]
    loss, gradient, _ = run(batch, loss_type, aggregation)
    assert_same([sum(share[0] for share in shares), torch.cat([share[1] for share in shares])], [loss, gradient])


@pytest.mark.parametrize("loss_type", get_args(LossType))
@fewer
@given(batch=batches(), data=st.data())
def test_token_mean_micro_batches_of_any_size_add_up(loss_type, batch, data):
    rows = len(batch.response_mask)
    cut = data.draw(st.integers(0, rows))
    steps = data.draw(st.integers(1, 3))
    shares = [run(batch.rows(part), loss_type, "token_mean", steps) for part in (slice(cut), slice(cut, None))]
    loss, gradient, _ = run(batch, loss_type, "token_mean")
    assert_same([shares[0][0] + shares[1][0], torch.cat([share[1] for share in shares])], [loss, gradient])


@MEMBERS
@fewer
@given(batch=batches(), data=st.data())
def test_content_outside_mask_is_never_read(loss_type, aggregation, batch, data):
    """NaN, infinities and huge numbers outside the mask: the same bits in value, gradient and metadata."""
    mask = batch.response_mask
    garbage = [data.draw(tensors(tuple(mask.shape), GARBAGE)) for _ in range(2)]
    empty = ~mask.any(dim=1, keepdim=True)
    spoiled = replace(
        batch,
        policy_log_probs=torch.where(mask, batch.policy_log_probs, garbage[0]),
        old_log_probs=torch.where(mask, batch.old_log_probs, garbage[1]),
        advantages=torch.where(empty, garbage[0][:, :1], batch.advantages),
        raw_rewards=torch.where(empty, garbage[1][:, :1], batch.raw_rewards),
    )
    loss, gradient, metadata = run(spoiled, loss_type, aggregation)
    expected_loss, expected_gradient, expected_metadata = run(batch, loss_type, aggregation)
    assert_same([loss, gradient], [expected_loss, expected_gradient], rtol=0, atol=0)
    assert_close(metadata, expected_metadata, rtol=0, atol=0)
    assert (gradient[~mask] == 0.0).all()


@MEMBERS
@fewer
@given(batch=batches(), data=st.data())
def test_padding_columns_change_nothing(loss_type, aggregation, batch, data):
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    padded = replace(
        batch,
        policy_log_probs=pad(batch.policy_log_probs, data.draw(GARBAGE)),
        old_log_probs=pad(batch.old_log_probs, data.draw(GARBAGE)),
        response_mask=pad(batch.response_mask, False),
    )
    loss, gradient, metadata = run(padded, loss_type, aggregation)
    expected_loss, expected_gradient, expected_metadata = run(batch, loss_type, aggregation)
    assert_same([loss, gradient], [expected_loss, pad(expected_gradient, 0.0)])
    assert_close(metadata, expected_metadata, rtol=1e-6, atol=1e-12)


@MEMBERS
@fewer
@given(batch=batches(), data=st.data())
def test_order_of_responses_changes_nothing(loss_type, aggregation, batch, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.response_mask)))))
    loss, gradient, metadata = run(batch.rows(order), loss_type, aggregation)
    expected_loss, expected_gradient, expected_metadata = run(batch, loss_type, aggregation)
    assert_same([loss, gradient], [expected_loss, expected_gradient[order]])
    assert_close(metadata, expected_metadata, rtol=1e-6, atol=1e-12)


@MEMBERS
@fewer
@given(batch=batches())
def test_gradient_reaches_policy_only(loss_type, aggregation, batch):
    for tensor in (batch.policy_log_probs, batch.old_log_probs, batch.advantages, batch.raw_rewards):
        tensor.requires_grad_()
    loss, metadata = grpo_microbatch_loss(
        batch.policy_log_probs,
        batch.response_mask,
        1,
        loss_type,
        batch.raw_rewards,
        batch.advantages,
        batch.old_log_probs,
        batch.cliprange,
        aggregation=aggregation,
        normalize_constant=CONSTANT,
        group_sizes=1,
    )
    loss.backward()
    assert batch.policy_log_probs.grad is not None
    assert batch.old_log_probs.grad is batch.advantages.grad is batch.raw_rewards.grad is None
    assert not any(value.requires_grad for value in metadata.values())


@pytest.mark.parametrize("loss_type", get_args(LossType))
@fewer
@given(batch=batches())
def test_metadata_matches_reference(loss_type, batch):
    """Means over response tokens of what the reference says of each; 0 where there is none."""
    _, _, metadata = run(batch, loss_type, "sequence_mean")
    places = batch.response_mask.nonzero().tolist()
    tokens = [(batch.policy_log_probs[i, j].item(), batch.old_log_probs[i, j].item()) for i, j in places]
    count = max(1, len(tokens))
    expected = {
        "response_tokens": float(len(tokens)),
        "mean_ratio": sum(reference.math.exp(policy - old) for policy, old in tokens) / count,
        "approx_kl": sum(reference.k3(*token) for token in tokens) / count,
    }
    if loss_type == "grpo_clip":
        advantages = [batch.advantages[i, 0].item() for i, _ in places]
        binds = [reference.clip_binds(a, *t, batch.cliprange) for a, t in zip(advantages, tokens, strict=True)]
        expected["clip_fraction"] = sum(binds) / count
        for side, sign in (("low", -1), ("high", 1)):
            expected[f"clip_fraction_{side}"] = (
                sum(b and a * sign > 0 for a, b in zip(advantages, binds, strict=True)) / count
            )
    assert set(metadata) == set(expected)
    for name, value in metadata.items():
        assert value.shape == ()
        assert_close(value.item(), expected[name], rtol=1e-6, atol=1e-9)


@MEMBERS
@fewer
@given(batch=batches())
def test_gradient_matches_finite_differences(loss_type, aggregation, batch):
    """Finite differences; where the range is 0 the clip has its kink at every ratio of 1, so that case sits out."""
    policy = batch.policy_log_probs.requires_grad_()
    cliprange = batch.cliprange or 0.1

    def value(log_probs: Tensor) -> Tensor:
        return grpo_microbatch_loss(
            log_probs,
            batch.response_mask,
            2,
            loss_type,
            batch.raw_rewards,
            batch.advantages,
            batch.old_log_probs,
            cliprange,
            aggregation=aggregation,
            normalize_constant=CONSTANT,
            group_sizes=1,
        )[0]

    assert torch.autograd.gradcheck(value, policy, fast_mode=True)
