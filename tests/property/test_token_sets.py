"""Laws of log-probs and entropies over the tokens that a truncated sampler left."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import compute_entropy, fused_linear_log_probs, fused_linear_token_loss, select_log_probs
from grpo_core.scoring import _softmax_stats, distributions
from tests.property.heads import cases
from tests.strategies import fewer, floats, logits_and_labels, tensors, token_sets

TEMPERATURES = st.sampled_from([0.5, 1.0, 3.0])


@pytest.fixture(autouse=True, params=["sweep", "plain"])
def _way(request, monkeypatch):
    """Tile by tile, and the plain expressions that torch.compile and torch.func get."""
    if request.param == "plain":
        monkeypatch.setattr(distributions, "is_traced", lambda: True)
    else:
        monkeypatch.setattr(_softmax_stats, "_tile_rows", lambda logits: 2)


def gradient(values, leaf):
    return torch.autograd.grad(values.sum(), leaf)[0]


@given(st.data(), TEMPERATURES, st.sampled_from([torch.float64, torch.bfloat16, torch.float16]))
def test_sets_equal_smaller_vocabulary(data, temperature, dtype):
    """One row at a time: tokens outside of the set might as well not exist, and the caller's logits stay."""
    logits, labels = data.draw(logits_and_labels())
    logits = logits.to(dtype)
    kept, excluded, members = data.draw(token_sets(labels, logits.shape[-1]))
    sets = {"temperature": temperature, "kept_ids": kept, "excluded_ids": excluded}
    leaf = logits.clone().requires_grad_()
    log_probs, entropy = select_log_probs(leaf, labels, **sets), compute_entropy(leaf, **sets)
    assert torch.equal(leaf, logits)
    of_log_probs, of_entropy = gradient(log_probs, leaf), gradient(entropy, leaf)
    assert (of_log_probs[~members] == 0).all()
    assert (of_entropy[~members] == 0).all()
    for row, label in enumerate(labels.tolist()):
        part = logits[row, members[row]].clone().requires_grad_()
        place = members[row, :label].sum()
        alone = select_log_probs(part, place, temperature=temperature)
        spread = compute_entropy(part, temperature=temperature)
        assert_close(log_probs[row], alone)
        assert_close(entropy[row], spread)
        assert_close(of_log_probs[row, members[row]], gradient(alone, part))
        assert_close(of_entropy[row, members[row]], gradient(spread, part))


@given(st.data())
def test_probabilities_over_set_sum_to_one(data):
    logits, labels = data.draw(logits_and_labels())
    rows, vocab = logits.shape
    kept, excluded, members = data.draw(token_sets(labels, vocab))
    total = torch.zeros(rows).double()
    for token in range(vocab):
        possible = members[:, token].nonzero()[:, 0]
        sets = {"kept_ids": None if kept is None else kept[possible]}
        sets["excluded_ids"] = None if excluded is None else excluded[possible]
        drawn = torch.full((len(possible),), token)
        total[possible] += select_log_probs(logits[possible], drawn, **sets).exp()
    assert_close(total, torch.ones(rows).double())


@given(st.data())
def test_smaller_set_raises_log_prob_by_its_share(data):
    """log p over S is log p minus the log of what S has: positive, unless S is everything."""
    logits, labels = data.draw(logits_and_labels())
    kept, excluded, members = data.draw(token_sets(labels, logits.shape[-1]))
    share = (logits.softmax(dim=1) * members).sum(dim=1)
    rise = select_log_probs(logits, labels, kept_ids=kept, excluded_ids=excluded) - select_log_probs(logits, labels)
    assert_close(rise, -share.log(), rtol=1e-9, atol=1e-9)
    assert (rise[~members.all(dim=1)] > 0).all()


@given(logits_and_labels(), st.data())
def test_full_sets_change_nothing(inputs, data):
    logits, labels = inputs
    everything = torch.tensor(data.draw(st.permutations(range(logits.shape[-1])))).expand(len(logits), -1)
    nothing = torch.full((len(logits), data.draw(st.integers(0, 2))), -1)
    for sets in ({"kept_ids": everything}, {"excluded_ids": nothing}):
        assert_close(select_log_probs(logits, labels, **sets), select_log_probs(logits, labels), rtol=0, atol=0)
        assert_close(compute_entropy(logits, **sets), compute_entropy(logits), rtol=0, atol=0)


@given(st.data())
def test_set_of_one_token_is_certain(data):
    logits, labels = data.draw(logits_and_labels())
    leaf = logits.requires_grad_()
    alone = torch.stack([labels, torch.full_like(labels, -1), labels], dim=1)  # a token may occur twice
    log_probs, entropy = select_log_probs(leaf, labels, kept_ids=alone), compute_entropy(leaf, kept_ids=alone)
    for values in (log_probs, entropy):
        assert (values == 0).all()
        assert (gradient(values, leaf) == 0).all()


@pytest.mark.parametrize("sets", [{"kept_ids": [[0, 1], [-1, -1]]}, {"excluded_ids": [[-1, -1, -1], [0, 1, 2]]}])
def test_empty_set_has_nan_entropy_and_no_label(sets):
    tensors = {name: torch.tensor(ids) for name, ids in sets.items()}
    entropy = compute_entropy(torch.zeros(2, 3), **tensors)
    assert entropy.isnan().tolist() == [False, True]
    if not distributions.is_traced():
        with pytest.raises(ValueError, match=r"labels\[1\]=0 is outside of its token set"):
            select_log_probs(torch.zeros(2, 3), torch.tensor([0, 0]), **tensors)


def test_excluded_token_with_almost_all_probability_keeps_digits():
    """A sampler hides an end token that is certain; 1 - p would have no digit left."""
    logits = torch.tensor([[60.0, 1.0, 0.0]], requires_grad=True)
    log_probs = select_log_probs(logits, torch.tensor([2]), excluded_ids=torch.tensor([[0]]))
    assert_close(log_probs.item(), -math.log1p(math.e), rtol=1e-6, atol=0)
    share = math.e / (1 + math.e)
    assert_close(gradient(log_probs, logits), torch.tensor([[0.0, -share, share]]))


@fewer
@given(st.data(), TEMPERATURES)
def test_set_gradient_matches_finite_differences(data, temperature):
    logits, labels = data.draw(logits_and_labels())
    kept, excluded, _ = data.draw(token_sets(labels, logits.shape[-1]))
    sets = {"temperature": temperature, "kept_ids": kept, "excluded_ids": excluded}
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: select_log_probs(x, labels, **sets), leaf, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: compute_entropy(x, **sets), leaf, fast_mode=True)


@given(st.data())
def test_fused_head_over_sets_matches_full_logits(data):
    """Kept logits and blocks of them, with bias, cap, temperature and mask; twice through the same graph."""
    case = data.draw(cases())
    kept, excluded, members = data.draw(token_sets(case.labels, case.vocab))
    ours, theirs = case.leaves(), case.leaves()
    fused, slow = case.fused(ours, kept_ids=kept, excluded_ids=excluded), case.slow(theirs, members=members)
    total, expected = 0.0, 0.0
    for name, slope in (("log_probs", case.g), ("token_entropy", case.g_entropy)):
        whole = torch.where(case.mask, slow[name], 0.0)
        assert_close(fused[name], whole, rtol=1e-10, atol=1e-10)
        total, expected = total + (fused[name] * slope).sum(), expected + (whole * slope).sum()
    expected.backward()
    for _ in range(2):
        gradients = torch.autograd.grad(total, list(ours.values()), retain_graph=True)
        for found, leaf in zip(gradients, theirs.values(), strict=True):
            assert_close(found, leaf.grad, rtol=1e-9, atol=1e-9)


@fewer
@given(st.data())
def test_fused_head_over_sets_gradient_matches_finite_differences(data):
    case = data.draw(cases())
    kept, excluded, _ = data.draw(token_sets(case.labels, case.vocab))
    leaves = case.leaves()

    def values(*inputs):
        fused = case.fused(dict(zip(leaves, inputs, strict=True)), kept_ids=kept, excluded_ids=excluded)
        return fused["log_probs"], fused["token_entropy"]

    assert torch.autograd.gradcheck(values, tuple(leaves.values()), fast_mode=True, nondet_tol=1e-12)


@fewer
@given(st.data())
def test_fused_token_loss_over_sets_matches_fused_log_probs(data):
    case = data.draw(cases())
    kept, excluded, _ = data.draw(token_sets(case.labels, case.vocab))
    sets = {"kept_ids": kept, "excluded_ids": excluded}
    ours, theirs = case.leaves(), case.leaves()

    def loss_fn(log_probs, entropy, take):
        return (log_probs * take(case.g)).sum() + (entropy * take(case.g_entropy)).sum()

    loss, values = fused_linear_token_loss(
        ours["hidden"],
        ours["weight"],
        case.labels,
        loss_fn,
        response_mask=case.mask,
        bias=ours.get("bias"),
        **case.options,
        **sets,
    )
    fused = case.fused(theirs, **sets)
    expected = (fused["log_probs"] * case.g + fused["token_entropy"] * case.g_entropy).sum()
    assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert_close(values["log_probs"], fused["log_probs"].detach())
    loss.backward()
    expected.backward()
    for name, leaf in ours.items():
        assert_close(leaf.grad, theirs[name].grad, rtol=1e-9, atol=1e-9)


@given(tensors((2, 3), floats(-2, 2)), tensors((5, 3), floats(-2, 2)))
def test_sets_outside_mask_are_not_read(hidden, weight):
    mask, labels = torch.tensor([True, False]), torch.tensor([1, 2])
    options = {"response_mask": mask, "excluded_ids": torch.tensor([[0], [10**6]])}
    values = fused_linear_log_probs(hidden, weight, labels, kept_ids=torch.tensor([[1, 0], [-1, -1]]), **options)
    assert {name: value.tolist() for name, value in values.items()} == {
        "log_probs": [0.0, 0.0],
        "token_entropy": [0.0, 0.0],
    }


@pytest.mark.medium
def test_sets_in_compiled_function_match_eager():
    logits, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 2])
    sets = {"kept_ids": torch.tensor([[1, 4, -1], [2, 0, 1]]), "excluded_ids": torch.tensor([[0], [1]])}

    def function(leaf):
        return select_log_probs(leaf, labels, **sets) + compute_entropy(leaf, **sets)

    torch._dynamo.reset()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(ours)
    assert_close(found, function(theirs))
    assert_close(gradient(found, ours), gradient(function(theirs), theirs))
