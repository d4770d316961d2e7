"""One battery over every objective and every aggregation. It finds a new `compute_*_loss` by itself.

A member with a parameter that tests/property/objectives.py does not know, or without an oracle in
tests/oracle/objectives.py, turns these tests red.
"""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from grpo_core import Aggregation, compute_sequence_weights, compute_token_weights, sum_weighted_losses
from tests.oracle import objectives as oracle
from tests.property.objectives import (
    CONSTANT,
    EACH,
    EACH_MEMBER,
    OF_RESPONSES,
    PAIRS,
    PARAMETERS,
    STOPPED,
    TENSORS,
    Case,
    cases,
    far_from_kinks,
    fewer,
    losses_of,
    run,
    weights_of,
)
from tests.strategies import GARBAGE, floats, masks, response_masks, tensors

pytestmark = pytest.mark.usefixtures("each_way")


def check_against_the_oracle(name: str, aggregation: str, case: Case) -> None:
    """Autograd gives w * g, with w and g by their definitions; the metadata tell which side of a bound binds."""
    loss, gradient, metadata = run(name, case, weights_of(aggregation, case))
    rows, seq = case.mask.shape
    everything = [[True] * seq] * rows
    constant = None if aggregation == "token_mean" else CONSTANT
    weights = oracle.weights(aggregation, case.mask.tolist(), everything, constant, case.sizes, "count", "count")
    advantages = case.advantages.expand(rows, seq)
    total, expected = 0.0, torch.zeros_like(gradient)
    for row in range(rows):
        places = case.mask[row].nonzero().flatten().tolist()
        if not places:
            continue
        tokens = [part[row, places].tolist() for part in (case.policy, case.old, advantages, case.penalized)]
        values, slopes, flags = oracle.response_oracle(name, *tokens, case.hyper)
        if name in OF_RESPONSES:
            values = [values / len(places)] * len(places)
        for index, place in enumerate(places):
            weight = weights[row][0 if name in OF_RESPONSES else place]
            total += weight * values[index]
            expected[row, place] = weight * slopes[index]
            of_place = flags if isinstance(flags, dict) else flags[index]
            assert set(metadata) == set(of_place)
            for key, flag in of_place.items():
                found = metadata[key][row]
                assert found[0 if len(found) == 1 else place].item() == flag, key
    assert_close(loss.item(), total, rtol=1e-10, atol=1e-12)
    assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.medium
@EACH_MEMBER
@given(data=st.data())
def test_family_members_are_those_of_the_oracle(name, data):
    """Value, slope and flags, with all the examples of the profile, because a bound binds in few of them."""
    case = data.draw(cases(name))
    assume(far_from_kinks(case))
    check_against_the_oracle(name, data.draw(st.sampled_from([how for member, how in PAIRS if member == name])), case)


@EACH
@fewer
@given(data=st.data())
def test_value_gradient_and_flags_match_oracle(name, aggregation, data):
    case = data.draw(cases(name))
    assume(far_from_kinks(case))
    check_against_the_oracle(name, aggregation, case)


@EACH
@fewer
@given(data=st.data())
def test_split_and_order_change_nothing(name, aggregation, data):
    """Weights are those of the step; micro-batches of any sizes, in any order, on any rank, add up to it."""
    case = data.draw(cases(name))
    order = data.draw(st.permutations(range(len(case.mask))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=3)))
    weights = weights_of(aggregation, case)
    loss, gradient, metadata = run(name, case, weights)
    total, rows, pieces, flags = torch.zeros_like(loss), [], [], []
    for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        if part := order[start:end]:
            share, piece, described = run(name, case.rows(part), weights[part])
            total = total + share
            rows += part
            pieces.append(piece)
            flags.append(described)
    assert_close(total, loss, rtol=1e-12, atol=1e-12)
    assert_close(torch.cat(pieces), gradient[rows], rtol=1e-12, atol=1e-12)
    for key, whole in metadata.items():
        assert torch.equal(torch.cat([part[key] for part in flags]), whole[rows])


@EACH
@fewer
@given(data=st.data())
def test_content_outside_mask_is_never_read(name, aggregation, data):
    """NaN, infinities and huge numbers there: the same bits in value, gradient and metadata; gradient exactly 0."""
    case = data.draw(cases(name))
    mask = case.mask
    garbage = [data.draw(tensors(tuple(mask.shape), GARBAGE)) for _ in range(3)]
    hidden = ~mask.any(dim=1, keepdim=True) if case.advantages.shape[1] == 1 else ~mask
    spoiled = replace(
        case,
        policy=torch.where(mask, case.policy, garbage[0]),
        old=torch.where(mask, case.old, garbage[1]),
        advantages=torch.where(hidden, garbage[2][:, : case.advantages.shape[1]], case.advantages),
        penalized=case.penalized | ~mask,
    )
    weights = weights_of(aggregation, case)
    (loss, gradient, metadata), expected = run(name, spoiled, weights), run(name, case, weights)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert (gradient[~mask] == 0.0).all()
    for key, value in metadata.items():
        assert torch.equal(value, expected[2][key])
        assert value.dtype == torch.bool
        assert not value[~mask if value.shape == mask.shape else ~mask.any(dim=1, keepdim=True)].any()


@EACH_MEMBER
@fewer
@given(data=st.data())
def test_loss_outside_the_mask_is_exactly_zero(name, data):
    """The losses are summed without weights, because a weight of 0 would hide a wrong loss or gradient on padding."""
    case = data.draw(cases(name))
    mask = case.mask
    garbage = [data.draw(tensors(tuple(mask.shape), GARBAGE)) for _ in range(3)]
    wide = case.advantages.shape == mask.shape
    spoiled = replace(
        case,
        policy=torch.where(mask, case.policy, garbage[0]).requires_grad_(),
        old=torch.where(mask, case.old, garbage[1]),
        advantages=torch.where(mask, case.advantages, garbage[2]) if wide else case.advantages,
    )
    losses, _ = losses_of(name, spoiled)
    losses.sum().backward()
    assert (losses[~mask if losses.shape == mask.shape else ~mask.any(dim=1)] == 0).all()
    assert (spoiled.policy.grad[~mask] == 0).all()
    assert spoiled.policy.grad.isfinite().all()


@EACH_MEMBER
@fewer
@given(data=st.data())
def test_nan_in_a_response_reaches_loss(name, data):
    """Only what the mask hides may be NaN without a word: a broken log-probability must not become a plain 0."""
    case = data.draw(cases(name))
    row, place = (data.draw(st.integers(0, size - 1)) for size in case.mask.shape)
    case.mask[row, place], case.policy[row, place] = True, torch.nan
    losses, _ = losses_of(name, case)
    assert losses[row, place if losses.shape == case.mask.shape else 0].isnan()


@EACH
@fewer
@given(data=st.data())
def test_padding_columns_change_nothing(name, aggregation, data):
    case = data.draw(cases(name))
    left, right = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    wide = case.advantages.shape[1] == case.mask.shape[1] > 1
    padded = replace(
        case,
        policy=pad(case.policy, data.draw(GARBAGE)),
        old=pad(case.old, data.draw(GARBAGE)),
        advantages=pad(case.advantages, data.draw(GARBAGE)) if wide else case.advantages,
        mask=pad(case.mask, False),
        penalized=pad(case.penalized, True),
    )
    loss, gradient, _ = run(name, padded, weights_of(aggregation, padded))
    expected_loss, expected_gradient, _ = run(name, case, weights_of(aggregation, case))
    assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    assert_close(gradient, pad(expected_gradient, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "aggregation"), [pair for pair in PAIRS if pair[0] not in STOPPED])
@fewer
@given(data=st.data())
def test_gradient_matches_finite_differences(name, aggregation, data):
    case = data.draw(cases(name))
    assume(far_from_kinks(case))
    if name == "compute_kl_cov_loss":
        assume(((case.policy - case.old).abs() > 1e-3).all())
    weights = weights_of(aggregation, case)
    policy = case.policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda log_probs: sum_weighted_losses(losses_of(name, case, log_probs)[0], weights), policy, fast_mode=True
    )


@EACH
@fewer
@given(data=st.data())
def test_gradient_reaches_policy_only(name, aggregation, data):
    case = data.draw(cases(name))
    weights = weights_of(aggregation, case)
    inputs = [tensor.requires_grad_() for tensor in (case.policy, case.old, case.advantages, weights)]
    losses, metadata = losses_of(name, case)
    sum_weighted_losses(losses, weights).backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is inputs[2].grad is inputs[3].grad is None
    assert not any(value.requires_grad for value in metadata.values())


@EACH
def test_wild_ratios_give_finite_loss_and_gradient(name, aggregation):
    """A ratio of exp(10000) either way, alone and beside an ordinary token; and a batch of nothing but padding."""
    hyper = {
        key: {"cliprange_high": None, "dual_clip": None, "ratio_low": 0.0, "ratio_high": 5.0}.get(key, 0.2)
        for key in PARAMETERS[name] - TENSORS
    }
    hyper |= {key: (2.0, 3.0) for key in ("positive", "negative") if key in hyper}
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    for wild in product([torch.float32, torch.float64], [1e4, -1e4, 1e9, -1e9], [1.0, -1.0, 0.0]):
        dtype, gap, advantage = wild
        old = torch.tensor([[-1.0 - abs(gap), -1.0], [-1.0, -1.0], [-1.0, -1.0]], dtype=dtype)
        moved = torch.tensor([[gap, 0.0], [0.0, 0.5], [0.0, 0.0]], dtype=dtype)
        case = Case(
            policy=torch.minimum(old + moved, torch.tensor(-1e-3, dtype=dtype)),
            old=old,
            advantages=torch.full((3, 1), advantage, dtype=dtype),
            mask=mask,
            penalized=mask,
            sizes=[3],
            hyper=hyper,
        )
        for batch in (case, replace(case, mask=torch.zeros_like(mask))):
            loss, gradient, _ = run(name, batch, weights_of(aggregation, batch))
            assert loss.dtype == dtype, wild
            assert loss.isfinite(), wild
            assert gradient.isfinite().all(), wild
            assert batch.mask.any() or loss == 0, wild


WAYS_TO_COUNT = st.sampled_from(["count", "drop"])


@pytest.mark.parametrize("aggregation", ["sequence", *get_args(Aggregation)])
@given(data=st.data())
def test_compute_weights_by_definition(aggregation, data):
    """Ragged responses in groups of unequal sizes, with both ways to count what was rejected and what is empty."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = rows, seq = sum(sizes), data.draw(st.integers(1, 6))
    mask = data.draw(response_masks(shape))
    kept = data.draw(masks((rows, data.draw(st.sampled_from([1, seq])))))
    constant = data.draw(st.none() | floats(1, 9)) if aggregation == "token_mean" else CONSTANT
    options = {"kept": kept, "rejected_tokens": data.draw(WAYS_TO_COUNT), "empty_responses": data.draw(WAYS_TO_COUNT)}
    if aggregation == "sequence":
        weights = compute_sequence_weights(mask, **options)
    else:
        weights = compute_token_weights(mask, aggregation, normalize_constant=constant, group_sizes=sizes, **options)
    lists = mask.tolist(), kept.expand(shape).tolist()
    ways = options["rejected_tokens"], options["empty_responses"]
    expected = oracle.weights(aggregation, *lists, constant, sizes, *ways)
    assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@EACH
@fewer
@given(data=st.data())
def test_rejected_tokens_leave_loss(name, aggregation, data):
    """Their gradient is exactly 0, and so is that of a response of which none is kept."""
    case = data.draw(cases(name))
    rows, seq = case.mask.shape
    columns = 1 if data.draw(st.booleans()) else seq
    kept = data.draw(masks((rows, columns)))
    rejected, empty = data.draw(WAYS_TO_COUNT), data.draw(WAYS_TO_COUNT)
    weights = weights_of(aggregation, case, kept=kept, rejected_tokens=rejected, empty_responses=empty)
    wide = kept.expand(rows, seq)
    _, gradient, _ = run(name, case, weights)
    if name not in OF_RESPONSES:
        assert (gradient[~(case.mask & wide)] == 0.0).all()
    assert (gradient[~(case.mask & wide).any(dim=1)] == 0.0).all()


@EACH_MEMBER
@fewer
@given(data=st.data())
def test_objective_on_policy_is_reinforce(name, data):
    """At pi = pi_old no bound binds, and each slope is -A; of a mean over a response, its share of it."""
    case = data.draw(cases(name))
    case = replace(case, policy=case.old, penalized=torch.zeros_like(case.mask))
    if name == "compute_cross_entropy_loss":
        case = replace(case, advantages=torch.ones_like(case.advantages))
    policy = case.policy.clone().requires_grad_()
    losses, metadata = losses_of(name, case, policy)
    losses.sum().backward()
    lengths = case.mask.sum(dim=1, keepdim=True).clamp(min=1).double()
    share = 1 / lengths if name in OF_RESPONSES - {"compute_luspo_loss"} else torch.ones_like(lengths)
    expected = torch.where(case.mask, -case.advantages * share, 0.0)
    assert_close(policy.grad, expected.to(policy.grad), rtol=1e-12, atol=1e-12)
    assert not any(value.any() for value in metadata.values())


@EACH_MEMBER
def test_sequence_loss_with_token_weights_raises(name):
    """Length weighting by accident cannot happen: the shapes do not fit, and the error says so."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    hyper = dict.fromkeys(PARAMETERS[name] - TENSORS, 0.2) | {"ratio_high": 5.0, "dual_clip": None}
    hyper |= {"positive": (2.0, 3.0), "negative": (3.0, 2.0)}
    case = Case(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1), mask, mask, [2], hyper)
    losses, _ = losses_of(name, case)
    right, wrong = compute_token_weights(mask, "token_mean"), compute_sequence_weights(mask)
    if name in OF_RESPONSES:
        right, wrong = wrong, right
    sum_weighted_losses(losses, right)
    with pytest.raises(ValueError, match="losses of whole responses need compute_sequence_weights"):
        sum_weighted_losses(losses, wrong)
