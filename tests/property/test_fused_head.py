"""The fused head: the slow path's numbers and slopes, from blocks of any size, in fewer products."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import grpo_core
from grpo_core import (
    compute_entropy,
    compute_grpo_clip_loss,
    compute_token_weights,
    fused_linear_grpo_loss,
    fused_linear_log_probs,
    fused_linear_token_loss,
    select_log_probs,
    sum_weighted_losses,
)
from grpo_core.scoring import _linear_head, _softmax_stats
from tests.oracle import reference
from tests.property.heads import cases
from tests.strategies import GARBAGE, fewer

NAMES = ("hidden", "weight", "bias")
# Sequence objectives have no loss per token, VESPO and GSPO-token a ratio of the whole response.
NOT_LOCAL = {
    "compute_gspo_loss",
    "compute_gspo_token_loss",
    "compute_gmpo_loss",
    "compute_luspo_loss",
    "compute_vespo_loss",
    "compute_policy_gradient_loss",
    "compute_dpo_loss",
}
LOCAL = sorted(
    name
    for name in grpo_core.__all__
    if name.startswith("compute_") and name.endswith("_loss") and name not in NOT_LOCAL
)


@pytest.fixture(autouse=True, params=[1, 2, 1000], ids=["tiles_of_1", "tiles_of_2", "one_tile"])
def _tile_rows(request, monkeypatch):
    """Tiles of a row, of two, and of all rows of a block."""
    monkeypatch.setattr(_softmax_stats, "_tile_rows", lambda logits: request.param)


def close(actual, expected, tolerance=1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(cases())
def test_log_probs_and_gradients_match_full_logits(case):
    ours, theirs = case.leaves(), case.leaves()
    fused, slow = case.fused(ours), case.slow(theirs)
    for name in ("log_probs", "token_entropy"):
        close(fused[name], torch.where(case.mask, slow[name], 0.0))
    for values in (fused, slow):
        (
            torch.where(case.mask, values["log_probs"] * case.g, 0.0).sum()
            + torch.where(case.mask, values["token_entropy"] * case.g_entropy, 0.0).sum()
        ).backward()
    for name, leaf in ours.items():
        close(leaf.grad, theirs[name].grad, 1e-9)


@fewer
@given(cases(), st.sampled_from(["log_probs", "token_entropy"]))
def test_gradient_of_one_output_only_matches_full_logits(case, name):
    ours, theirs = case.leaves(), case.leaves()
    (torch.where(case.mask, case.fused(ours)[name], 0.0) * case.g).sum().backward()
    (torch.where(case.mask, case.slow(theirs)[name], 0.0) * case.g).sum().backward()
    for key, leaf in ours.items():
        close(leaf.grad, theirs[key].grad, 1e-9)
    without = case.fused(case.leaves(), return_entropy=False)
    assert set(without) == {"log_probs"}
    close(without["log_probs"], case.fused(case.leaves())["log_probs"], 0)


@fewer
@given(cases())
def test_log_probs_match_values_computed_by_hand(case):
    """Against numbers computed with nothing but Python's floats."""
    values = case.fused(case.leaves(), response_mask=None)
    cap, temperature = case.options["logit_softcap"], case.options["temperature"]
    for i, row in enumerate(case.hidden.tolist()):
        for t, state in enumerate(row):
            bias = [0.0] * case.vocab if case.bias is None else case.bias.tolist()
            logits = [
                sum(w * h for w, h in zip(weights, state, strict=True)) + b
                for weights, b in zip(case.weight.tolist(), bias, strict=True)
            ]
            if cap is not None:
                logits = [cap * math.tanh(z / cap) for z in logits]
            logits = [z / temperature for z in logits]
            probability = reference.probabilities(logits)[case.labels[i, t]]
            assert values["log_probs"][i, t].item() == pytest.approx(math.log(probability), rel=1e-10, abs=1e-12)
            entropy = reference.entropy(logits)
            assert values["token_entropy"][i, t].item() == pytest.approx(entropy, rel=1e-10, abs=1e-12)


@fewer
@given(cases())
def test_log_probs_gradient_matches_finite_differences(case):
    leaves = case.leaves()

    def values(*inputs):
        fused = case.fused(dict(zip(leaves, inputs, strict=True)))
        return fused["log_probs"], fused["token_entropy"]

    assert torch.autograd.gradcheck(values, tuple(leaves.values()), fast_mode=True, nondet_tol=1e-12)


@given(cases(), GARBAGE, st.sampled_from([-100, 10**6]))
def test_log_probs_outside_mask_are_not_read_and_have_no_gradient(case, garbage, label):
    clean, dirty = case.leaves(), case.leaves()
    with torch.no_grad():
        dirty["hidden"][~case.mask] = garbage
    expected = case.fused(clean)
    case.labels = case.labels.masked_fill(~case.mask, label)
    values = case.fused(dirty)
    for name, value in values.items():
        assert torch.equal(value, expected[name])
        assert (value[~case.mask] == 0).all()
    for parts in (values, expected):
        (parts["log_probs"] * case.g + parts["token_entropy"] * case.g_entropy).sum().backward()
    for name, leaf in dirty.items():
        assert torch.equal(leaf.grad, clean[name].grad)
    assert (dirty["hidden"].grad[~case.mask] == 0).all()


@fewer
@given(cases())
def test_log_probs_of_flat_batch_equal_those_of_batch(case):
    flat = fused_linear_log_probs(
        case.hidden.flatten(0, 1), case.weight, case.labels.flatten(), bias=case.bias, **case.options
    )
    for name, value in case.fused(case.leaves(), response_mask=None).items():
        assert torch.equal(flat[name].view(case.shape), value)


@fewer
@given(cases(), st.integers(0, 6))
def test_log_probs_with_impossible_token_stay_finite(case, token):
    """A bias of -inf: nothing in value and slope, and no NaN."""
    token %= case.vocab
    case.bias = torch.zeros(case.vocab).double()
    case.options["logit_softcap"] = None
    case.bias[token] = -math.inf
    case.mask = case.mask & (case.labels != token)
    if case.vocab == 1:
        return
    ours = case.leaves()
    values = case.fused(ours)
    (values["log_probs"] * case.g + values["token_entropy"] * case.g_entropy).sum().backward()
    others = [k for k in range(case.vocab) if k != token]
    twin = case.leaves()
    twin = {"hidden": twin["hidden"], "weight": case.weight[others].clone().requires_grad_()}
    renamed = case.labels - (case.labels > token).long()
    slow = case.slow(twin, labels=renamed.clamp(max=len(others) - 1))
    for name, value in values.items():
        close(value, torch.where(case.mask, slow[name], 0.0))
    torch.where(case.mask, slow["log_probs"] * case.g + slow["token_entropy"] * case.g_entropy, 0.0).sum().backward()
    close(ours["hidden"].grad, twin["hidden"].grad, 1e-9)
    close(ours["weight"].grad[others], twin["weight"].grad, 1e-9)
    assert (ours["weight"].grad[token] == 0).all()


def test_softcap_token_with_underflow_has_no_gradient():
    """Its probability is 0, its logarithm is not there: neither may become NaN."""
    hidden, weight = torch.tensor([[[1.0]]]).double(), torch.tensor([[900.0], [-900.0], [899.0]]).double()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    values = fused_linear_log_probs(*leaves, torch.tensor([[2]]), logit_softcap=1e4)
    (values["log_probs"] + values["token_entropy"]).sum().backward()
    ours = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    logits = 1e4 * torch.tanh(nn.functional.linear(*leaves) / 1e4)
    (select_log_probs(logits, torch.tensor([[2]])) + compute_entropy(logits)).sum().backward()
    for mine, leaf in zip(ours, leaves, strict=True):
        close(mine, leaf.grad, 1e-9)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1000.0), (torch.float32, 120.0), (torch.float16, 20.0)])
def test_softcap_label_with_underflow_keeps_gradient(dtype, far):
    """Its weight is 0 in this type; what it pulls at is its logit all the same."""
    hidden = torch.tensor([[[1.0]]], dtype=dtype)
    weight = torch.tensor([[0.0], [far]], dtype=dtype, requires_grad=True)
    fused_linear_log_probs(hidden, weight, torch.tensor([[0]]), logit_softcap=2 * far)["log_probs"].sum().backward()
    slope = 1 - math.tanh(0.5) ** 2
    assert_close(weight.grad[:, 0].double(), torch.tensor([1.0, -slope]).double(), rtol=2e-3, atol=0)


@fewer
@given(cases())
def test_second_backward_gives_same_gradient(case):
    """The first overwrites the logits it kept."""
    leaves = case.leaves()
    values = case.fused(leaves)
    loss = (values["log_probs"] * case.g + values["token_entropy"] * case.g_entropy).sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(leaves.values()))
    for one, other in zip(first, second, strict=True):
        close(one, other, 1e-12)


@fewer
@given(cases(), st.sampled_from(NAMES))
def test_frozen_input_gets_no_gradient_and_changes_no_other(case, frozen):
    every, some = case.leaves(), case.leaves()
    if frozen in some:
        some[frozen].requires_grad_(False)
    for leaves in (every, some):
        values = case.fused(leaves)
        if any(leaf.requires_grad for leaf in leaves.values()):
            (values["log_probs"] * case.g + values["token_entropy"] * case.g_entropy).sum().backward()
    for name, leaf in some.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            close(leaf.grad, every[name].grad, 1e-12)


# The loss inside the sweep


def arguments_of(name, case, log_probs, entropy, take):
    """What a token objective of the family asks for by name, for the tokens at hand."""
    old, advantages = take(case.g), take(case.g_entropy[:, :1])
    offered = {
        "advantages": advantages,
        "raw_rewards_or_advantages": advantages,
        "policy_log_probs": log_probs,
        "old_log_probs": old - 2.0,
        "cliprange": 0.2,
        "threshold_low": 0.1,
        "threshold_high": 0.1,
        "threshold": 0.05,
        "penalty": 0.5,
        "penalized": take(case.mask),
        "kl_coef": 1.0,
    }
    wanted = inspect.signature(getattr(grpo_core, name)).parameters
    return {key: value for key, value in offered.items() if key in wanted}


@pytest.mark.medium
@pytest.mark.parametrize("name", LOCAL)
@fewer
@given(case=cases(), entropy_coef=st.sampled_from([0.0, 0.5]), scale=st.sampled_from([1.0, -3.0]))
def test_fused_token_loss_matches_loss_of_full_logits(name, case, entropy_coef, scale):
    """Any token objective, any blocks: loss, gradients, and what is told of the tokens."""
    weights = compute_token_weights(case.mask, "sequence_mean")

    def loss_fn(log_probs, entropy, take):
        result = getattr(grpo_core, name)(**arguments_of(name, case, log_probs, entropy, take))
        losses = result[0] if isinstance(result, tuple) else result
        bonus = sum_weighted_losses(entropy, take(weights)) * entropy_coef if entropy_coef else 0.0
        return sum_weighted_losses(losses, take(weights)) - bonus

    ours, theirs = case.leaves(), case.leaves()
    options = {"bias": ours.get("bias"), "response_mask": case.mask, **case.options}
    loss, told = fused_linear_token_loss(ours["hidden"], ours["weight"], case.labels, loss_fn, **options)
    (loss * scale).backward()

    values = case.slow(theirs)
    rows, columns = case.mask.nonzero(as_tuple=True)
    expected = loss_fn(
        values["log_probs"][rows, columns][None],
        values["token_entropy"][rows, columns][None],
        lambda tensor: tensor.expand(case.shape)[rows, columns][None],
    )
    close(loss.detach(), expected.detach())
    for key in ("log_probs", "token_entropy"):
        assert not told[key].requires_grad
        close(told[key], torch.where(case.mask, values[key], 0.0).detach())
    if case.mask.any():
        (expected * scale).backward()
    for key, leaf in ours.items():
        close(leaf.grad, torch.zeros_like(leaf) if theirs[key].grad is None else theirs[key].grad, 1e-9)


@given(
    cases(),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([None, "token_mean"]),
)
def test_fused_grpo_loss_matches_clip_loss_of_full_logits(case, high, dual_clip, on_policy, aggregation):
    bounds = {"cliprange_high": high, "dual_clip": dual_clip}
    weights = None if aggregation is None else compute_token_weights(case.mask, aggregation)
    ours, theirs = case.leaves(), case.leaves()
    old = None if on_policy else case.g - 2.0
    loss, told = fused_linear_grpo_loss(
        ours["hidden"],
        ours["weight"],
        case.labels,
        response_mask=case.mask,
        advantages=case.g_entropy[:, :1],
        old_log_probs=old,
        cliprange=0.2,
        weights=weights,
        bias=ours.get("bias"),
        **bounds,
        **case.options,
    )
    loss.backward()
    log_probs = case.slow(theirs)["log_probs"]
    losses, flags = compute_grpo_clip_loss(
        case.g_entropy[:, :1],
        log_probs,
        log_probs.detach() if on_policy else old,
        0.2,
        response_mask=case.mask,
        **bounds,
    )
    if weights is None:
        weights = compute_token_weights(case.mask, "sequence_mean")
    expected = sum_weighted_losses(losses, weights)
    expected.backward()
    close(loss.detach(), expected.detach())
    assert told.keys() == {"log_probs", "token_entropy", *flags}
    if not on_policy:  # there every ratio is 1 to the last bit or next to it, and a bound of width .2 is far
        for name, flag in flags.items():
            assert torch.equal(told[name], flag)
    for key, leaf in ours.items():
        close(leaf.grad, theirs[key].grad, 1e-9)


def test_fused_token_loss_without_gradient_has_zero_gradient():
    hidden, weight = torch.ones(1, 2, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    labels, mask = torch.tensor([[1, 2]]), torch.tensor([[True, True]])
    loss, _ = fused_linear_token_loss(
        hidden, weight, labels, lambda log_probs, *_: log_probs.detach().sum(), response_mask=mask
    )
    loss.backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


# What it costs, counted


def products(run) -> float:
    """Multiply-adds in units of one product of all counted rows with the weight."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / (2 * 6 * 3 * 50)


@pytest.mark.parametrize(("room", "generic", "inside"), [(1 << 20, 3, 3), (2 * 50 * 4, 4, 3)])
def test_matrix_products_are_three_or_four_if_logits_do_not_fit(room, generic, inside):
    hidden, weight = torch.randn(3, 4, 3, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    labels, mask = torch.randint(50, (3, 4)), torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1:3] = True  # 6 of 12 are counted

    def through_values():
        values = fused_linear_log_probs(hidden, weight, labels, response_mask=mask, max_logits_bytes=room)
        (values["log_probs"].sum() - values["token_entropy"].sum()).backward()

    def through_loss():
        loss, _ = fused_linear_grpo_loss(
            hidden,
            weight,
            labels,
            response_mask=mask,
            advantages=torch.ones(3, 1),
            old_log_probs=None,
            cliprange=0.2,
            max_logits_bytes=room,
        )
        loss.backward()

    assert products(through_values) == generic
    assert products(through_loss) == inside
    with torch.no_grad():
        assert products(lambda: fused_linear_log_probs(hidden, weight, labels, response_mask=mask)) == 1


@pytest.mark.parametrize(
    ("free", "deterministic", "expected"),
    [(40 << 30, False, 10 << 30), (1 << 30, False, 1 << 29), (40 << 30, True, 1 << 29)],
    ids=["free", "full", "deterministic"],
)
def test_logits_on_cuda_take_a_quarter_of_the_free_memory(free, deterministic, expected, monkeypatch):
    """What torch has reserved and does not use is free too. A CPU and deterministic algorithms keep the constant."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free // 2, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 7 + free // 2)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert _linear_head.choose_max_logits_bytes(device) == expected
    assert _linear_head.choose_max_logits_bytes(torch.device("cpu")) == 1 << 29


@pytest.mark.parametrize(("is_cuda", "sizes"), [(False, [1024] * 19 + [544]), (True, [4096] * 4 + [3616])])
def test_blocks_are_larger_on_cuda(is_cuda, sizes):
    """There, each block costs a pass over the weight's gradient."""

    class Weight:
        dtype = torch.bfloat16

        def __len__(self):
            return 151936

    weight = Weight()
    weight.is_cuda = is_cuda
    head, n_tokens = _linear_head.LinearHead(weight, None, _softmax_stats.Scaling(), 3 << 30), 20_000
    assert [block.stop - block.start for block in head.iterate_blocks(n_tokens)] == sizes


# Precision


@pytest.mark.parametrize(
    ("dtype", "of_values", "of_slopes"), [(torch.float32, 1.5e-5, 3e-6), (torch.bfloat16, 6e-2, 2e-2)]
)
@pytest.mark.parametrize("room", [1 << 29, 100 << 10], ids=["kept", "blocks"])
def test_rounding_errors_stay_within_those_of_float32(dtype, of_values, of_slopes, room):
    """Of a vocabulary of thousands, with logits of a trained model's size, from the same rounded inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 100, 64).to(dtype).requires_grad_()
    weight = (torch.randn(3000, 64) * 0.5).to(dtype).requires_grad_()
    labels, g = torch.randint(3000, (1, 100)), torch.randn(1, 100)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = nn.functional.linear(*exact)
    slow = {"log_probs": select_log_probs(logits, labels), "token_entropy": compute_entropy(logits)}
    fused = fused_linear_log_probs(hidden, weight, labels, max_logits_bytes=room)
    for values in (fused, slow):
        (values["log_probs"] * g + 0.5 * values["token_entropy"]).sum().backward()
    for name, value in fused.items():
        assert value.dtype == torch.float32
        assert (value - slow[name]).abs().max() < of_values
    for leaf, truth in zip((hidden, weight), exact, strict=True):
        assert leaf.grad.dtype == dtype
        assert (leaf.grad - truth.grad).abs().max() < of_slopes * truth.grad.abs().max()


@pytest.mark.medium
def test_sums_over_blocks_are_float32():
    """A thousand blocks of bfloat16 gradients: rounding each sum would lose what comes late."""
    hidden = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    values = fused_linear_log_probs(
        hidden, weight, torch.zeros(1, 1000, dtype=torch.long), max_logits_bytes=8, return_entropy=False
    )
    values["log_probs"].sum().backward()
    assert_close(weight.grad[:, 0].float(), torch.tensor([750.0, -250.0, -250.0, -250.0]), rtol=4e-3, atol=0)


def test_float16_with_loss_scale_keeps_small_gradients():
    """Weights of 1e-6 vanish in float16 unless the scale of the loss meets them there."""
    hidden = torch.full((1, 1, 2), 1.0, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    mask = torch.tensor([[True]])
    loss, _ = fused_linear_token_loss(
        hidden, weight, torch.tensor([[0]]), lambda log_probs, *_: -1e-8 * log_probs.sum(), response_mask=mask
    )
    (loss * 2.0**20).backward()
    p = math.exp(1) / (math.exp(1) + 1)
    assert_close(weight.grad[0, 0].item(), -(1 - p) * 1e-8 * 2**20, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("empty", [True, False], ids=["no token", "no slope"])
def test_batch_without_gradient_has_zero_gradient(dtype, empty):
    leaves = [torch.ones(1, 2, 3, dtype=dtype).requires_grad_(), torch.ones(5, 3, dtype=dtype).requires_grad_()]
    mask, labels = torch.full((1, 2), not empty), torch.zeros(1, 2, dtype=torch.long)
    pull = 1.0 if empty else 0.0

    def loss_fn(log_probs, _, take):
        return (pull * log_probs).sum() if pull else torch.zeros(())

    loss, _ = fused_linear_token_loss(*leaves, labels, loss_fn, response_mask=mask)
    loss.backward()
    assert loss == 0
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_second_backward_through_fused_token_loss_gives_same_gradient():
    """The graph retained, gradients add up, and none is the tensor of another; released, torch says so."""
    torch.manual_seed(0)
    weight, mask = torch.randn(5, 3, requires_grad=True), torch.ones(2, 3).bool()

    def loss_of(leaf):
        labels = torch.tensor([[0, 1, 2], [3, 4, 0]])
        loss_fn = lambda log_probs, *_: -log_probs.sum()  # noqa: E731
        return fused_linear_token_loss(leaf, weight, labels, loss_fn, response_mask=mask)[0]

    leaf = torch.randn(2, 3, 3, requires_grad=True)
    loss = loss_of(leaf)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone(), weight.grad.clone()
    loss.backward()
    for grad, expected in zip((leaf.grad, weight.grad), once, strict=True):
        close(grad, 2 * expected, 1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_freed_after_backward():
    """A weight's gradient is as large as the weight: what backward hands over is not also kept."""
    weight = torch.randn(5, 3, requires_grad=True)
    loss, _ = fused_linear_token_loss(
        torch.ones(1, 1, 3),
        weight,
        torch.tensor([[2]]),
        lambda log_probs, *_: log_probs.sum(),
        response_mask=torch.tensor([[True]]),
    )
    storage = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == storage


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32])
def test_labels_may_have_any_integer_type(kind):
    hidden, weight, labels = torch.randn(1, 3, 2), torch.randn(4, 2), torch.tensor([[3, 0, 1]])
    mask = torch.tensor([[True, False, True]])
    expected = fused_linear_log_probs(hidden, weight, labels, response_mask=mask)
    close(fused_linear_log_probs(hidden, weight, labels.to(kind), response_mask=mask), expected, 0)


def test_single_token_without_batch_dimension_is_accepted():
    hidden, weight = torch.randn(2), torch.randn(4, 2)
    values = fused_linear_log_probs(hidden, weight, torch.tensor(3))
    batch = fused_linear_log_probs(hidden[None], weight, torch.tensor([3]))
    for name, value in values.items():
        assert value.shape == ()
        close(value, batch[name][0], 0)


def test_bias_keeps_its_precision():
    """Where the products are bfloat16, a float32 bias still gets a float32 gradient."""
    hidden, weight = torch.ones(1, 301, 2).bfloat16(), torch.zeros(4, 2).bfloat16()
    bias = torch.zeros(4, requires_grad=True)
    labels = torch.zeros(1, 301, dtype=torch.long)
    fused_linear_log_probs(hidden, weight, labels, bias=bias, max_logits_bytes=8)["log_probs"].sum().backward()
    assert bias.grad.dtype == torch.float32
    close(bias.grad, torch.tensor([225.75, -75.25, -75.25, -75.25]), 1e-6)


def test_float16_without_gradient_or_rows_has_zero_gradient():
    hidden, weight = (torch.ones(shape, dtype=torch.float16, requires_grad=True) for shape in ((1, 2, 3), (5, 3)))
    labels, nothing = torch.tensor([[1, 2]]), torch.tensor([[False, False]])
    fused_linear_log_probs(hidden, weight, labels, response_mask=nothing)["log_probs"].sum().backward()
    loss, _ = fused_linear_token_loss(
        hidden, weight, labels, lambda log_probs, *_: log_probs.detach().sum(), response_mask=~nothing
    )
    loss.backward()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_autocast_casts_like_linear_layer():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(30, 8)
    labels = torch.randint(30, (2, 5))
    grads = []
    for fused in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                log_probs = fused_linear_log_probs(*leaves, labels)["log_probs"]
            else:
                log_probs = select_log_probs(nn.functional.linear(*leaves), labels)
        log_probs.sum().backward()
        grads.append([log_probs.detach(), *(leaf.grad for leaf in leaves)])
    assert grads[0][1].dtype == torch.float32
    assert_close(grads[0][0], grads[1][0], rtol=1e-6, atol=1e-6)
    # Logits were rounded to bfloat16 indeed.
    assert (grads[0][0] - fused_linear_log_probs(hidden, weight, labels)["log_probs"]).abs().max() > 1e-4
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite"),
        ({"temperature": math.inf}, "temperature=inf must be positive and finite"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be positive, or None"),
        ({"max_logits_bytes": 0}, "max_logits_bytes=0 must be positive"),
    ],
)
def test_invalid_argument_raises(options, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_log_probs(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), **options)


def test_different_types_and_labels_outside_vocabulary_raise():
    with pytest.raises(ValueError, match=r"lm_head_weight=\[torch.bfloat16\] must be of the type of hidden"):
        fused_linear_log_probs(torch.ones(1, 2), torch.ones(3, 2).bfloat16(), torch.tensor([0]))
    for label in (-1, 3):
        with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
            fused_linear_log_probs(torch.ones(2, 2), torch.ones(3, 2), torch.tensor([0, label]))
