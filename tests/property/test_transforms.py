"""What torch.func and torch.compile make of the losses: the derivatives of eager mode, and those beyond it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import grpo_core
from grpo_core import (
    compute_grpo_clip_loss,
    compute_grpo_no_clip_loss,
    compute_token_weights,
    estimate_kl,
    fused_linear_log_probs,
    sum_weighted_losses,
)
from tests.property.objectives import EACH_MEMBER, STOPPED, cases, far_from_kinks, losses_of

# torch's own, from its forward-mode formulas.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
few = settings(max_examples=max(5, settings.default.max_examples // 10))


def total(name, case):
    """The sum of all losses, a function of the log-probs alone."""
    return lambda policy: losses_of(name, case, policy)[0].sum()


@pytest.mark.medium
@EACH_MEMBER
@few
@given(st.data())
def test_forward_and_reverse_mode_agree_with_eager(name, data):
    case = data.draw(cases(name))
    leaf = case.policy.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(name, case)(leaf), leaf)
    assert_close(torch.func.grad(total(name, case))(case.policy), expected, rtol=1e-10, atol=1e-10)
    direction = case.old + 1.0
    _, tangent = torch.func.jvp(total(name, case), (case.policy,), (direction,))
    assert_close(tangent, (expected * direction).sum(), rtol=1e-9, atol=1e-9)


def is_smooth(case):
    """Return whether a small step crosses no kink: kl_cov's penalty is the absolute log ratio."""
    penalized = (case.policy - case.old)[case.mask & case.penalized]
    return far_from_kinks(case) and ("kl_coef" not in case.hyper or (penalized.abs() > 1e-3).all())


@pytest.mark.medium
@EACH_MEMBER
@few
@given(st.data())
def test_second_derivative_matches_finite_differences(name, data):
    case = data.draw(cases(name).filter(is_smooth))
    step, direction, loss = 1e-5, case.old + 1.0, total(name, case)
    first = torch.func.grad(loss)
    _, found = torch.func.jvp(first, (case.policy,), (direction,))
    if name in STOPPED:  # stopped factors move by finite differences and not by derivatives
        return
    slope = (first(case.policy + step * direction) - first(case.policy - step * direction)) / (2 * step)
    assert_close(found, slope, rtol=1e-4, atol=1e-5)


@EACH_MEMBER
@few
@given(st.data())
def test_vmap_over_responses_gives_per_response_gradients(name, data):
    """One row at a time is one row of the batch: no member looks at another response."""
    case = data.draw(cases(name))
    if name == "compute_policy_gradient_loss":
        return
    leaf = case.policy.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(name, case)(leaf), leaf)

    def row_loss(policy, old, advantages, mask, penalized):
        row = type(case)(policy[None], old[None], advantages[None], mask[None], penalized[None], [1], case.hyper)
        return total(name, row)(row.policy)

    found = torch.func.vmap(torch.func.grad(row_loss))(
        case.policy, case.old, case.advantages, case.mask, case.penalized
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


TRANSFORMS = {
    "func": torch.func.grad,
    "compile": lambda function: lambda leaf: _compiled_gradient(function, leaf),
}


def _compiled_gradient(function, leaf):
    torch._dynamo.reset()
    leaf = leaf.clone().requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    return torch.autograd.grad(compiled(leaf), leaf)[0]


@pytest.mark.medium
@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_outside_mask_reaches_no_derivative(transform, garbage):
    mask = torch.tensor([[True, False, True]])
    policy = torch.tensor([[-1.0, garbage, -2.0]])
    old, advantages = torch.tensor([[-1.1, garbage, -1.9]]), torch.tensor([[2.0]])
    weights = compute_token_weights(mask, "sequence_mean")
    functions = {
        "weighted": lambda leaf: sum_weighted_losses(leaf, weights),
        "clip": lambda leaf: compute_grpo_clip_loss(advantages, leaf, old, 0.5, response_mask=mask)[0].sum(),
        "no_clip": lambda leaf: compute_grpo_no_clip_loss(advantages, leaf, old, response_mask=mask)[0].sum(),
        "k3": lambda leaf: estimate_kl(leaf, old, "k3", response_mask=mask).sum(),
    }
    for name, function in functions.items():
        leaf = policy.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        found = TRANSFORMS[transform](function)(policy)
        assert found[0, 1] == 0, name
        assert_close(found, expected, msg=name)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, at a graph break
def test_fused_head_under_compile_is_eager_and_under_functorch_raises():
    """Blocks and tiles are no graph: torch.compile breaks around it, torch.func gets an error."""
    hidden, weight, labels = torch.ones(1, 2, 3), torch.ones(4, 3), torch.tensor([[1, 2]])

    def loss(leaf):
        return fused_linear_log_probs(leaf * 2, weight, labels)["log_probs"].sum()

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch._dynamo.reset()
    twin = hidden.clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(twin), twin)
    assert_close(found, expected)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(hidden)


@pytest.mark.parametrize("name", ["losses", "kl", "log_probs", "weighted", "fused", "entropy"])
def test_result_allows_change_in_place(name):
    """As that of any torch expression: `losses.masked_fill_(...)` is how some write it."""
    leaf = torch.randn(2, 3).requires_grad_()
    old, labels = torch.zeros(2, 3), torch.tensor([1, 2])
    result = {
        "losses": lambda: compute_grpo_clip_loss(torch.ones(2, 1), leaf, old, 0.2)[0],
        "kl": lambda: estimate_kl(leaf, old, "k3"),
        "log_probs": lambda: grpo_core.select_log_probs(leaf, labels),
        "entropy": lambda: grpo_core.compute_entropy(leaf),
        "weighted": lambda: sum_weighted_losses(leaf, torch.ones(2, 3)),
        "fused": lambda: fused_linear_log_probs(leaf, torch.randn(5, 3), labels)["token_entropy"],
    }[name]()
    expected = torch.autograd.grad(result.sum() * 2, leaf, retain_graph=True)[0]
    assert_close(torch.autograd.grad(result.mul_(2).sum(), leaf)[0], expected)


@pytest.mark.parametrize("member", [compute_grpo_clip_loss, compute_grpo_no_clip_loss])
def test_attached_gradient_survives_change_in_place(member):
    leaf = torch.randn(2, 3).requires_grad_()
    more = {"cliprange": 0.5} if member is compute_grpo_clip_loss else {}
    losses = member(torch.ones(2, 1), leaf, leaf.detach() - 0.1, **more)[0]
    losses.masked_fill_(torch.tensor([[True, False, False]]), 0.0).sum().backward()
    assert (leaf.grad[:, 0] == 0).all()
    assert_close(leaf.grad[:, 1:], torch.full((2, 2), -math.exp(0.1)))
