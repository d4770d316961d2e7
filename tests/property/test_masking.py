"""Laws of the masked reductions."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import masked_mean, masked_normalize, masked_sum
from tests.strategies import GARBAGE, floats, masked_tensors, tensors

DIMS = st.sampled_from([None, 0, 1, -1])
REDUCTIONS = st.sampled_from([masked_sum, masked_mean, masked_normalize])


@given(masked_tensors(), DIMS, REDUCTIONS, st.data())
def test_masked_entries_are_never_read(inputs, dim, reduction, data):
    tensor, mask = inputs
    garbage = data.draw(tensors(tuple(mask.shape), GARBAGE))
    spoiled = torch.where(mask, tensor, garbage).requires_grad_()
    result = reduction(spoiled, mask, dim=dim)
    assert_close(result, reduction(tensor, mask, dim=dim), rtol=0, atol=0, equal_nan=True)
    result.sum().backward()
    assert (spoiled.grad[~mask] == 0.0).all()


@given(masked_tensors(), DIMS)
def test_full_mask_equals_no_mask(inputs, dim):
    tensor, everything = inputs[0], torch.ones_like(inputs[1])
    plain = {"dim": dim} if dim is not None else {}
    assert_close(masked_sum(tensor, everything, dim), tensor.sum(**plain))
    assert_close(masked_mean(tensor, everything, dim), tensor.mean(**plain))


@given(masked_tensors(), REDUCTIONS)
def test_reducing_one_dimension_after_the_other_reduces_both(inputs, reduction):
    """Of the mean this holds for the sums and counts only, so the mean is checked against their quotient."""
    tensor, mask = inputs
    at_once = reduction(tensor, mask)
    sums = masked_sum(tensor, mask, 1).sum()
    expected = sums / mask.sum() if reduction is masked_mean else sums
    assert_close(at_once, expected, equal_nan=True)


@given(masked_tensors(), floats(-3, 3), floats(-3, 3))
def test_masked_mean_follows_shift_and_scale(inputs, scale, shift):
    tensor, mask = inputs
    mask[0, 0] = True
    assert_close(masked_mean(scale * tensor + shift, mask), scale * masked_mean(tensor, mask) + shift)


@given(masked_tensors(), st.sampled_from([0.5, 2.0, -4.0]))
def test_masked_normalize_divides_by_constant(inputs, constant):
    assert_close(masked_normalize(*inputs, constant) * constant, masked_sum(*inputs))


@given(masked_tensors(), DIMS)
def test_masked_reduction_gradient_matches_finite_differences(inputs, dim):
    tensor, mask = inputs[0].requires_grad_(), inputs[1]
    mask[:] |= ~mask.any(dim=0, keepdim=True) | ~mask.any(dim=1, keepdim=True)
    assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask, dim), tensor, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: masked_normalize(x, mask, 3.0, dim), tensor, fast_mode=True)
