"""The Triton kernels agree with the torch tiles: on a GPU or, without one, in Triton's interpreter."""

import functools
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import (
    compute_entropy,
    fused_linear_grpo_loss,
    fused_linear_token_loss,
    select_log_probs,
)
from grpo_core.scoring import _softmax_stats, distributions
from grpo_core.scoring._softmax_stats import (
    Scaling,
    SoftmaxStats,
    StatsGrad,
    backward_into,
    compute_softmax_stats,
    write_gradient,
)
from tests.property.heads import cases as head_cases
from tests.strategies import fewer, floats, masks, tensors, token_sets

pytest.importorskip("triton", reason="there is no Triton")
from grpo_core.scoring import _triton

# The interpreter computes with NumPy, which remarks on what a GPU does in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cpu") if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALINGS = st.builds(Scaling, st.sampled_from([1.0, 0.7, 3.0]), st.sampled_from([None, None, 1.5, 30.0, 1e4]))
NEVER = -math.inf


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Kernels on the device at hand, unproven, and in blocks of four tokens."""
    monkeypatch.setattr(_softmax_stats, "_KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(_softmax_stats, "_has_verified_kernels", lambda *_: True)
    monkeypatch.setattr(_triton, "_BLOCK", 4)


def by_tiles(function, *args, **kwargs):
    """The same call without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_softmax_stats, "_KERNEL_DEVICES", ())
        return function(*args, **kwargs)


def blank(logits, dtype=None):
    """Room for a gradient, in which nothing is right by chance."""
    return torch.full_like(logits, math.nan, dtype=dtype)


class Case:
    """Logits of up to four blocks, in rows that may lie apart, one token of each row at least being possible."""

    def __init__(self, draw) -> None:
        rows, vocab = draw(st.tuples(st.integers(1, 4), st.integers(1, 14)))
        self.dtype, self.scaling = draw(st.sampled_from(DTYPES)), draw(SCALINGS)
        size = draw(st.sampled_from([1.0, 1.0, 1.0, 1250.0]))
        exact = draw(tensors((rows, vocab), floats(-8, 8))) * size
        possible = draw(st.one_of(st.just(torch.ones(rows, vocab, dtype=torch.bool)), masks((rows, vocab))))
        possible[
            torch.arange(rows), torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)))
        ] = True
        beside = draw(st.sampled_from([0, 1, 16]))
        room = torch.full((rows, vocab + beside), math.nan, dtype=self.dtype, device=DEVICE)
        self.logits = room[:, :vocab]
        self.logits.copy_(exact.masked_fill(~possible, NEVER))
        self.labels = torch.tensor(
            draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)), device=DEVICE
        )
        g, g_entropy = (draw(tensors((rows, 1), floats(-2, 2))).float().to(DEVICE) for _ in range(2))
        self.slopes = draw(st.sampled_from([(g, None), (None, g_entropy), (g, g_entropy)]))
        # Rounding of z, in whose exponent the rest is.
        largest = self.z(self.logits.float()).nan_to_num(neginf=0.0).abs().max().item()
        self.slack = 1e-5 + 2.0**-21 * largest

    def z(self, logits):
        """A token of -inf is impossible with a cap too."""
        cap = self.scaling.softcap
        capped = logits if cap is None else torch.where(logits == NEVER, NEVER, cap * torch.tanh(logits / cap))
        return capped / self.scaling.temperature

    def exact(self):
        """Values and gradient by plain formulas in float64."""
        logits = self.logits.double().requires_grad_()
        log_probs, entropy = distributions._compute_traceable(self.z(logits), self.labels, 1.0, True)
        pairs = zip((log_probs, entropy), self.slopes, strict=True)
        # A label that cannot come has a log-prob of -inf, but a slope that is a number.
        parts = [
            (value * slope[:, 0]).masked_fill(slope[:, 0] == 0, 0.0) for value, slope in pairs if slope is not None
        ]
        (gradient,) = torch.autograd.grad(sum(parts).sum(), logits)
        return log_probs.detach(), entropy.detach(), gradient

    def measured(self):
        return compute_softmax_stats(self.logits, self.labels, self.scaling, with_entropy=True, store_exp=True)


@st.composite
def cases(draw) -> Case:
    return Case(draw)


def close(actual, expected, tolerance, relative=None) -> None:
    assert_close(actual.double(), expected.double(), rtol=relative or tolerance, atol=tolerance, equal_nan=True)


# Statistics


@given(cases())
def test_kernel_stats_match_tiles_and_formula(case):
    before = case.logits.clone()
    stats = case.measured()
    assert torch.equal(case.logits, before)
    tiles = by_tiles(compute_softmax_stats, case.logits, case.labels, case.scaling, with_entropy=True)
    log_probs, entropy, _ = case.exact()
    for mine, theirs in zip(stats, tiles, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        close(mine, theirs, case.slack)
    close(stats.log_probs[:, 0], log_probs, case.slack)
    close(stats.entropy[:, 0], entropy, case.slack)
    assert (stats.log_probs <= 0).all()


@fewer
@given(cases())
def test_kernel_stats_omit_unrequested_columns(case):
    whole = case.measured()
    stats = compute_softmax_stats(case.logits, None, case.scaling, with_entropy=False)
    assert stats.log_probs is None
    assert stats.entropy is None
    assert torch.equal(stats.max_logit, whole.max_logit)
    assert torch.equal(stats.exp_sum, whole.exp_sum)


@fewer
@given(cases(), st.sampled_from([1e4, -1e4]))
def test_kernel_with_large_offset_keeps_digits(case, offset):
    """Of logits in steps that float32 has there."""
    logits = (case.logits.float() * 64).round().clamp(-8 * 64, 8 * 64) / 64
    shifted, plain = (
        compute_softmax_stats(logits + by, case.labels, Scaling(), with_entropy=True) for by in (offset, 0.0)
    )
    close(shifted.log_probs, plain.log_probs, 1e-5)
    close(shifted.entropy, plain.entropy, 1e-5)
    slopes = (torch.ones_like(plain.max_logit), torch.ones_like(plain.max_logit))
    gradients = [blank(logits), blank(logits)]
    for gradient, by, stats in zip(gradients, (offset, 0.0), (shifted, plain), strict=True):
        write_gradient(logits + by, gradient, case.labels, 1.0, stats, StatsGrad(*slopes))
    close(*gradients, 1e-5)


# The gradient


@pytest.mark.medium
@given(cases(), st.booleans())
def test_kernel_gradient_matches_formula(case, in_place):
    stats, (_, _, exact) = case.measured(), case.exact()
    gradient = case.logits if in_place else blank(case.logits, torch.float32)
    backward_into(gradient, case.logits, case.labels, case.scaling, stats, StatsGrad(*case.slopes))
    close(gradient, exact, 10 * case.slack, 10 * case.slack + 2 * torch.finfo(gradient.dtype).eps)


@pytest.mark.medium
@given(cases())
def test_kernel_gradient_matches_tiles(case):
    stats, temperature = case.measured(), case.scaling.temperature
    plain = compute_softmax_stats(case.logits, case.labels, Scaling(temperature), with_entropy=True)
    ours, theirs = (blank(case.logits) for _ in range(2))
    labels = None if case.slopes[0] is None else case.labels
    write_gradient(case.logits, ours, labels, temperature, plain, StatsGrad(*case.slopes))
    by_tiles(write_gradient, case.logits, theirs, labels, temperature, plain, StatsGrad(*case.slopes))
    tolerance = 1e-4 + 10 * case.slack
    close(ours, theirs, tolerance, tolerance + 2 * torch.finfo(case.dtype).eps)

    wide = case.logits.float().clone()
    by_tiles(compute_softmax_stats, wide, case.labels, case.scaling, with_entropy=True, store_exp=True)
    theirs = blank(wide)
    by_tiles(backward_into, theirs, wide, case.labels, case.scaling, stats, StatsGrad(*case.slopes))
    backward_into(case.logits, case.logits, case.labels, case.scaling, stats, StatsGrad(*case.slopes))
    close(case.logits, theirs, tolerance, tolerance + 2 * torch.finfo(case.dtype).eps)


def test_kernel_accepts_expanded_gradient():
    logits, labels = torch.randn(3, 9, device=DEVICE), torch.zeros(3, dtype=torch.long, device=DEVICE)
    stats = compute_softmax_stats(logits, labels, Scaling(), with_entropy=True)
    gradients = []
    for slope in (torch.tensor([[2.0]], device=DEVICE).expand(3, 1), torch.full((3, 1), 2.0, device=DEVICE)):
        gradients.append(blank(logits))
        write_gradient(logits, gradients[-1], labels, 1.0, stats, StatsGrad(slope, slope))
    assert torch.equal(*gradients)


# What is special


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 5, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_kernel_nan_or_inf_logit_makes_its_row_nan(dtype, place, value):
    logits = torch.randn(3, 9, device=DEVICE).to(dtype)
    logits[1, place] = value
    logits[2] = NEVER
    check_nan(logits)


def test_kernel_nan_beside_impossible_tokens_is_nan():
    logits = torch.full((3, 9), NEVER, device=DEVICE)
    logits[0, 0], logits[1, 8], logits[2, 5] = math.nan, math.nan, 1.0
    logits[2, 6] = math.nan
    check_nan(torch.cat([torch.zeros_like(logits[:1]), logits]))


def check_nan(logits):
    """The first row is sound, and what the tiles make of the others is NaN everywhere."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
    slope = torch.ones(len(logits), 1, device=DEVICE)
    for way in (lambda function, *args, **options: function(*args, **options), by_tiles):
        stats = way(compute_softmax_stats, logits, labels, Scaling(), with_entropy=True)
        for value in (stats.log_probs, stats.entropy):
            assert value[0].isfinite().all()
            assert value[1:].isnan().all()
        for slopes in ((slope, None), (None, slope), (slope, slope)):
            gradient = blank(logits)
            way(write_gradient, logits, gradient, labels, 1.0, stats, StatsGrad(*slopes))
            assert gradient[0].isfinite().all()
            assert gradient[1:].isnan().all()


def test_kernel_least_float_is_ordinary_logit():
    """What masks are made of, in a block of its own, beside anything, and alone."""
    least = torch.finfo(torch.float32).min
    logits = torch.full((3, 9), least, device=DEVICE)
    logits[0, 7], logits[1, 0] = 3.0, 1e38
    labels = torch.tensor([7, 0, 4], device=DEVICE)
    stats = compute_softmax_stats(logits, labels, Scaling(), with_entropy=True)
    close(stats.log_probs[:, 0], torch.tensor([0.0, 0.0, -math.log(9)], device=DEVICE), 1e-6)
    close(stats.entropy[:, 0], torch.tensor([0.0, 0.0, math.log(9)], device=DEVICE), 1e-6)


def test_kernel_softcap_is_exact_near_zero_and_far_out():
    """tanh, through the gradient and the value, where its exponentials cancel and where they vanish."""
    scaling = Scaling(1.0, 100.0)
    inputs = torch.tensor([[1e-3, 2e-2, 1.0, 20.0, 24.9, 25.1, 60.0, 900.0, -7.0, -70.0, -9e3]], device=DEVICE)
    exact = 100 * torch.tanh(inputs.double() / 100)
    for place in range(inputs.shape[1]):
        label = torch.tensor([place], device=DEVICE)
        stats = compute_softmax_stats(inputs, label, scaling, with_entropy=False)
        z = stats.log_probs + stats.exp_sum.log() + stats.max_logit
        assert_close(z.double()[0, 0], exact[0, place], rtol=1e-6, atol=2e-5)
    # Of a single token, the largest is its own.
    max_logit = compute_softmax_stats(inputs.t().contiguous(), None, scaling, with_entropy=False).max_logit
    assert_close(max_logit[:, 0].double(), exact[0], rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2).t()],
    ids=["no rows", "float64", "tokens apart"],
)
def test_unsupported_logits_use_tiles(logits, monkeypatch):
    logits = logits.to(DEVICE)
    monkeypatch.setattr(_triton, "compute_softmax_stats", None)
    monkeypatch.setattr(_triton, "write_gradient", None)
    labels = torch.zeros(len(logits), dtype=torch.long, device=DEVICE)
    stats = compute_softmax_stats(logits, labels, Scaling(), with_entropy=True, store_exp=True)
    assert (logits == 1).all()
    backward_into(logits, logits, labels, Scaling(), stats, StatsGrad(torch.ones_like(stats.max_logit), None))
    assert stats.log_probs.shape == (len(logits), 1)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="an assertion on a GPU ends the process")
def test_kernel_label_outside_vocabulary_raises():
    with pytest.raises(RuntimeError, match="out of bounds"):
        compute_softmax_stats(torch.zeros(1, 3), torch.tensor([3]), Scaling(), with_entropy=True)


# What uses them


@fewer
@given(cases())
def test_public_functions_with_kernels_match_tiles(case):
    """Of logits that lose their last position, as everybody slices them."""
    rows, vocab = case.logits.shape
    batch = torch.zeros(rows, 3, vocab, dtype=case.dtype, device=DEVICE)
    batch[:, 0] = case.logits
    labels = torch.stack([case.labels, case.labels.flip(0)], dim=1)
    possible = batch[:, :-1].gather(2, labels[..., None])[..., 0] > NEVER

    def everything():
        leaf = batch.clone().requires_grad_()
        logits, temperature = leaf[:, :-1], case.scaling.temperature
        values = [
            select_log_probs(logits, labels, temperature=temperature),
            compute_entropy(logits, temperature=temperature),
        ]
        (torch.where(possible, values[0], 0.0).sum() + 0.5 * values[1].sum()).backward()
        return [*(value.detach() for value in values), leaf.grad]

    case.scaling = case.scaling._replace(softcap=None)
    slack = 1e-5 + 2.0**-20 * case.z(case.logits.float()).nan_to_num(neginf=0.0).abs().max().item()
    for mine, theirs in zip(everything(), by_tiles(everything), strict=True):
        # Two gradients were rounded, and then added: what is left may be less than either.
        rounding = 2 * torch.finfo(mine.dtype).eps * theirs.nan_to_num(neginf=0.0).abs().max().clamp(min=1).item()
        close(mine, theirs, 10 * slack + rounding)


def narrow(case, dtype):
    """A case of the head's battery, on the device and in this type; and leaves of it for the slow way, in float64."""
    rounded = [None if part is None else part.to(dtype) for part in (case.hidden, case.weight, case.bias)]
    case.hidden, case.weight, case.bias = (None if part is None else part.double() for part in rounded)
    exact = case.leaves()
    case.hidden, case.weight, case.bias = (None if part is None else part.to(DEVICE) for part in rounded)
    case.labels, case.mask = case.labels.to(DEVICE), case.mask.to(DEVICE)
    case.g, case.g_entropy = case.g.float().to(DEVICE), case.g_entropy.float().to(DEVICE)
    return exact


def check_leaves(ours, theirs, tolerance) -> None:
    for name, leaf in ours.items():
        expected = torch.zeros_like(leaf) if theirs[name].grad is None else theirs[name].grad
        close(leaf.grad, expected.to(DEVICE), tolerance)


@given(head_cases(), st.booleans(), st.booleans())
def test_fused_head_with_kernels_matches_full_logits(case, by_log_prob, by_entropy):
    """Kept logits and blocks of them, through temperature, cap, bias and mask; values, and slopes of either."""
    exact = narrow(case, torch.float32)
    ours, labels, mask = case.leaves(), case.labels, case.mask
    fused = case.fused(ours)
    case.labels = labels.cpu()
    slow = case.slow(exact)
    parts = zip(("log_probs", "token_entropy"), (by_log_prob, by_entropy), (case.g, case.g_entropy), strict=True)
    ours_sum, theirs_sum = 0.0, 0.0
    for name, wanted, slope in parts:
        expected = torch.where(mask.cpu(), slow[name], 0.0)
        close(fused[name], expected.detach().to(DEVICE), 1e-4)
        if wanted:
            ours_sum, theirs_sum = ours_sum + (fused[name] * slope).sum(), theirs_sum + (expected * slope.cpu()).sum()
    if not (by_log_prob or by_entropy):
        return
    ours_sum.backward(retain_graph=True)
    theirs_sum.backward()
    check_leaves(ours, exact, 2e-4)
    # The first pass overwrote the logits that were kept.
    again = torch.autograd.grad(ours_sum, list(ours.values()))
    for leaf, gradient in zip(ours.values(), again, strict=True):
        close(gradient, leaf.grad, 1e-5)


@fewer
@given(head_cases(), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_fused_head_with_kernels_in_half_precision_is_accurate(case, dtype, inside):
    """Rounded logits, a gradient in their place: nearer to float64 than a rounding of either."""
    exact = narrow(case, dtype)
    ours, labels, mask = case.leaves(), case.labels, case.mask
    options = {"response_mask": mask, "bias": ours.get("bias"), **case.options}

    def loss_fn(log_probs, entropy, take):
        return (log_probs * take(case.g)).sum() + (entropy * take(case.g_entropy)).sum()

    if inside:
        loss, values = fused_linear_token_loss(ours["hidden"], ours["weight"], labels, loss_fn, **options)
    else:
        values = case.fused(ours)
        loss = (values["log_probs"] * case.g + values["token_entropy"] * case.g_entropy).sum()
    loss.backward()
    case.labels = labels.cpu()
    slow = case.slow(exact)
    slow = {name: torch.where(mask.cpu(), value, 0.0) for name, value in slow.items()}
    (slow["log_probs"] * case.g.cpu() + slow["token_entropy"] * case.g_entropy.cpu()).sum().backward()
    rounding = torch.finfo(dtype).eps
    for name, value in values.items():
        close(value, slow[name].detach().to(DEVICE), 40 * rounding)
    check_leaves(ours, exact, 200 * rounding)


@fewer
@given(head_cases(), st.booleans())
def test_fused_grpo_loss_with_kernels_matches_tiles(case, on_policy):
    narrow(case, torch.float32)

    def everything():
        leaves = case.leaves()
        loss, values = fused_linear_grpo_loss(
            leaves["hidden"],
            leaves["weight"],
            case.labels,
            response_mask=case.mask,
            advantages=case.g_entropy[:, :1],
            old_log_probs=None if on_policy else case.g - 2.0,
            cliprange=50.0,
            bias=leaves.get("bias"),
            **case.options,
        )
        loss.backward()
        return [loss.detach(), values["log_probs"], values["token_entropy"], *(leaf.grad for leaf in leaves.values())]

    for mine, theirs in zip(everything(), by_tiles(everything), strict=True):
        close(mine, theirs, 1e-4)


@fewer
@given(st.data())
def test_fused_head_with_kernels_and_token_sets_matches_full_logits(data):
    case = data.draw(head_cases())
    kept, excluded, members = data.draw(token_sets(case.labels, case.vocab))
    exact = narrow(case, torch.float32)
    ours = case.leaves()
    sets = {"kept_ids": kept, "excluded_ids": excluded}
    fused = case.fused(ours, **{name: None if ids is None else ids.to(DEVICE) for name, ids in sets.items()})
    case.labels = case.labels.cpu()
    slow = case.slow(exact, members=members)
    for name, slope in (("log_probs", case.g), ("token_entropy", case.g_entropy)):
        expected = torch.where(case.mask.cpu(), slow[name], 0.0)
        close(fused[name], expected.detach().to(DEVICE), 1e-4)
        (expected * slope.cpu()).sum().backward(retain_graph=True)
        (fused[name] * slope).sum().backward(retain_graph=True)
    check_leaves(ours, exact, 4e-4)


# The proof on the device


@pytest.fixture
def proof(monkeypatch):
    """As it is at first use: nothing known, blocks as they are."""
    monkeypatch.undo()
    monkeypatch.setattr(_softmax_stats, "_KERNEL_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(
        _softmax_stats, "_has_verified_kernels", functools.cache(_softmax_stats._has_verified_kernels.__wrapped__)
    )
    return monkeypatch


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
def test_verified_kernels_are_used(proof, dtype):
    assert _softmax_stats._measure_kernel_error(DEVICE, dtype) <= 1
    assert _softmax_stats._uses_kernels(torch.zeros(2, 3, dtype=dtype, device=DEVICE))


def raising(*_):
    raise RuntimeError("no such\nGPU")


def changed(change):
    """A kernel whose statistics are changed."""
    true = _triton.compute_softmax_stats
    return lambda *args: change(*true(*args))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "kernel", "seen"),
    [
        ("compute_softmax_stats", raising, r"fail \(RuntimeError: no such GPU\)"),
        ("write_gradient", raising, r"fail \(RuntimeError: no such GPU\)"),
        ("write_gradient", lambda *_: None, "differ from torch by nan"),
        ("write_gradient", lambda _, gradient, *__: gradient.zero_(), "differ"),
        (
            "compute_softmax_stats",
            changed(lambda log_probs, max_logit, exp_sum, entropy: (log_probs, max_logit, exp_sum, entropy + 1e-3)),
            "differ",
        ),
        (
            "compute_softmax_stats",
            changed(lambda log_probs, max_logit, exp_sum, entropy: (log_probs - 1e-3, max_logit, exp_sum, entropy)),
            "differ",
        ),
        (
            "compute_softmax_stats",
            changed(
                lambda log_probs, max_logit, exp_sum, entropy: (log_probs, max_logit, exp_sum, entropy * math.nan)
            ),
            "differ from torch by nan",
        ),
    ],
    ids=["raises", "raises later", "writes nothing", "writes 0", "entropy", "log-prob", "nan"],
)
def test_unverified_kernels_warn_once_and_are_not_used(proof, name, kernel, seen):
    logits, labels = torch.randn(3, 9, device=DEVICE), torch.tensor([0, 8, 4], device=DEVICE)
    expected = by_tiles(compute_softmax_stats, logits, labels, Scaling(), with_entropy=True)
    proof.setattr(_triton, name, kernel)
    with pytest.warns(UserWarning, match=seen) as caught:
        stats = compute_softmax_stats(logits, labels, Scaling(), with_entropy=True)
    # Once.
    assert torch.equal(compute_softmax_stats(logits, labels, Scaling(), with_entropy=True).entropy, stats.entropy)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    for mine, theirs in zip(stats, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_missing_triton_gives_no_warning(proof):
    proof.setattr(_softmax_stats, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _softmax_stats._uses_kernels(torch.zeros(2, 3, device=DEVICE))


def test_cpu_uses_no_kernels(proof):
    proof.undo()
    assert not _softmax_stats._uses_kernels(torch.zeros(2, 3))


def test_softmax_stats_fields_have_order_of_kernel():
    assert SoftmaxStats._fields == ("log_probs", "max_logit", "exp_sum", "entropy")
    assert Scaling._fields == ("temperature", "softcap")


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from grpo_core.scoring import _softmax_stats

class Absent:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

compiled, run = [], JITFunction.run

def compile_only(self, *args, warmup, **options):
    compiled.append(run(self, *args, warmup=True, **options))

driver.set_active(Absent())
JITFunction.run = compile_only
for dtype in _softmax_stats._KERNEL_TYPES:
    _softmax_stats._measure_kernel_error(torch.device("cpu"), dtype)
print(len(compiled), sum("cubin" in one.asm for one in compiled))
"""


@pytest.mark.slow
def test_kernels_compile_for_absent_gpu(tmp_path):
    """All that the proof launches, as it launches it, down to the binary of an H100: an interpreter accepts more."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["24", "24"]
