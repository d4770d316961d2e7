"""Laws of entropy and log-probability."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import compute_entropy, select_log_probs
from grpo_core.scoring import _softmax_stats, distributions
from tests.strategies import floats, logits_and_labels

TEMPERATURES = st.sampled_from([0.25, 1.0, 3.0])


@pytest.fixture(autouse=True, params=["sweep", "plain"])
def _way(request, monkeypatch):
    """Tile by tile, and the plain expressions that torch.compile and torch.func get."""
    if request.param == "plain":
        monkeypatch.setattr(distributions, "is_traced", lambda: True)
    else:
        monkeypatch.setattr(_softmax_stats, "_tile_rows", lambda logits: 2)


ANY_LOGITS = st.booleans().flatmap(logits_and_labels)


@given(ANY_LOGITS, TEMPERATURES)
def test_compute_entropy_lies_between_zero_and_log_vocab(inputs, temperature):
    entropy = compute_entropy(inputs[0], temperature=temperature)
    assert (entropy >= 0).all()
    assert (entropy <= math.log(inputs[0].shape[-1]) + 1e-12).all()


@given(ANY_LOGITS, st.one_of(floats(-8, 8), st.sampled_from([1e4, -1e4])))
def test_distribution_ignores_shift_of_logits(inputs, shift):
    logits, labels = inputs
    assert_close(compute_entropy(logits + shift), compute_entropy(logits), rtol=1e-10, atol=1e-10)
    assert_close(select_log_probs(logits + shift, labels), select_log_probs(logits, labels), rtol=1e-10, atol=1e-10)


@given(logits_and_labels(), st.sampled_from([1e4, -1e4]))
def test_distribution_with_large_offset_keeps_float32_digits(inputs, offset):
    """Exactly, for offsets in steps that float32 has there."""
    logits, labels = (inputs[0] * 64).round().float() / 64, inputs[1]
    assert_close(compute_entropy(logits + offset), compute_entropy(logits), rtol=1e-5, atol=1e-6)
    assert_close(select_log_probs(logits + offset, labels), select_log_probs(logits, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 3])
def test_select_log_probs_label_outside_vocabulary_raises(label):
    with pytest.raises((ValueError, RuntimeError), match=r"labels run from|out of bounds"):
        select_log_probs(torch.zeros(2, 3), torch.tensor([0, label]))


@given(logits_and_labels(), st.data())
def test_distribution_ignores_permutation_of_tokens(inputs, data):
    logits, labels = inputs
    order = torch.tensor(data.draw(st.permutations(range(logits.shape[-1]))))
    assert_close(compute_entropy(logits[:, order]), compute_entropy(logits))
    assert_close(select_log_probs(logits[:, order], order.argsort()[labels]), select_log_probs(logits, labels))


@given(ANY_LOGITS, TEMPERATURES)
def test_probabilities_sum_to_one_and_entropy_is_mean_surprise(inputs, temperature):
    logits, _ = inputs
    rows, vocab = logits.shape
    every = torch.arange(vocab).expand(rows, vocab)
    log_probs = select_log_probs(
        logits[:, None].expand(rows, vocab, vocab).contiguous(), every, temperature=temperature
    )
    assert_close(log_probs.exp().sum(dim=1), torch.ones(rows).double())
    surprise = -torch.where(log_probs.isinf(), 0.0, log_probs) * log_probs.exp()
    assert_close(compute_entropy(logits, temperature=temperature), surprise.sum(dim=1))


@given(ANY_LOGITS, TEMPERATURES)
def test_temperature_divides_logits(inputs, temperature):
    logits, labels = inputs
    assert_close(compute_entropy(logits, temperature=temperature), compute_entropy(logits / temperature))
    assert_close(
        select_log_probs(logits, labels, temperature=temperature), select_log_probs(logits / temperature, labels)
    )


@given(logits_and_labels())
def test_compute_entropy_grows_with_temperature(inputs):
    """Entropy grows with temperature, strictly if the logits differ: the law that a forgotten division breaks."""
    logits, _ = inputs
    cold, hot = compute_entropy(logits, temperature=1.0), compute_entropy(logits, temperature=2.0)
    differ = logits.amax(1) > logits.amin(1)
    assert (hot[differ] > cold[differ]).all()
    assert_close(hot[~differ], cold[~differ])


@given(logits_and_labels(), TEMPERATURES)
def test_distribution_gradient_matches_finite_differences(inputs, temperature):
    logits, labels = inputs[0].requires_grad_(), inputs[1]
    assert torch.autograd.gradcheck(lambda x: compute_entropy(x, temperature=temperature), logits, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x: select_log_probs(x, labels, temperature=temperature), logits, fast_mode=True
    )


@given(logits_and_labels(unreachable=True))
def test_impossible_token_equals_smaller_vocabulary(inputs):
    """One row at a time: dropping the tokens of logit -inf changes neither value nor gradient."""
    for row, label in zip(*inputs, strict=True):
        kept = row > -math.inf
        whole, part = row.clone().requires_grad_(), row[kept].requires_grad_()
        assert_close(compute_entropy(whole), compute_entropy(part), rtol=1e-12, atol=1e-12)
        compute_entropy(whole).backward()
        compute_entropy(part).backward()
        assert_close(whole.grad[kept], part.grad, rtol=1e-12, atol=1e-12)
        assert (whole.grad[~kept] == 0.0).all()
        assert select_log_probs(whole, label).isfinite()


@pytest.mark.parametrize(
    "cut", [lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[0]]
)
def test_row_views_copy_no_logits(cut):
    """`logits[:, :-1]` has gaps: a copy of it would be the largest tensor of a step."""
    whole = torch.randn(3, 4, 5, dtype=torch.float64)
    views = list(distributions._iterate_row_views(cut(whole)))
    assert {rows.untyped_storage().data_ptr() for _, rows in views} == {whole.untyped_storage().data_ptr()}
    assert_close(torch.cat([rows for _, rows in views]), cut(whole).reshape(-1, 5))
    leaf, twin = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    labels = torch.randint(5, cut(whole).shape[:-1])
    (select_log_probs(cut(leaf), labels) + 2 * compute_entropy(cut(leaf))).sum().backward()
    plain = cut(twin).log_softmax(-1)
    (plain.gather(-1, labels[..., None])[..., 0] - 2 * (plain.exp() * plain).sum(-1)).sum().backward()
    assert_close(leaf.grad, twin.grad)
