"""One battery over every advantage estimator. A new function of `rewards` and `group_sizes` is tested unasked."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import (
    compute_best_of_advantages,
    compute_gdpo_advantages,
    compute_gpg_advantages,
    compute_leave_one_out_advantages,
    compute_opo_advantages,
    compute_pass_at_k_advantages,
    compute_pkpo_advantages,
    normalize_group_rewards,
    whiten_over_tokens,
)
from tests.oracle import estimators as oracle
from tests.property.estimators import BINARY, EACH, MEMBERS, UNSCORED, Case, cases
from tests.strategies import GARBAGE, SHAPES, floats, response_masks, tensors


@EACH
@given(data=st.data())
def test_estimator_matches_its_definition(name, data):
    case = data.draw(cases(name))
    advantages = case.call(name)
    assert advantages.isfinite().all()
    assert_close(advantages.tolist(), case.of_oracle(name), rtol=1e-9, atol=1e-9)


@EACH
@given(data=st.data())
def test_estimator_float32_is_accurate_to_rounding(name, data):
    case = data.draw(cases(name))
    advantages = case.call(name, torch.float32)
    assert advantages.dtype == torch.float32
    assert_close(advantages.double(), case.call(name), rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.1, 0.2, 0.7, 1 / 3, 1e-3, 123456.7, 0.0, 1.0])
def test_estimator_constant_group_is_exactly_zero(name, constant, dtype):
    """Decided by the range: the deviation of eight times 0.1 need not be 0. And no eps, to see it."""
    if name in BINARY and constant not in (0.0, 1.0):
        constant = 1.0
    rewards = torch.full((8 + 5 + 2,), constant, dtype=dtype)
    extra = {"advantage_eps": 0.0, "k": 2, "lengths": torch.arange(15), "greedy_rewards": rewards[:3]}
    parameters = inspect.signature(MEMBERS[name]).parameters
    advantages = MEMBERS[name](rewards, [8, 5, 2], **{key: extra[key] for key in parameters if key in extra})
    assert (advantages == 0).all()


@pytest.mark.parametrize("name", sorted(MEMBERS.keys() - BINARY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 1e-3, 123456.7])
def test_estimator_ignores_last_bit_of_reward(name, constant, dtype):
    """A sum of parts in another order gives it; divided by its own deviation it would be as loud as any reward."""
    rewards = torch.full((8 + 5 + 2,), constant, dtype=dtype)
    noisy = rewards.clone()
    noisy[::3] = torch.nextafter(noisy[::3], torch.full_like(noisy[::3], math.inf))
    extra = {"advantage_eps": 0.0, "k": 2, "lengths": torch.arange(15), "greedy_rewards": rewards[:3]}
    parameters = inspect.signature(MEMBERS[name]).parameters
    advantages = MEMBERS[name](noisy, [8, 5, 2], **{key: extra[key] for key in parameters if key in extra})
    assert (noisy != rewards).any()
    assert (advantages == 0).all()


@EACH
@given(data=st.data())
def test_estimator_ignores_unscored_response(name, data):
    """It gets exactly 0, and one more of it changes no other advantage by a bit that matters."""
    case = data.draw(cases(name, unscored=False))
    group = data.draw(st.integers(0, len(case.groups) - 1))
    place = data.draw(st.integers(0, len(case.groups[group])))
    groups = [list(one) for one in case.groups]
    groups[group].insert(place, data.draw(UNSCORED))
    extra = dict(case.extra)
    if "lengths" in extra:
        extra["lengths"] = [list(one) for one in extra["lengths"]]
        extra["lengths"][group].insert(place, 3)
    advantages = replace(case, groups=groups, extra=extra).call(name).tolist()
    assert advantages.pop(sum(map(len, groups[:group])) + place) == 0.0
    assert_close(advantages, case.call(name).tolist(), rtol=1e-12, atol=1e-12)


@EACH
@given(data=st.data())
def test_estimator_ignores_order_of_groups_and_members(name, data):
    case = data.draw(cases(name))
    order = data.draw(st.permutations(range(len(case.groups))))
    inner = [data.draw(st.permutations(range(len(group)))) for group in case.groups]
    extra = dict(case.extra)
    if "lengths" in extra:
        extra["lengths"] = [[extra["lengths"][g][i] for i in inner[g]] for g in order]
    if "greedy_rewards" in extra:
        extra["greedy_rewards"] = [extra["greedy_rewards"][g] for g in order]
    shuffled = Case([[case.groups[g][i] for i in inner[g]] for g in order], extra).call(name).tolist()
    starts = [sum(case.sizes[:g]) for g in range(len(case.groups))]
    original = case.call(name).tolist()
    assert_close(shuffled, [original[starts[g] + i] for g in order for i in inner[g]], rtol=1e-9, atol=1e-9)


@EACH
def test_estimator_is_detached(name):
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    extra = {"k": 1, "lengths": torch.ones(4, dtype=torch.long), "greedy_rewards": torch.ones(2, requires_grad=True)}
    parameters = inspect.signature(MEMBERS[name]).parameters
    given_ = {key: extra[key] for key in parameters if key in extra}
    advantages = MEMBERS[name](rewards, 2, **given_)
    assert not advantages.requires_grad
    assert torch.equal(advantages, MEMBERS[name](rewards, [2, 2], **given_))
    assert MEMBERS[name](
        torch.zeros(0), [], **{k: v[:0] if torch.is_tensor(v) else v for k, v in given_.items()}
    ).shape == (0,)


CENTERED = ["normalize_group_rewards", "compute_leave_one_out_advantages", "compute_batch_std_advantages"]


@pytest.mark.parametrize("name", [*CENTERED, "compute_gpg_advantages", "compute_maxrl_advantages"])
@given(data=st.data())
def test_estimator_advantages_of_group_sum_to_zero(name, data):
    case = data.draw(cases(name))
    for part in case.call(name).split(case.sizes):
        assert_close(part.sum().item(), 0.0, rtol=0, atol=1e-9 * max(1.0, part.abs().max().item()))


@pytest.mark.parametrize(
    "name", [*CENTERED, "compute_gpg_advantages", "compute_opo_advantages", "compute_pkpo_advantages"]
)
@given(data=st.data(), shift=floats(-4, 4) | st.sampled_from([-8192.0, 8192.0]))
def test_estimator_ignores_shift_of_rewards(name, data, shift):
    case = data.draw(cases(name))
    moved = replace(case, groups=[[reward + shift for reward in group] for group in case.groups])
    assert_close(moved.call(name), case.call(name), rtol=1e-9, atol=1e-9)


@given(cases("normalize_group_rewards"))
def test_leave_one_out_is_multiple_of_centering(case):
    rewards = torch.tensor([r for group in case.groups for r in group]).double()
    centered = normalize_group_rewards(rewards, case.sizes, normalize_by_std=False).split(case.sizes)
    for group, one, other in zip(
        case.groups, compute_leave_one_out_advantages(rewards, case.sizes).split(case.sizes), centered, strict=True
    ):
        n = sum(map(math.isfinite, group))
        assert_close(one, other * n / max(1, n - 1), rtol=1e-9, atol=1e-12)


@given(cases("compute_pass_at_k_advantages"))
def test_pass_at_1_is_grpo_with_population_std(case):
    rewards = torch.tensor([r for group in case.groups for r in group]).double()
    expected = normalize_group_rewards(rewards, case.sizes, advantage_eps=0.0, correction=0)
    assert_close(compute_pass_at_k_advantages(rewards, case.sizes, 1), expected, rtol=1e-9, atol=1e-12)


@given(cases("compute_best_of_advantages", unscored=False))
def test_pkpo_lies_between_leave_one_out_and_best_of_all(case):
    for group in case.groups:
        rewards = torch.tensor(group).double()
        assert_close(
            compute_pkpo_advantages(rewards, len(group), 1), compute_leave_one_out_advantages(rewards, len(group))
        )
        expected = len(group) * compute_best_of_advantages(rewards, len(group))
        assert_close(compute_pkpo_advantages(rewards, len(group), len(group)), expected, rtol=1e-9, atol=1e-12)


@given(cases("compute_gpg_advantages"))
def test_gpg_is_centering_scaled_to_whole_batch(case):
    rewards = torch.tensor([r for group in case.groups for r in group]).double()
    alone = [compute_gpg_advantages(part, len(part)) for part in rewards.split(case.sizes)]
    assert_close(torch.cat(alone), normalize_group_rewards(rewards, case.sizes, normalize_by_std=False))


@given(cases("compute_opo_advantages"))
def test_compute_opo_length_weighted_advantages_sum_to_zero(case):
    rewards = torch.tensor([r for group in case.groups for r in group]).double()
    lengths = torch.tensor([n for group in case.extra["lengths"] for n in group])
    advantages = compute_opo_advantages(rewards, case.sizes, lengths)
    for part in (lengths * advantages).split(case.sizes):
        assert_close(part.sum().item(), 0.0, rtol=0, atol=1e-9)


@given(cases("normalize_group_rewards"))
def test_normalized_advantage_stays_within_bound(case):
    """|A| <= (G - 1) / sqrt(G), reached by one right answer among G."""
    rewards = torch.tensor([r for group in case.groups for r in group]).double()
    for part in normalize_group_rewards(rewards, case.sizes, advantage_eps=0.0).split(case.sizes):
        assert part.abs().max().item() <= (len(part) - 1) / math.sqrt(len(part)) + 1e-9


@given(data=st.data(), eps=st.sampled_from([0.0, 1e-4, 0.1]))
def test_gdpo_matches_definition(data, eps):
    sizes = data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    n_rewards = data.draw(st.integers(1, 3))
    reward = floats(-2, 2) | UNSCORED if data.draw(st.booleans()) else st.sampled_from([0.0, 1.0])
    table = data.draw(
        st.lists(st.lists(reward, min_size=n_rewards, max_size=n_rewards), min_size=sum(sizes), max_size=sum(sizes))
    )
    weights = data.draw(st.none() | st.lists(floats(-1, 2), min_size=n_rewards, max_size=n_rewards))
    rewards = torch.tensor(table, dtype=torch.float64)
    actual = compute_gdpo_advantages(rewards, sizes, reward_weights=weights, advantage_eps=eps)
    columns = []
    for column in rewards.T:
        parts = [part.tolist() for part in column.split(sizes)]
        columns.append([[r if math.isfinite(r) else None for r in part] for part in parts])
    assert_close(actual.tolist(), oracle.gdpo(columns, weights or [1.0] * n_rewards, eps), rtol=1e-8, atol=1e-8)
    assert actual.isfinite().all()


@given(st.lists(tensors((3, 2), floats(-2, 2)), min_size=1, max_size=3), floats(-2, 2))
def test_gdpo_zero_signal_group_is_zero(groups, constant):
    """Exactly 0, though the mean of the sums, 0 by their making, need not be 0 in floating point."""
    silent = torch.full((4, 2), constant, dtype=torch.float64)
    advantages = compute_gdpo_advantages(torch.cat([*groups, silent]), [3] * len(groups) + [4])
    assert (advantages[-4:] == 0).all()


def test_gdpo_weights_signs_of_two_rewards():
    """Normalized, (1, 0) and (0, 100) are opposites: the weight decides."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    for weights, sign in (([2.0, 1.0], 1), ([1.0, 2.0], -1)):
        assert compute_gdpo_advantages(rewards, 2, reward_weights=weights).sign().tolist() == [sign, -sign]


@given(data=st.data(), eps=st.sampled_from([0.0, 1e-8, 0.1]), correction=st.sampled_from([0, 1]))
def test_whiten_over_tokens_matches_definition(data, eps, correction):
    rows, seq = shape = data.draw(SHAPES)
    mask = data.draw(response_masks(shape))
    columns = data.draw(st.sampled_from([1, seq]))
    values = data.draw(tensors((rows, columns), floats(-2, 2)))
    hidden = ~mask if columns == seq else ~mask.any(dim=1, keepdim=True)
    spoiled = torch.where(hidden, data.draw(tensors((rows, columns), GARBAGE)), values).requires_grad_()
    white = whiten_over_tokens(spoiled, mask, advantage_eps=eps, correction=correction)
    assert white.shape == values.shape
    assert not white.requires_grad
    expected = oracle.whiten(values.expand(shape).tolist(), mask.tolist(), eps, correction)
    assert_close(torch.where(mask, white, 0.0), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert (white[hidden] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 123456.7])
def test_whiten_over_tokens_constant_is_exactly_zero(constant, dtype):
    mask, values = torch.ones(3, 7, dtype=torch.bool), torch.full((3, 1), constant, dtype=dtype)
    assert (whiten_over_tokens(values, mask, advantage_eps=0.0) == 0).all()
    values[1] = torch.nextafter(values[1], values.new_tensor(math.inf))
    assert (whiten_over_tokens(values, mask, advantage_eps=0.0) == 0).all()
