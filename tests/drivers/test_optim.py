"""AdamW over float32 master weights, and schedules of its learning rate."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from drivers.common.errors import UsageError
from drivers.policy.optimizer import PolicyOptimizer
from drivers.settings.groups import OptimizerSettings
from drivers.settings.imitation import SftConfig
from drivers.settings.schedule import schedule_factor
from tests.drivers.helpers.letters import make_tiny_config

INF = 1e9


def make_linear(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    return layer.to(dtype)


def backward(layer, scale=1.0):
    loss = scale * (layer(torch.arange(4.0, dtype=layer.weight.dtype)) ** 2).sum()
    loss.backward()
    return loss.detach()


def step(optimizer, max_grad_norm=INF, rate=1e-2):
    norm = optimizer.clip_gradient(max_grad_norm)
    optimizer.step(rate)
    return norm


def adam_by_hand(weight, grads, rates, betas=(0.9, 0.95), eps=1e-8, decay=0.0):
    """Return the weights after AdamW (Loshchilov and Hutter) in float64."""
    weight, m, v = weight.double(), 0.0, 0.0
    for t, (grad, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * grad.double()
        v = betas[1] * v + (1 - betas[1]) * grad.double() ** 2
        weight = weight - lr * decay * weight
        weight = weight - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return weight


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({}, {}),
        ({"weight_decay": 5.0}, {"decay": 5.0}),
        ({"adam_betas": (0.5, 0.7)}, {"betas": (0.5, 0.7)}),
        ({"adam_epsilon": 0.5}, {"eps": 0.5}),
    ],
    ids=["defaults", "decay", "betas", "epsilon"],
)
def test_optimizer_float32_equals_adam_by_hand(settings, by_hand):
    """Each update has its own rate."""
    layer, rates = make_linear(torch.float32), (1e-2, 3e-2, 2e-2, 1e-3)
    optimizer, begin, grads = PolicyOptimizer(layer, OptimizerSettings(**settings)), layer.weight.detach().clone(), []
    for rate in rates:
        backward(layer)
        grads.append(layer.weight.grad.clone())
        step(optimizer, rate=rate)
    assert_close(layer.weight.double(), adam_by_hand(begin, grads, rates, **by_hand), rtol=1e-5, atol=1e-6)


def test_optimizer_clipping_scales_gradient_and_returns_norm():
    layer = make_linear(torch.float32)
    optimizer, begin = PolicyOptimizer(layer, OptimizerSettings()), layer.weight.detach().clone()
    grads = []
    for scale in (1.0, 7.0):
        backward(layer, scale)
        grad = layer.weight.grad.clone()
        norm = step(optimizer, 0.5)
        assert norm.item() == pytest.approx(grad.norm().item(), rel=1e-6)
        assert norm > 0.5
        grads.append(grad * 0.5 / grad.norm())
    assert_close(layer.weight.double(), adam_by_hand(begin, grads, (1e-2, 1e-2)), rtol=1e-4, atol=1e-5)


def test_optimizer_bfloat16_small_updates_accumulate():
    """At 1e-5 one update is below half a unit in the last place of a bfloat16 weight of 0.25; 200 updates are not."""
    layer = make_linear(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(0.25)
    optimizer = PolicyOptimizer(layer, OptimizerSettings())
    for _ in range(200):
        backward(layer)
        step(optimizer, rate=1e-5)
    moved = (0.25 - layer.weight.float())[:, 1:]
    assert_close(moved, torch.full_like(moved, 2e-3), rtol=0.3, atol=0)


def test_optimizer_bfloat16_gradients_sum_in_float32():
    """A bfloat16 sum stops growing when an addend is below half a unit in its last place: here at 256."""
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = PolicyOptimizer(layer, OptimizerSettings())
    for _ in range(1000):
        layer(torch.ones(1, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    assert step(optimizer).item() == pytest.approx(1000, rel=1e-6)


def test_optimizer_step_clears_gradients():
    layer = make_linear(torch.bfloat16)
    optimizer = PolicyOptimizer(layer, OptimizerSettings())
    norms = []
    for _ in range(2):
        backward(layer)
        norms.append(step(optimizer, rate=0.0).item())
    assert norms[0] == norms[1] > 0
    assert step(optimizer).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, float("inf"), float("nan")])
def test_optimizer_skipped_step_changes_nothing(dtype, scale):
    spoiled, clean = make_linear(dtype), make_linear(dtype)
    optimizers = [PolicyOptimizer(layer, OptimizerSettings()) for layer in (spoiled, clean)]
    for layer, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(layer)
        step(optimizer, 1.0)
    backward(spoiled, scale)
    assert bool(optimizers[0].clip_gradient(1.0).isfinite()) == (scale == 1.0)
    optimizers[0].skip()
    for layer, optimizer in zip((spoiled, clean), optimizers, strict=True):
        backward(layer)
        step(optimizer, 1.0)
    assert torch.equal(spoiled.weight, clean.weight)
    ours, theirs = (optimizer.tensors() for optimizer in optimizers)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


PEERS = {
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}
"""Schedules of transformers. Their first step has a rate of 0; ours leave it out."""


@pytest.mark.parametrize("schedule", PEERS)
@pytest.mark.parametrize(("n_steps", "warmup"), [(1, 0), (5, 0), (7, 1), (9, 4), (6, 5), (4, 6)])
def test_schedule_factor_equals_schedule_of_transformers(schedule, n_steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = PEERS[schedule](optimizer, warmup + 1, n_steps + 1)
    for number in range(1, n_steps + 1):
        optimizer.step()
        peer.step()
        factor = schedule_factor(schedule, number, n_steps, warmup)
        assert factor == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        assert 0 < factor <= 1


def test_schedule_factor_by_hand():
    def factors(schedule, warmup):
        return [schedule_factor(schedule, number, 6, warmup) for number in range(1, 7)]

    assert factors("constant", 0) == [1.0] * 6  # exactly: the rate of a run without a schedule is its flag
    assert factors("constant", 3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors("linear", 2) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert factors("cosine", 3)[3:] == pytest.approx([1, 0.75, 0.25])


def test_learning_rate_of_a_step_follows_the_length_of_the_run():
    short, long = (make_tiny_config(n_grpo_steps=n, lr_schedule="linear", learning_rate=0.5) for n in (4, 8))
    assert [short.learning_rate_at(step) for step in (1, 4)] == [0.5, 0.125]
    assert [long.learning_rate_at(step) for step in (1, 5, 8)] == [0.5, 0.25, 0.0625]
    demonstrations = SftConfig(model_path="m", epochs=2, train_batch_size=5, lr_schedule="linear", learning_rate=0.5)
    assert demonstrations.as_grpo(20).learning_rate_at(8) == 0.0625


def test_warmup_of_the_whole_run_warns():
    assert make_tiny_config(warmup_steps=20, n_grpo_steps=20).warnings == [
        "--warmup-steps 20 does not end before the last of 20 steps, so --learning-rate is never reached"
    ]
    assert not make_tiny_config(warmup_steps=19, n_grpo_steps=20).warnings


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1)])
def test_adam_betas_out_of_range_are_refused(betas):
    with pytest.raises(UsageError, match=rf"--adam-betas {betas[0]} {betas[1]}: both must be at least 0 and less"):
        OptimizerSettings(adam_betas=betas)
