"""Every advantage estimator with the inputs that it takes, for tests that run over all of them."""

import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

import grpo_core
from tests.oracle import estimators as oracle
from tests.strategies import floats

# Several rewards in one call, and an advantage of each token: each is tested by itself.
OWN_TESTS = {"compute_gdpo_advantages", "compute_otb_advantages"}
MEMBERS = {
    name: getattr(grpo_core, name)
    for name in grpo_core.__all__
    if name.endswith("_advantages") or name == "normalize_group_rewards"
    if list(inspect.signature(getattr(grpo_core, name)).parameters)[:2] == ["rewards", "group_sizes"]
    if name not in OWN_TESTS
}
EACH = pytest.mark.parametrize("name", sorted(MEMBERS))
BINARY = {"compute_pass_at_k_advantages"}
NOT_NEGATIVE = BINARY | {"compute_maxrl_advantages"}
UNSCORED = st.sampled_from([math.nan, math.inf, -math.inf])


@dataclass(frozen=True)
class Case:
    groups: list[list[float]]
    extra: dict

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups]

    def call(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        extra = dict(self.extra)
        if "lengths" in extra:
            extra["lengths"] = torch.tensor([n for group in extra["lengths"] for n in group])
        if "greedy_rewards" in extra:
            extra["greedy_rewards"] = torch.tensor(extra["greedy_rewards"], dtype=dtype)
        rewards = torch.tensor([reward for group in self.groups for reward in group], dtype=dtype)
        return MEMBERS[name](rewards, self.sizes, **extra)

    def of_oracle(self, name: str) -> list[float]:
        groups = [[reward if math.isfinite(reward) else None for reward in group] for group in self.groups]
        return oracle.advantages(name, groups, self.extra)


@st.composite
def cases(draw, name: str, unscored: bool = True) -> Case:
    """Up to 4 groups of 2 to 6 rewards, of unequal sizes; some constant, some with rewards that are none."""
    reward = floats(0, 4) if name in NOT_NEGATIVE else floats(-4, 4)
    reward = st.sampled_from([0.0, 1.0]) if name in BINARY or draw(st.booleans()) else reward
    if unscored and draw(st.booleans()):
        reward = reward | UNSCORED
    groups = draw(st.lists(st.lists(reward, min_size=2, max_size=6), min_size=1, max_size=4))
    sizes = [len(group) for group in groups]
    pool = {
        "advantage_eps": st.sampled_from([0.0, 1e-6, 0.1]),
        "normalize_by_std": st.booleans(),
        "correction": st.sampled_from([0, 1]),
        "k": st.integers(1, min(sizes)),
        "lengths": st.tuples(*(st.lists(st.integers(0, 5), min_size=n, max_size=n) for n in sizes)).map(list),
        "greedy_rewards": st.lists(floats(-4, 4) | UNSCORED, min_size=len(sizes), max_size=len(sizes)),
    }
    parameters = list(inspect.signature(MEMBERS[name]).parameters)[2:]
    return Case(groups, {key: draw(pool[key]) for key in parameters})
