"""Laws of group normalization."""

import math

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from grpo_core import compute_group_normalized_rewards, describe_rewards, normalize_group_rewards
from tests.strategies import floats, grouped_rewards

BY_STD = st.booleans()
CONSTANTS = st.one_of(st.sampled_from([0.1, 0.2, 0.7, 1 / 3, 1.1, -0.3]), st.floats(-1e6, 1e6, width=32))


def grouped(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor.reshape(-1, size)


@given(grouped_rewards(), BY_STD)
def test_normalize_group_rewards_gives_each_group_mean_0_and_std_1(inputs, by_std):
    rewards, size = inputs
    advantages = grouped(normalize_group_rewards(rewards, size, advantage_eps=0.0, normalize_by_std=by_std), size)
    assert_close(advantages.mean(dim=1), torch.zeros(len(advantages)).double(), rtol=0, atol=1e-12)
    # Of the group itself, 0 for a constant one; divided by it, 1.
    spread = grouped(rewards, size).std(dim=1)
    assert_close(advantages.std(dim=1), (spread > 0).double() if by_std else spread, rtol=1e-9, atol=0)
    if by_std:
        assert (advantages.abs() <= (size - 1) / math.sqrt(size) + 1e-12).all()


@given(grouped_rewards(), floats(-5, 5), st.sampled_from([0.25, 2.0, 8.0]))
def test_normalize_group_rewards_ignores_shift_and_follows_scale(inputs, shift, scale):
    rewards, size = inputs
    moved = scale * rewards + shift
    plain = normalize_group_rewards(rewards, size, normalize_by_std=False)
    assert_close(normalize_group_rewards(moved, size, normalize_by_std=False), scale * plain, rtol=1e-9, atol=1e-12)
    # With the division, a scale of rewards and epsilon alike drops out.
    divided = normalize_group_rewards(rewards, size, advantage_eps=0.5)
    assert_close(normalize_group_rewards(moved, size, advantage_eps=0.5 * scale), divided, rtol=1e-9, atol=1e-12)


@given(grouped_rewards(), BY_STD, st.data())
def test_normalize_group_rewards_treats_each_group_separately(inputs, by_std, data):
    rewards, size = inputs
    order = data.draw(st.permutations(range(len(rewards) // size)))
    members = data.draw(st.permutations(range(size)))
    moved = grouped(rewards, size)[order][:, members].flatten()
    expected = grouped(normalize_group_rewards(rewards, size, normalize_by_std=by_std), size)[order][:, members]
    assert_close(
        normalize_group_rewards(moved, size, normalize_by_std=by_std), expected.flatten(), rtol=1e-9, atol=1e-12
    )


@given(CONSTANTS, st.integers(2, 16), BY_STD, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_normalize_group_rewards_constant_group_is_exactly_zero(constant, size, by_std, dtype, data):
    """Exactly 0, not 1e-8 over 1e-6; also when the last bit of each reward is noise."""
    numbers = np.full(size, constant, dtype=np.float32 if dtype == torch.float32 else np.float64)
    for place in data.draw(st.sets(st.integers(0, size - 1))):
        numbers[place] = np.nextafter(numbers[place], numbers.dtype.type(np.inf))
    # The last bit of a subnormal number is no noise, it is a good part of it.
    assume(abs(constant) > 1e-30 or (numbers == numbers[0]).all())
    advantages = normalize_group_rewards(torch.from_numpy(numbers), size, advantage_eps=0.0, normalize_by_std=by_std)
    assert advantages.tolist() == [0.0] * size
    assert advantages.dtype == dtype


@given(grouped_rewards(), BY_STD, st.sampled_from([0.0, 1e-6, 1e-4]))
def test_normalize_group_rewards_float32_matches_formula_to_last_place(inputs, by_std, eps):
    """Computed in float64 and rounded once: the float32 formula is off by its own rounding."""
    rewards, size = inputs[0].float(), inputs[1]
    groups = grouped(rewards, size)
    plain = groups - groups.mean(dim=1, keepdim=True)
    if by_std:
        plain = plain / (groups.std(dim=1, keepdim=True) + eps)
    plain = torch.where(groups.amax(dim=1, keepdim=True) > groups.amin(dim=1, keepdim=True), plain, 0.0)
    advantages = normalize_group_rewards(rewards, size, advantage_eps=eps, normalize_by_std=by_std)
    assert advantages.dtype == torch.float32
    assert_close(advantages, plain.flatten(), rtol=1e-6, atol=1e-6)


@given(grouped_rewards())
def test_compute_group_normalized_rewards_scores_each_pair_once_in_order(inputs):
    rewards, size = inputs
    seen = []

    def reward_fn(response, truth):
        seen.append((response, truth))
        return {"reward": rewards[len(seen) - 1].item()}

    responses = [f"response {index}" for index in range(len(rewards))]
    truths = [index // size for index in range(len(rewards))]
    _, raw, metadata = compute_group_normalized_rewards(reward_fn, responses, truths, size, 1e-6, True)
    assert seen == list(zip(responses, truths, strict=True))
    assert raw.tolist() == rewards.tolist()
    assert "format_reward" not in metadata
    assert "answer_reward" not in metadata


@given(st.lists(st.sets(st.sampled_from(["format_reward", "answer_reward"])), min_size=1, max_size=4))
def test_describe_rewards_reports_component_if_every_score_has_it(parts):
    """A mean over those that have it would be one over fewer responses, and nobody would see it."""
    described = describe_rewards([{"reward": 1.0} | dict.fromkeys(keys, 0.5) for keys in parts], 1)
    of_all = set.intersection(*parts)
    assert {name for name in described if name in ("format_reward", "answer_reward")} == of_all
    assert all(described[name] == 0.5 for name in of_all)


@given(grouped_rewards(), BY_STD)
def test_normalize_group_rewards_is_detached(inputs, by_std):
    rewards, size = inputs
    assert not normalize_group_rewards(rewards.requires_grad_(), size, normalize_by_std=by_std).requires_grad
