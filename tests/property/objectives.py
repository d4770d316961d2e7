"""Every objective of the family with the inputs that it takes, for tests that run over all of them.

Members are found by name, their arguments by the names of their parameters.
"""

import inspect
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import grpo_core
from grpo_core import Aggregation, compute_sequence_weights, compute_token_weights, sum_weighted_losses
from tests.strategies import SHAPES, floats, masks, response_masks, tensors

# Calls four of the others, by the name of a loss type: tests/property/test_steps.py.
DOORS = {"compute_policy_gradient_loss"}
# The loss of two responses, not of one: tests/property/test_losses.py.
OF_PAIRS = {"compute_dpo_loss"}
MEMBERS = {
    name: getattr(grpo_core, name)
    for name in grpo_core.__all__
    if name.startswith("compute_") and name.endswith("_loss") and name not in DOORS | OF_PAIRS
}
PARAMETERS = {name: set(inspect.signature(member).parameters) for name, member in MEMBERS.items()}
OF_RESPONSES = {"compute_gspo_loss", "compute_gmpo_loss", "compute_luspo_loss"}
"""Members with one loss per response; everything else has one per token."""
ONE_ADVANTAGE = OF_RESPONSES | {"compute_vespo_loss"}
STOPPED = {"compute_cispo_loss", "compute_vespo_loss", "compute_gspo_token_loss"}
"""Members whose gradient is defined by a stop-gradient and is not that of their value: the oracle has it."""
PAIRS = [(name, "sequence") for name in sorted(OF_RESPONSES)] + [
    (name, aggregation) for name in sorted(MEMBERS.keys() - OF_RESPONSES) for aggregation in get_args(Aggregation)
]
# `make quick` tries one aggregation of token losses.
EACH = pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        pair if pair[1] in ("sequence", "token_mean") else pytest.param(*pair, marks=pytest.mark.medium)
        for pair in PAIRS
    ],
)
EACH_MEMBER = pytest.mark.parametrize("name", sorted(MEMBERS))
CONSTANT = 7.0
# A law runs for each objective and aggregation, so with fewer examples of each it sees five times those of a profile.
fewer = settings(max_examples=max(5, settings.default.max_examples // 12))
# On-policy, these clip nothing, so that every slope is that of REINFORCE.
HYPER = {
    "cliprange": st.sampled_from([0.1, 0.2, 0.5]),
    "cliprange_high": st.sampled_from([None, 0.28, 0.05]),
    "dual_clip": st.sampled_from([None, 1.5, 3.0]),
    "ratio_low": st.sampled_from([0.0, 0.8]),
    "ratio_high": st.sampled_from([1.2, 5.0]),
    "temperature_positive": st.sampled_from([1.0, 0.5]),
    "temperature_negative": st.sampled_from([1.05, 2.0]),
    "threshold_low": st.sampled_from([0.05, 0.2]),
    "threshold_high": st.sampled_from([0.05, 0.3]),
    "penalty": st.sampled_from([0.0, 0.5, 2.0]),
    "threshold": st.sampled_from([0.01, 0.1]),
    "kl_coef": st.sampled_from([0.0, 0.1, 1.0]),
    "positive": st.sampled_from([(2.0, 3.0), (1.0, 1.0)]),
    "negative": st.sampled_from([(3.0, 2.0), (1.0, 2.0)]),
}
TENSORS = {
    "advantages",
    "raw_rewards_or_advantages",
    "policy_log_probs",
    "old_log_probs",
    "response_mask",
    "penalized",
}


@dataclass(frozen=True)
class Case:
    """The responses of one optimizer step, group after group."""

    policy: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    penalized: Tensor
    sizes: list[int]
    hyper: dict

    def rows(self, index: list[int]) -> "Case":
        picked = {key: getattr(self, key)[index] for key in ("policy", "old", "advantages", "mask", "penalized")}
        return replace(self, **picked)


@st.composite
def cases(draw, name: str) -> Case:
    """Ragged responses, some empty, from a policy that has moved since by up to 1 nat a token either way."""
    rows, seq = shape = draw(SHAPES)
    old = draw(tensors(shape, floats(-4, -1.1)))
    columns = 1 if name in ONE_ADVANTAGE or draw(st.booleans()) else seq
    split = draw(st.integers(0, rows))
    unknown = PARAMETERS[name] - TENSORS - HYPER.keys()
    assert not unknown, f"{name}: add {unknown} to HYPER"
    return Case(
        policy=old + draw(tensors(shape, floats(-1, 1))),
        old=old,
        advantages=draw(tensors((rows, columns), floats(-2, 2))),
        mask=draw(response_masks(shape)),
        penalized=draw(masks(shape)),
        sizes=[size for size in (split, rows - split) if size],
        hyper={key: draw(HYPER[key]) for key in sorted(PARAMETERS[name] - TENSORS)},
    )


def losses_of(name: str, case: Case, policy: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Call the member with what it asks for by name."""
    offered = {
        "advantages": case.advantages,
        "raw_rewards_or_advantages": case.advantages,
        "policy_log_probs": case.policy if policy is None else policy,
        "old_log_probs": case.old,
        "response_mask": case.mask,
        "penalized": case.penalized,
        **case.hyper,
    }
    result = MEMBERS[name](**{key: offered[key] for key in PARAMETERS[name]})
    return result if isinstance(result, tuple) else (result, {})


def weights_of(aggregation: str, case: Case, **options) -> Tensor:
    if aggregation == "sequence":
        return compute_sequence_weights(case.mask, **options)
    return compute_token_weights(
        case.mask,
        aggregation,
        normalize_constant=None if aggregation == "token_mean" else CONSTANT,
        group_sizes=case.sizes,
        **options,
    )


def run(name: str, case: Case, weights: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient in the log-probabilities, and the metadata."""
    policy = case.policy.detach().clone().requires_grad_()
    losses, metadata = losses_of(name, case, policy)
    loss = sum_weighted_losses(losses, weights)
    loss.backward()
    return loss.detach(), policy.grad, metadata


def far_from_kinks(case: Case) -> bool:
    """No ratio within 1e-6 of a bound, where the oracle and the function may fall on different sides."""
    around_one = [value for key, value in case.hyper.items() if key.startswith("cliprange") and value is not None]
    edges = [1 + sign * value for value in around_one for sign in (-1, 1)] + around_one
    edges += [value for key, value in case.hyper.items() if key.startswith(("dual", "ratio", "threshold")) and value]
    log_ratio = case.policy - case.old
    means = torch.where(case.mask, log_ratio, 0.0).sum(1) / case.mask.sum(1)
    moved = (case.policy.exp() - case.old.exp())[case.mask]
    log_ratios = torch.cat([log_ratio[case.mask], means[case.mask.any(dim=1)]])
    values = torch.cat([log_ratios, log_ratios.exp(), moved]).abs()
    return all(((values - edge).abs() > 1e-6).all() for edge in edges)
