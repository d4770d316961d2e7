"""Importance ratios, KL estimates, selections, shaping and diagnostics against their definitions."""

import math
import sys
from fractions import Fraction
from itertools import combinations, product
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import grpo_core as g
from grpo_core.losses._ratios import clamp_log_ratio
from tests.oracle.objectives import held
from tests.strategies import GARBAGE, SHAPES, floats, masks, response_masks, tensors

pytestmark = pytest.mark.usefixtures("each_way")

MEASURES = pytest.mark.parametrize("measure", get_args(g.Divergence))
LEVELS = pytest.mark.parametrize("level", get_args(g.ImportanceLevel))
ESTIMATORS = pytest.mark.parametrize("estimator", get_args(g.KLEstimator))


@st.composite
def pairs(draw, wild: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Two log-probs of the same tokens and a mask, with garbage where it is False."""
    shape = draw(SHAPES)
    first, mask = draw(tensors(shape, floats(-4, 0))), draw(response_masks(shape))
    apart = draw(tensors(shape, floats(-30, 30) if wild else floats(-1, 1)))
    first, second = torch.where(mask, first, draw(tensors(shape, GARBAGE))), torch.where(mask, first + apart, math.nan)
    return first, second, mask


def tokens(mask: Tensor, *parts: Tensor) -> list[list[tuple]]:
    """The response tokens of each row, a tuple of floats each."""
    return [list(zip(*(part[row][mask[row]].tolist() for part in parts), strict=True)) for row in range(len(mask))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamp_log_ratio_extreme_value_is_held_with_gradient(dtype):
    """Exactly 20, where an addition of large numbers would have rounded it away; with a gradient of 1."""
    wild = torch.tensor([1e3, 1e8, 1e30, -1e9, -3.5, 0.0, math.inf, -math.inf], dtype=dtype, requires_grad=True)
    held_values = clamp_log_ratio(wild)
    assert held_values.tolist() == [20.0, 20.0, 20.0, -20.0, -3.5, 0.0, 20.0, -20.0]
    held_values.sum().backward()
    assert wild.grad.tolist()[:6] == [1.0] * 6
    assert wild.grad.isfinite().all()


# Importance.


@LEVELS
@given(pairs(wild=True))
def test_compute_importance_ratios_by_definition(level, case):
    old, sampler, mask = case
    ratios = g.compute_importance_ratios(old.requires_grad_(), sampler, mask, level)
    assert not ratios.requires_grad
    for row, pair in enumerate(tokens(mask, old, sampler)):
        gaps = [a - b for a, b in pair]
        if level == "token":
            expected = torch.zeros(mask.shape[1], dtype=torch.float64)
            expected[mask[row]] = torch.tensor([math.exp(held(gap)) for gap in gaps], dtype=torch.float64)
        else:
            total = math.fsum(gaps) / (max(1, len(gaps)) if level == "geometric" else 1)
            expected = torch.tensor([math.exp(held(total))], dtype=torch.float64)
        assert_close(ratios[row], expected, rtol=1e-9, atol=0)


@LEVELS
@given(pairs())
def test_importance_of_samplers_own_log_probs_is_exactly_one(level, case):
    """Bypass: with the sampler in the place of the old policy a second correction is one of exactly 1."""
    _, sampler, mask = case
    ratios = g.compute_importance_ratios(sampler, sampler.clone(), mask, level)
    assert (ratios[mask if level == "token" else mask.any(1)] == 1).all()
    diagnosis = g.describe_mismatch(sampler, sampler.clone(), mask)
    assert diagnosis["mismatch_mean"] == diagnosis["mismatch_max"] == diagnosis["mismatch_kl"] == 0
    assert diagnosis["mismatch_ess"] == (1.0 if mask.any() else 0.0)


def divergence_of(measure: str, p: float, q: float) -> float:
    """How far two log-probs of a token are apart."""
    d = held(p - q)
    if measure == "binary_kl":
        rest, other = 1 - math.exp(q) + 1e-8, 1 - math.exp(p) + 1e-8
        return max(0.0, math.exp(q) * (q - p) + (1 - math.exp(q)) * math.log(rest / other))
    return {
        "total_variation": abs(math.exp(p) - math.exp(q)),
        "k2": (p - q) ** 2 / 2,
        "k3": math.exp(d) - 1 - d,
    }[measure]


@MEASURES
@LEVELS
@given(case=pairs())
def test_compute_importance_divergences_by_definition(measure, level, case):
    old, sampler, mask = case
    sampler = torch.where(mask, sampler.clamp(max=0.0), math.nan)
    found = g.compute_importance_divergences(old.requires_grad_(), sampler, mask, measure, level)
    assert not found.requires_grad
    assert (found >= 0).all()
    for row, pair in enumerate(tokens(mask, old, sampler)):
        values = [divergence_of(measure, p, q) for p, q in pair]
        if level == "token":
            expected = torch.zeros(mask.shape[1], dtype=torch.float64)
            expected[mask[row]] = torch.tensor(values, dtype=torch.float64)
        else:
            total = math.fsum(values) / (max(1, len(values)) if level == "geometric" else 1)
            expected = torch.tensor([total], dtype=torch.float64)
        assert_close(found[row], expected, rtol=1e-7, atol=1e-12)


@MEASURES
@given(case=pairs(wild=True))
def test_importance_divergences_of_equal_policies_are_zero(measure, case):
    """And those of wild ratios finite, so that a gate with a bound of 0 keeps exactly what did not move."""
    old, sampler, mask = case
    same = g.compute_importance_divergences(old.float(), old.float(), mask, measure, "token")
    assert (same == 0).all()
    sampler = torch.where(mask, sampler.clamp(max=0.0), math.nan)
    moved = g.compute_importance_divergences(old, sampler, mask, measure, "token")
    assert moved.isfinite().all()
    assert torch.equal(g.keep_within_bounds(moved, low=0.0, high=0.0)[mask], (old == sampler)[mask])


@MEASURES
def test_importance_divergences_of_close_policies_are_not_negative(measure):
    """In float32, the two terms of the binary KL almost cancel; a gate from 0 on must not reject what did not move."""
    old = torch.linspace(-4, -0.01, 4000)[None]
    mask = torch.ones_like(old, dtype=torch.bool)
    for gap in (1e-7, 1e-6, 1e-5, 1e-4):
        assert (g.compute_importance_divergences(old, old + gap, mask, measure, "token") >= 0).all()


BOUNDS = st.tuples(floats(0, 1), floats(1, 3))


@given(tensors((3, 4), floats(0, 4)), BOUNDS)
def test_truncation_masking_and_rejection_match_definition(ratios, bounds):
    low, high = bounds
    given_ratios = ratios.clone()
    cut = g.truncate_importance_weights(ratios, low=low, high=high)
    masked = g.mask_importance_weights(ratios, low=low, high=high)
    kept = g.keep_within_bounds(ratios, low=low, high=high)
    for ratio, one, other, keeps in zip(*(x.flatten().tolist() for x in (ratios, cut, masked, kept)), strict=True):
        inside = low <= ratio <= high
        assert one == (ratio if inside else low if ratio < low else high)
        assert other == (ratio if inside else 0.0)
        assert keeps == inside
    assert torch.equal(ratios, given_ratios)
    wider = g.truncate_importance_weights(ratios, low=low, high=high + 1)
    assert (wider >= cut).all()
    tracked = ratios.clone().requires_grad_()
    assert not g.truncate_importance_weights(tracked, high=high).requires_grad
    assert not g.mask_importance_weights(tracked, high=high).requires_grad
    assert torch.equal(g.truncate_importance_weights(ratios, high=high), ratios.clamp(max=high))


@given(data=st.data(), columns=st.sampled_from(["one", "all"]))
def test_self_normalize_weights_and_effective_sample_size_match_definition(data, columns):
    shape = data.draw(SHAPES)
    mask = data.draw(response_masks(shape))
    counted = mask if columns == "all" or shape[1] == 1 else mask.any(dim=1, keepdim=True)
    weights = data.draw(tensors(tuple(counted.shape), floats(0, 4)))
    spoiled = torch.where(counted, weights, math.nan).requires_grad_()
    kept = weights[counted].tolist()
    normalized, share = g.self_normalize_weights(spoiled, mask), g.effective_sample_size(spoiled, mask)
    assert not normalized.requires_grad
    assert not share.requires_grad
    mean = math.fsum(kept) / len(kept) if kept else 0.0
    expected = [value / mean if mean else 0.0 for value in kept]
    assert_close(normalized[counted].tolist(), expected, rtol=1e-9, atol=0)
    assert (normalized[~counted] == 0).all()
    squares = math.fsum(value**2 for value in kept)
    ess = math.fsum(kept) ** 2 / len(kept) / squares if squares else 0.0
    assert_close(share.item(), ess, rtol=1e-9, atol=0)
    assert 0 <= share.item() <= 1 + 1e-12


@given(pairs(wild=True))
def test_describe_mismatch_matches_definition(case):
    old, sampler, mask = case
    gaps = [a - b for row in tokens(mask, old, sampler) for a, b in row]
    n = max(1, len(gaps))
    ratios = [math.exp(held(gap)) for gap in gaps]
    squares = math.fsum(ratio**2 for ratio in ratios)
    expected = {
        "mismatch_mean": math.fsum(map(abs, gaps)) / n,
        "mismatch_max": max(map(abs, gaps), default=0.0),
        "mismatch_kl": math.fsum(ratio - 1 - held(gap) for ratio, gap in zip(ratios, gaps, strict=True)) / n,
        "mismatch_ess": math.fsum(ratios) ** 2 / n / squares if gaps else 0.0,
    }
    found = g.describe_mismatch(old.requires_grad_(), sampler, mask)
    assert set(found) == set(expected)
    for key, value in found.items():
        assert_close(value.item(), expected[key], rtol=1e-9, atol=1e-12)
        assert not value.requires_grad


# KL.


def kl_of(estimator: str, policy: float, reference: float, old: float) -> tuple[float, float]:
    """Value and slope in the policy's log-prob."""
    x = reference - policy
    ratio = math.exp(held(policy - old))
    k3, slope = math.exp(held(x)) - 1 - x, 1 - math.exp(held(x))
    return {
        "k1": (-x, 1.0),
        "k2": (x * x / 2, -x),
        "k3": (k3, slope),
        "abs": (abs(x), -math.copysign(1.0, x) if x else 0.0),
        "ratio_k3": (ratio * k3, ratio * k3 + ratio * slope),
    }[estimator]


@ESTIMATORS
@given(case=pairs(wild=True), data=st.data())
def test_estimate_kl_by_definition(estimator, case, data):
    policy, reference, mask = case
    old = torch.where(mask, policy + data.draw(tensors(tuple(mask.shape), floats(-1, 1))), math.nan)
    for tensor in (policy, reference, old):
        tensor.requires_grad_()
    kl = g.estimate_kl(policy, reference, estimator, old_log_probs=old, response_mask=mask)
    kl.sum().backward()
    assert reference.grad is old.grad is None
    assert (kl[~mask] == 0).all()
    assert (policy.grad[~mask] == 0).all()
    for row, triples in enumerate(tokens(mask, policy.detach(), reference.detach(), old.detach())):
        expected = [kl_of(estimator, *triple) for triple in triples]
        assert_close(kl[row][mask[row]].tolist(), [value for value, _ in expected], rtol=1e-8, atol=1e-10)
        assert_close(policy.grad[row][mask[row]].tolist(), [slope for _, slope in expected], rtol=1e-8, atol=1e-10)
    if estimator != "k1":
        assert (kl >= -1e-12).all()


@ESTIMATORS
@given(tensors((2, 3), floats(-4, 0)))
def test_estimate_kl_of_reference_itself_is_zero(estimator, log_probs):
    assert (g.estimate_kl(log_probs, log_probs.clone(), estimator) == 0).all()


def test_estimate_kl_ratio_k3_without_old_log_probs_uses_policy():
    policy = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    alone = g.estimate_kl(policy, reference, "ratio_k3")
    same = g.estimate_kl(policy, reference, "ratio_k3", old_log_probs=policy.detach())
    assert torch.equal(alone, same)
    (one,) = torch.autograd.grad(alone.sum(), policy)
    (other,) = torch.autograd.grad(same.sum(), policy)
    assert torch.equal(one, other)


@given(data=st.data(), discount=st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_compute_reward_to_go_matches_definition(data, discount):
    """Any mask, with holes: what stands in a hole is no step."""
    shape = data.draw(SHAPES)
    mask = data.draw(masks(shape))
    rewards = torch.where(mask, data.draw(tensors(shape, floats(-2, 2))), data.draw(tensors(shape, GARBAGE)))
    returns = g.compute_reward_to_go(rewards.requires_grad_(), mask, discount=discount)
    assert not returns.requires_grad
    assert (returns[~mask] == 0).all()
    for row, steps in enumerate(tokens(mask, rewards.detach())):
        values = [step[0] for step in steps]
        expected = [
            math.fsum(discount**ahead * value for ahead, value in enumerate(values[start:]))
            for start in range(len(values))
        ]
        assert_close(returns[row][mask[row]].tolist(), expected, rtol=1e-9, atol=1e-9)


# Selection.


def chosen_by_rank(values: list[float], wanted: int) -> set[int]:
    """Places of the largest values, ties with the last one included."""
    if wanted == 0 or not values:
        return set()
    threshold = sorted(values, reverse=True)[:wanted][-1]
    return {place for place, value in enumerate(values) if value >= threshold}


@given(data=st.data(), fraction=st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]))
def test_select_high_covariance_matches_definition(data, fraction):
    rows, seq = shape = data.draw(SHAPES)
    mask = data.draw(response_masks(shape))
    columns = data.draw(st.sampled_from([1, seq]))
    advantages = data.draw(tensors((rows, columns), floats(-2, 2)))
    log_probs = torch.where(mask, data.draw(tensors(shape, floats(-4, 0))), data.draw(tensors(shape, GARBAGE)))
    low, high = data.draw(st.sampled_from([(0.0, math.inf), (0.5, 2.0)]))
    chosen = g.select_high_covariance(advantages, log_probs, mask, fraction, low=low, high=high)
    assert not (chosen & ~mask).any()
    flat = [token for row in tokens(mask, advantages.expand(shape), log_probs) for token in row]
    n = max(1, len(flat))
    a_mean, p_mean = math.fsum(a for a, _ in flat) / n, math.fsum(p for _, p in flat) / n
    covariances = [(a - a_mean) * (p - p_mean) for a, p in flat]
    assume(all(abs(c - edge) > 1e-9 for c in covariances for edge in (low, high) if c != 0))
    gaps = [abs(x - y) for x, y in combinations(covariances, 2)]
    assume(all(gap == 0 or gap > 1e-9 for gap in gaps))
    inside = [place for place, c in enumerate(covariances) if low + 1e-12 < c < high]
    wanted = max(1, math.floor(Fraction(str(fraction)) * len(flat))) if fraction else 0
    best = {inside[rank] for rank in chosen_by_rank([covariances[place] for place in inside], wanted)}
    assert chosen[mask].nonzero().flatten().tolist() == sorted(best)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    again = g.select_high_covariance(advantages[order], log_probs[order], mask[order], fraction, low=low, high=high)
    assert torch.equal(again, chosen[order])


@given(data=st.data(), fraction=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_select_high_entropy_matches_definition(data, fraction):
    shape = data.draw(SHAPES)
    mask = data.draw(response_masks(shape))
    entropy = torch.where(mask, data.draw(tensors(shape, floats(0, 3))), data.draw(tensors(shape, GARBAGE)))
    chosen = g.select_high_entropy(entropy.requires_grad_(), mask, fraction)
    assert not (chosen & ~mask).any()
    values = entropy[mask].tolist()
    expected = chosen_by_rank(values, math.ceil(Fraction(str(fraction)) * len(values)))
    assert set(chosen[mask].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(("fraction", "n", "wanted"), [(0.07, 100, 7), (0.55, 20, 11), (0.29, 100, 29)])
def test_selected_share_ignores_rounding_of_fraction(fraction, n, wanted):
    """0.07 * 100 comes out above 7 and 0.29 * 100 below 29: neither is a token more or less."""
    values, everything = torch.arange(n).double()[None], torch.ones(1, n, dtype=torch.bool)
    assert g.select_high_entropy(values, everything, fraction).sum() == wanted
    # Cubed, lest two tokens at the same distance from the mean tie.
    chosen = g.select_high_covariance(values, values**3, everything, fraction, low=-math.inf)
    assert chosen.sum() == wanted


@given(case=pairs(), data=st.data(), threshold=floats(-0.5, 0.5))
def test_keep_on_policy_sequences_matches_definition(case, data, threshold):
    policy, behavior, mask = case
    advantages = data.draw(tensors((len(mask), 1), floats(-2, 2)))
    kept = g.keep_on_policy_sequences(advantages, policy, behavior, mask, threshold)
    for row, pair in enumerate(tokens(mask, policy, behavior)):
        gap = math.fsum(b - p for p, b in pair) / max(1, len(pair))
        assume(abs(gap - threshold) > 1e-9)
        assert kept[row, 0].item() == (not (advantages[row, 0] < 0 and gap > threshold))


@given(data=st.data(), case=pairs(wild=True), threshold=st.sampled_from([0.0, 0.04, 0.25, 1.0, 1e4]))
def test_keep_within_second_moment_matches_definition(data, case, threshold):
    """The token of largest square leaves, with all that tie with it, until the mean of the others is small enough."""
    policy, behavior, mask = case
    near = data.draw(masks(tuple(mask.shape)))
    behavior = torch.where(near, policy + (behavior - policy) / 64, behavior)
    kept = g.keep_within_second_moment(policy.requires_grad_(), behavior, mask, threshold)
    squares = [(p - b) ** 2 for row in tokens(mask, policy, behavior) for p, b in row]
    left = sorted(squares)
    while left and math.fsum(left) / len(left) > threshold:
        left = [square for square in left if square < left[-1]]
    assert not (kept & ~mask).any()
    assert kept[mask].tolist() == [square in left for square in squares]
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    assert torch.equal(
        g.keep_within_second_moment(policy[order], behavior[order], mask[order], threshold), kept[order]
    )
    wider = g.keep_within_second_moment(policy, behavior, mask, 2 * threshold)
    assert not (kept & ~wider).any()


@pytest.mark.parametrize("wild", [math.nan, -math.inf, math.inf])
def test_keep_within_second_moment_drops_infinite_ratio_alone(wild):
    policy, mask = torch.tensor([[-1.0, wild, -1.1]]), torch.ones(1, 3).bool()
    kept = g.keep_within_second_moment(policy, torch.full((1, 3), -1.0), mask, 0.01)
    assert kept.tolist() == [[True, False, True]]
    assert not g.keep_within_second_moment(policy, policy, ~mask, 0.01).any()


@given(data=st.data())
def test_drop_truncated_responses_drops_whole_rows(data):
    shape = data.draw(SHAPES)
    mask, truncated = data.draw(masks(shape)), data.draw(masks((shape[0],)))
    given_mask = mask.clone()
    smaller = g.drop_truncated_responses(mask, truncated)
    assert torch.equal(mask, given_mask)
    assert not smaller[truncated].any()
    assert torch.equal(smaller[~truncated], mask[~truncated])


# Shaping.


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_compute_soft_overlong_penalty_matches_definition(lengths, longest, data):
    buffer = data.draw(st.integers(0, longest))
    penalty = g.compute_soft_overlong_penalty(torch.tensor(lengths), longest, buffer)
    for n, value in zip(lengths, penalty.tolist(), strict=True):
        if n <= longest - buffer:
            expected = 0.0
        elif n <= longest:
            expected = (longest - buffer - n) / buffer
        else:
            expected = -1.0
        assert_close(value, expected, rtol=1e-6, atol=0)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 40), floats(-10, 2), floats(-10, 2))
def test_compute_cosine_length_reward_matches_definition(lengths, longest, start, end):
    reward = g.compute_cosine_length_reward(torch.tensor(lengths), longest, start, end)
    for n, value in zip(lengths, reward.tolist(), strict=True):
        expected = end + (start - end) * math.cos(math.pi * min(n, longest) / longest / 2) ** 2
        assert_close(value, expected, rtol=1e-5, atol=1e-5)


@given(floats(0, 1), floats(0, 3), floats(0, 3), floats(0, 1), floats(0, 0.5), floats(0.5, 1))
def test_adapt_entropy_coefficient_follows_target(coefficient, entropy, target, step, low, high):
    new = g.adapt_entropy_coefficient(coefficient, entropy, target, step=step, low=low, high=high)
    assert low <= new <= high
    wanted = coefficient + step if entropy <= target else coefficient - step
    assert new == sorted([low, wanted, high])[1]


# Diagnostics.


@given(st.data())
def test_estimate_pass_at_k_is_mean_over_subsets(data):
    samples = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    n_samples, k = torch.tensor(samples), data.draw(st.integers(1, min(samples)))
    right = torch.tensor([data.draw(st.integers(0, n)) for n in samples])
    values = g.estimate_pass_at_k(right, n_samples, k)
    for c, n, value in zip(right.tolist(), samples, values.tolist(), strict=True):
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert_close(value, sum(map(any, subsets)) / len(subsets), rtol=1e-12, atol=0)
        assert g.estimate_pass_at_k(torch.tensor([c]), n, k).item() == value
    if k < min(samples):
        assert (g.estimate_pass_at_k(right, n_samples, k + 1) >= values).all()


@pytest.mark.parametrize(("c", "n", "k"), [(48, 2048, 1000), (1, 3, 1), (1, 1_000_000, 1), (3, 7, 2)])
def test_estimate_pass_at_k_rounds_once(c, n, k):
    """Where a product of floats, or one minus a quotient, would have lost digits."""
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert g.estimate_pass_at_k(torch.tensor([c]), n, k).item() == float(exact)


def test_mean_interval_of_equal_values_contains_mean():
    """At 0 and 1 the rounded ends lie on the wrong side of the mean for many sizes."""
    for n in range(1, 1500):
        assert g.estimate_mean_interval(torch.ones(n))[2] == 1.0
        assert g.estimate_mean_interval(torch.zeros(n))[1] == 0.0


@given(st.lists(floats(0, 1), min_size=1, max_size=12), st.sampled_from([0.8, 0.95]))
def test_estimate_mean_interval_matches_wilson(values, confidence):
    """Its ends are the p from which the mean found lies z standard deviations of a p-coin away."""
    mean, low, high = g.estimate_mean_interval(torch.tensor(values, dtype=torch.float64), confidence=confidence)
    assert 0 <= low <= mean <= high <= 1
    assert low < high
    n = len(values)
    center = math.fsum(values) / n
    assert_close(mean, center)
    z = {0.8: 1.2815515655446004, 0.95: 1.959963984540054}[confidence]
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:  # the ends solve |center - p| = z * sqrt(p (1 - p) / m)
            assert_close(abs(center - end), z * math.sqrt(end * (1 - end) / n), rtol=1e-6, atol=1e-9)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6), min_size=1, max_size=4))
def test_compute_majority_accuracy_matches_definition(answers):
    verdicts = [[answer == "a" for answer in row] for row in answers]
    for row, value in zip(answers, g.compute_majority_accuracy(answers, verdicts).tolist(), strict=True):
        counts = {letter: row.count(letter) for letter in "abc"}
        top = max(counts.values())
        winners = [letter for letter, count in counts.items() if count == top and count]
        assert value == (winners.count("a") / len(winners) if winners else 0.0)


@given(st.lists(st.integers(-3, 3), max_size=10))
def test_compute_sign_flip_p_value_counts_all_signs(differences):
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    extreme = Fraction(sum(abs(found) >= abs(sum(differences)) for found in sums), len(sums))
    found = g.compute_sign_flip_p_value(torch.tensor(differences, dtype=torch.long))
    assert found == pytest.approx(float(extreme), rel=1e-12)
    assert 0 < found <= 1


@given(wins=st.integers(0, 300), losses=st.integers(0, 300), ties=st.integers(0, 5))
def test_compute_sign_flip_p_value_of_single_responses_is_mcnemars_test(wins, losses, ties):
    """Twice the tail of a fair coin thrown once for each question on which the two disagree."""
    n, least = wins + losses, min(wins, losses)
    tail = Fraction(2 * sum(math.comb(n, k) for k in range(least + 1)), 2**n)
    differences = torch.tensor([1] * wins + [-1] * losses + [0] * ties, dtype=torch.int8)
    assert g.compute_sign_flip_p_value(differences) == pytest.approx(min(1.0, float(tail)), rel=1e-9)


@pytest.mark.parametrize("signs", [[1] * 1200, [1] * 2000 + [-1] * 200, [5] * 1100])
def test_compute_sign_flip_p_value_is_never_zero(signs):
    assert g.compute_sign_flip_p_value(torch.tensor(signs)) == sys.float_info.min
    assert g.compute_sign_flip_p_value(torch.tensor(signs[:400])) >= 2.0**-399


@given(data=st.data(), best=st.sampled_from([1.0, 0.7, 0.1]))
def test_describe_silent_groups_counts_each_group_once(data, best):
    """Three times 0.7 have a mean that is not 0.7; rewards of -1 and 1 one of 0, and yet a signal."""
    reward = floats(-1, 1).map(lambda value: min(value, best)) | st.sampled_from([math.nan, 0.0, best])
    constant = st.builds(lambda value, size: [value] * size, reward, st.integers(1, 6))
    group = st.lists(reward, min_size=1, max_size=4) | constant
    groups = data.draw(st.lists(group, min_size=1, max_size=5))
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    sizes = [len(group) for group in groups]
    signal = g.find_signal_groups(rewards, sizes).tolist()
    counts = {"right": 0, "wrong": 0, "other": 0}
    for group, has_signal in zip(groups, signal, strict=True):
        values = {reward for reward in group if not math.isnan(reward)}
        assert has_signal == (len(values) > 1)
        if len(values) <= 1:
            kind = "right" if values == {best} else "wrong" if values and max(values) <= 0 else "other"
            counts[kind] += 1
    expected = {f"groups_all_{name}": count / len(groups) for name, count in counts.items()}
    assert g.describe_silent_groups(rewards, sizes, best_reward=best) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 123456.7])
def test_describe_silent_groups_ignores_last_bit_of_reward(constant, dtype):
    rewards = torch.full((7,), constant, dtype=dtype)
    rewards[::2] = torch.nextafter(rewards[::2], torch.full_like(rewards[::2], math.inf))
    assert rewards.unique().numel() == 2
    assert not g.find_signal_groups(rewards, 7).any()
    assert g.describe_silent_groups(rewards, 7, best_reward=constant)["groups_all_right"] == 1


@given(data=st.data())
def test_compute_gradient_share_matches_definition(data):
    rows, seq = data.draw(SHAPES)
    gradients, selected = data.draw(tensors((rows, seq), floats(-2, 2))), data.draw(masks((rows,)))
    pulls = [math.fsum(map(abs, row)) for row in gradients.tolist()]
    wanted = math.fsum(pull for pull, keep in zip(pulls, selected.tolist(), strict=True) if keep)
    share = g.compute_gradient_share(gradients.requires_grad_(), selected)
    assert not share.requires_grad
    assert_close(share.item(), wanted / math.fsum(pulls) if any(pulls) else 0.0)
    if any(pulls):
        assert_close((share + g.compute_gradient_share(gradients, ~selected)).item(), 1.0)


# All terms together.


@given(data=st.data(), kl_coef=floats(0, 1), entropy_coef=floats(-1, 1), nll_coef=floats(0, 1))
def test_compose_policy_loss_terms_add_up(data, kl_coef, entropy_coef, nll_coef):
    rows, seq = shape = data.draw(SHAPES)
    columns = data.draw(st.sampled_from([1, seq]))
    names = ("kl", "token_entropy", "nll")
    parts = {name: data.draw(tensors(shape, floats(-2, 2))).requires_grad_() for name in names}
    nll_weights = data.draw(tensors(shape, floats(0, 1)))
    losses = data.draw(tensors((rows, columns), floats(-2, 2))).requires_grad_()
    weights, token_weights = data.draw(tensors((rows, columns), floats(0, 1))), data.draw(tensors(shape, floats(0, 1)))
    importance = data.draw(tensors((rows, data.draw(st.sampled_from([1, columns]))), floats(0, 3))).requires_grad_()
    loss = g.compose_policy_loss(
        losses,
        weights,
        importance_weights=importance,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        token_weights=token_weights,
        nll_coef=nll_coef,
        nll_weights=nll_weights,
        **parts,
    )
    total = 0.0
    for row in range(rows):
        for column in range(columns):
            factor = importance[row, column if importance.shape[1] > 1 else 0].item()
            total += weights[row, column].item() * factor * losses[row, column].item()
        for column in range(seq):
            kl, entropy, nll = (parts[name][row, column].item() for name in names)
            total += token_weights[row, column].item() * (kl_coef * kl - entropy_coef * entropy)
            total += nll_weights[row, column].item() * nll_coef * nll
    assert_close(loss.item(), total, rtol=1e-9, atol=1e-9)
    loss.backward()
    assert importance.grad is None
    assert_close(losses.grad, weights * importance.detach())
    coefficients = {"kl": kl_coef * token_weights, "token_entropy": -entropy_coef * token_weights}
    for name, expected in (coefficients | {"nll": nll_coef * nll_weights}).items():
        found = parts[name].grad
        assert_close(torch.zeros(shape).double() if found is None else found, expected)


@given(data=st.data())
def test_sum_weighted_losses_loss_without_weight_is_never_read(data):
    """Whatever stands where the weight is 0: neither in the sum nor in the gradient, which is exactly 0 there."""
    shape = data.draw(SHAPES)
    losses, weights = data.draw(tensors(shape, floats(-2, 2))), data.draw(tensors(shape, floats(0, 1)))
    weights = torch.where(data.draw(masks(shape)), weights, 0.0)
    spoiled = torch.where(weights == 0, data.draw(tensors(shape, GARBAGE)), losses).requires_grad_()
    loss = g.compose_policy_loss(spoiled, weights, kl=spoiled, kl_coef=2.0, token_weights=weights)
    assert_close(loss.item(), 3 * (weights * losses).sum().item(), rtol=1e-9, atol=1e-9)
    loss.backward()
    assert_close(spoiled.grad, 3 * weights, rtol=1e-12, atol=0)


def test_compose_policy_loss_without_extra_terms_is_policy_loss():
    losses, weights = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    assert g.compose_policy_loss(losses, weights) == 1.0
    unused = torch.full((1, 2), math.nan)
    assert g.compose_policy_loss(losses, weights, kl=unused, token_entropy=unused, nll=unused) == 1.0


@given(case=pairs(wild=True), data=st.data())
def test_describe_policy_update_matches_definition(case, data):
    """Means over response tokens: a flag of a response counts for each of its tokens, a ratio is held."""
    old, policy, mask = case
    flags = {
        "is_clipped": data.draw(masks(tuple(mask.shape))),
        "is_clipped_low": data.draw(masks((len(mask), 1))),
        "is_penalized": data.draw(masks(tuple(mask.shape))),
    }
    gaps = [p - q for row in tokens(mask, policy, old) for p, q in row]
    n = max(1, len(gaps))
    expected = {
        "response_tokens": float(len(gaps)),
        "clip_fraction": (flags["is_clipped"] & mask).sum().item() / n,
        "clip_fraction_low": (flags["is_clipped_low"] & mask).sum().item() / n,
        "penalized_fraction": (flags["is_penalized"] & mask).sum().item() / n,
        "mean_ratio": math.fsum(math.exp(held(gap)) for gap in gaps) / n,
        "approx_kl": math.fsum(math.exp(held(gap)) - 1 - held(gap) for gap in gaps) / n,
    }
    found = g.describe_policy_update(policy.requires_grad_(), mask, flags, old)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert not value.requires_grad
        assert_close(value.item(), expected[name], rtol=1e-6, atol=1e-9)
    assert set(g.describe_policy_update(policy, mask, flags)) == set(expected) - {"mean_ratio", "approx_kl"}
