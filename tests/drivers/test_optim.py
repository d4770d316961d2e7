"""AdamW over float32 master weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from drivers.policy.optimizer import PolicyOptimizer

INF = 1e9


def make_linear(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    return layer.to(dtype)


def backward(layer, scale=1.0):
    loss = scale * (layer(torch.arange(4.0, dtype=layer.weight.dtype)) ** 2).sum()
    loss.backward()
    return loss.detach()


def step(optimizer, max_grad_norm=INF):
    norm = optimizer.clip_gradient(max_grad_norm)
    optimizer.step()
    return norm


def adam_by_hand(weight, grads, lr, betas=(0.9, 0.95), eps=1e-8):
    """Return the weights after Adam (Kingma and Ba) without weight decay, in float64."""
    weight, m, v = weight.double(), 0.0, 0.0
    for t, grad in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * grad.double()
        v = betas[1] * v + (1 - betas[1]) * grad.double() ** 2
        weight = weight - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return weight


def test_optimizer_float32_equals_adam_by_hand():
    layer = make_linear(torch.float32)
    optimizer, begin, grads = PolicyOptimizer(layer, 1e-2), layer.weight.detach().clone(), []
    for _ in range(4):
        backward(layer)
        grads.append(layer.weight.grad.clone())
        step(optimizer)
    assert_close(layer.weight.double(), adam_by_hand(begin, grads, 1e-2), rtol=1e-5, atol=1e-6)


def test_optimizer_clipping_scales_gradient_and_returns_norm():
    layer = make_linear(torch.float32)
    optimizer, begin = PolicyOptimizer(layer, 1e-2), layer.weight.detach().clone()
    grads = []
    for scale in (1.0, 7.0):
        backward(layer, scale)
        grad = layer.weight.grad.clone()
        norm = step(optimizer, 0.5)
        assert norm.item() == pytest.approx(grad.norm().item(), rel=1e-6)
        assert norm > 0.5
        grads.append(grad * 0.5 / grad.norm())
    assert_close(layer.weight.double(), adam_by_hand(begin, grads, 1e-2), rtol=1e-4, atol=1e-5)


def test_optimizer_bfloat16_small_updates_accumulate():
    """At 1e-5 one update is below half a unit in the last place of a bfloat16 weight of 0.25; 200 updates are not."""
    layer = make_linear(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(0.25)
    optimizer = PolicyOptimizer(layer, 1e-5)
    for _ in range(200):
        backward(layer)
        step(optimizer)
    moved = (0.25 - layer.weight.float())[:, 1:]
    assert_close(moved, torch.full_like(moved, 2e-3), rtol=0.3, atol=0)


def test_optimizer_bfloat16_gradients_sum_in_float32():
    """A bfloat16 sum stops growing when an addend is below half a unit in its last place: here at 256."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = PolicyOptimizer(layer, 1e-3)
    for _ in range(1000):
        layer(torch.ones(1, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    assert step(optimizer).item() == pytest.approx(1000, rel=1e-6)


def test_optimizer_step_clears_gradients():
    layer = make_linear(torch.bfloat16)
    optimizer = PolicyOptimizer(layer, 0.0)
    norms = []
    for _ in range(2):
        backward(layer)
        norms.append(step(optimizer).item())
    assert norms[0] == norms[1] > 0
    assert step(optimizer).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, float("inf"), float("nan")])
def test_optimizer_skipped_step_changes_nothing(dtype, scale):
    spoiled, clean = make_linear(dtype), make_linear(dtype)
    optimizers = PolicyOptimizer(spoiled, 1e-2), PolicyOptimizer(clean, 1e-2)
    for layer, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(layer)
        step(optimizer, 1.0)
    backward(spoiled, scale)
    assert bool(optimizers[0].clip_gradient(1.0).isfinite()) == (scale == 1.0)
    optimizers[0].zero_grad()
    for layer, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(layer)
        step(optimizer, 1.0)
    assert torch.equal(spoiled.weight, clean.weight)
    ours, theirs = (optimizer.tensors() for optimizer in optimizers)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
