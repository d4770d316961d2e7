"""Distances from a teacher against their definitions, with gradients by closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import grpo_core as g
from tests.oracle import reference
from tests.strategies import GARBAGE, SHAPES, floats, logits_and_labels, masks, response_masks, tensors

pytestmark = pytest.mark.usefixtures("each_way")

BETAS = st.sampled_from([0.1, 0.5, 0.9])
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0])


@st.composite
def pairs_of_logits(draw, unreachable: bool = False):
    """The logits of student and teacher over one vocabulary; with `unreachable`, each excludes tokens of its own."""
    student, _ = draw(logits_and_labels(unreachable))
    teacher = draw(tensors(tuple(student.shape), floats(-8, 8)))
    if unreachable:
        hidden = draw(masks(tuple(student.shape)))
        hidden[:, draw(st.integers(0, student.shape[1] - 1))] = False
        teacher = teacher.masked_fill(hidden, -math.inf)
    return student, teacher


@given(data=st.data())
def test_compute_distillation_advantages_matches_definition(data):
    shape = data.draw(SHAPES)
    mask = data.draw(response_masks(shape))
    policy, teacher = (data.draw(tensors(shape, floats(-4, 0))) for _ in range(2))
    spoiled = [
        torch.where(mask, one, data.draw(tensors(shape, GARBAGE))).requires_grad_() for one in (policy, teacher)
    ]
    advantages = g.compute_distillation_advantages(*spoiled, mask)
    assert not advantages.requires_grad
    for row, place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        expected = teacher[row, place].item() - policy[row, place].item() if mask[row, place] else 0.0
        assert advantages[row, place].item() == expected


@given(pairs_of_logits(), TEMPERATURES)
def test_distillation_advantages_give_the_gradient_of_the_divergence(logits, temperature):
    """By enumeration: REINFORCE with these advantages, summed over every token, is the gradient of KL(S, T)."""
    student, teacher = logits
    leaf = student.clone().requires_grad_()
    log_probs, target = ((one / temperature).log_softmax(-1) for one in (leaf, teacher))
    advantages = g.compute_distillation_advantages(log_probs, target, torch.ones_like(target, dtype=torch.bool))
    losses = g.compute_naive_policy_gradient_loss(advantages, log_probs)
    (found,) = torch.autograd.grad((log_probs.detach().exp() * losses).sum(), leaf)
    for row in range(len(student)):
        p, q = (reference.probabilities((one[row] / temperature).tolist()) for one in logits)
        distance = reference.kl(p, q)
        expected = [a * (math.log(a / b) - distance) / temperature for a, b in zip(p, q, strict=True)]
        assert_close(found[row].tolist(), expected, rtol=1e-8, atol=1e-10)


@given(logits=st.booleans().flatmap(pairs_of_logits), beta=BETAS, temperature=TEMPERATURES)
def test_compute_jensen_shannon_divergence_and_gradient_match_oracle(logits, beta, temperature):
    student, teacher = (one.clone().requires_grad_() for one in logits)
    found = g.compute_jensen_shannon_divergence(student, teacher, beta, temperature=temperature)
    found.sum().backward()
    assert teacher.grad is None
    for row in range(len(student)):
        scores = [(one[row] / temperature).tolist() for one in logits]
        value, slopes = reference.jensen_shannon(*scores, beta)
        assert_close(found[row].item(), value, rtol=1e-8, atol=1e-10)
        assert_close((temperature * student.grad[row]).tolist(), slopes, rtol=1e-7, atol=1e-10)


@given(logits=st.booleans().flatmap(pairs_of_logits), beta=BETAS)
def test_compute_jensen_shannon_divergence_laws(logits, beta):
    """0 for equal distributions, at most log 2, symmetric; and near the ends either KL."""
    student, teacher = logits
    divergence = g.compute_jensen_shannon_divergence
    found = divergence(student, teacher, beta)
    assert (found > -1e-12).all()
    assert (found < math.log(2) + 1e-12).all()
    assert_close(divergence(student, student, beta), torch.zeros_like(found), rtol=0, atol=1e-12)
    assert_close(divergence(teacher, student, 1 - beta), found, rtol=1e-9, atol=1e-12)
    assert_close(divergence(student + 3.0, teacher - 2.0, beta), found, rtol=1e-9, atol=1e-12)
    if student.isfinite().all() and teacher.isfinite().all():
        for row in range(len(student)):
            p, q = (reference.probabilities(one[row].tolist()) for one in (student, teacher))
            forward, backward = (divergence(student[row], teacher[row], at).item() for at in (1e-10, 1 - 1e-10))
            assert_close(forward / 1e-10, reference.kl(q, p), rtol=1e-2, atol=1e-3)
            assert_close(backward / 1e-10, reference.kl(p, q), rtol=1e-2, atol=1e-3)


@st.composite
def top_k_cases(draw):
    student, teacher = draw(pairs_of_logits())
    vocab = student.shape[1]
    k = draw(st.integers(1, vocab))
    rows = [draw(st.permutations(range(vocab)))[:k] for _ in range(len(student))]
    return student, teacher, torch.tensor(rows)


@given(case=top_k_cases(), temperature=TEMPERATURES)
def test_compute_top_k_forward_kl_and_gradient_match_oracle(case, temperature):
    """With any tokens in the place of the best; the gradient also by finite differences."""
    student, teacher, ids = case
    log_probs = (teacher / temperature).log_softmax(-1).gather(-1, ids).requires_grad_()
    leaf = student.clone().requires_grad_()
    found = g.compute_top_k_forward_kl(leaf, log_probs, ids, temperature=temperature)
    found.sum().backward()
    assert log_probs.grad is None
    for row in range(len(student)):
        scores = [(one[row] / temperature).tolist() for one in (student, teacher)]
        value, slopes = reference.top_k_forward_kl(*scores, ids[row].tolist())
        assert_close(found[row].item(), value, rtol=1e-7, atol=1e-9)
        assert_close((temperature * leaf.grad[row]).tolist(), slopes, rtol=1e-6, atol=1e-9)
        full = reference.kl(*(reference.probabilities(one) for one in reversed(scores)))
        assert -1e-9 <= found[row].item() <= full + 1e-9
        if ids.shape[1] == student.shape[1]:
            assert_close(found[row].item(), full, rtol=1e-8, atol=1e-10)
    log_probs = log_probs.detach()
    assert torch.autograd.gradcheck(
        lambda x: g.compute_top_k_forward_kl(x, log_probs, ids, temperature=temperature), leaf, fast_mode=True
    )


@given(pairs_of_logits())
def test_compute_top_k_forward_kl_of_whole_vocabulary_is_exact_in_float32(logits):
    """The sum of float32 probabilities is not exactly 1, and the rest must not count as another token."""
    student, teacher = (one.float() for one in logits)
    ids = torch.arange(student.shape[1]).expand(student.shape)
    found = g.compute_top_k_forward_kl(student, teacher.log_softmax(-1), ids)
    for row in range(len(student)):
        p, q = (reference.probabilities(one[row].tolist()) for one in (student, teacher))
        assert_close(found[row].item(), reference.kl(q, p), rtol=1e-4, atol=2e-5)


@given(case=top_k_cases())
def test_compute_top_k_forward_kl_of_the_teacher_itself_is_zero(case):
    _, teacher, ids = case
    leaf = teacher.clone().requires_grad_()
    found = g.compute_top_k_forward_kl(leaf, teacher.log_softmax(-1).gather(-1, ids), ids)
    found.sum().backward()
    assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-10)
    assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_distances_from_certain_teacher_are_finite(dtype):
    """A teacher without doubt, and a student who excludes what the teacher wants: float32, and no NaN."""
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=dtype)
    for student in (teacher, teacher.flip(1), torch.zeros(1, 3, dtype=dtype)):
        leaf = student.clone().requires_grad_()
        ids = torch.tensor([[0]], dtype=torch.int32)
        first = g.compute_jensen_shannon_divergence(leaf, teacher, 0.5)
        second = g.compute_top_k_forward_kl(leaf, torch.zeros(1, 1), ids)
        (first.sum() + second.sum()).backward()
        assert first.dtype == second.dtype == torch.float32
        assert first.isfinite().all()
        assert second.isfinite().all()
        assert leaf.grad.isfinite().all()
