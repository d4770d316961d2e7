"""grpo_core.testing: objectives and advantages obey the public laws; a function that breaks one is told which.

The members and their settings are those of the batteries in tests/property.
"""

import inspect
import re

import pytest
import torch

from grpo_core.testing import ADVANTAGE_LAWS, OBJECTIVE_LAWS, REQUIRED_LAWS, check_advantage, check_objective
from tests.property import estimators, objectives

SETTINGS = {
    **{"cliprange": 0.2, "cliprange_high": 0.28, "dual_clip": 3.0, "ratio_low": 0.0, "ratio_high": 5.0},
    **{"temperature_positive": 1.0, "temperature_negative": 1.05, "threshold": 0.05, "threshold_low": 0.2},
    **{"threshold_high": 0.2, "kl_coef": 1.0, "positive": (2.0, 3.0), "negative": (3.0, 2.0)},
    **{"advantage_eps": 1e-6, "k": 2, "penalty": 0.5},
}
BROKEN_ON_PURPOSE = [("compute_dro_loss", "signal")]
"""The square of the log ratio pulls every token back, whatever its advantage."""


def settings_of(function):
    return {name: SETTINGS[name] for name in inspect.signature(function).parameters if name in SETTINGS}


@pytest.mark.parametrize("name", objectives.MEMBERS)
def test_objective_obeys_every_law(name):
    member = objectives.MEMBERS[name]
    laws = [law for law in OBJECTIVE_LAWS if (name, law) not in BROKEN_ON_PURPOSE]
    kind = "response" if name in objectives.OF_RESPONSES else "token"
    assert check_objective(member, laws=laws, **settings_of(member)) == kind
    if name not in objectives.ONE_ADVANTAGE:
        assert check_objective(member, laws=laws, token_advantages=True, **settings_of(member)) == "token"


@pytest.mark.parametrize(("name", "law"), BROKEN_ON_PURPOSE)
def test_objective_breaks_a_law_on_purpose(name, law):
    member = objectives.MEMBERS[name]
    with pytest.raises(AssertionError, match="has a gradient where advantage and reward are 0"):
        check_objective(member, laws=[law], **settings_of(member))


@pytest.mark.parametrize("name", estimators.MEMBERS)
def test_advantage_obeys_every_law(name):
    member = estimators.MEMBERS[name]
    check_advantage(member, **settings_of(member))


def reinforce(advantages, policy_log_probs, response_mask):
    return torch.where(response_mask, -advantages * policy_log_probs, 0.0)


def mean_over_padding(advantages, policy_log_probs):
    return -advantages * policy_log_probs.mean(dim=1, keepdim=True)


def mean_over_response(advantages, policy_log_probs, response_mask):
    kept = torch.where(response_mask, policy_log_probs, 0.0)
    return -advantages * kept.sum(dim=1, keepdim=True) / response_mask.sum(dim=1, keepdim=True)


def centered_in_batch(advantages, policy_log_probs, response_mask):
    return reinforce(advantages - advantages.mean(), policy_log_probs, response_mask)


def exact_ratio(advantages, policy_log_probs, old_log_probs, response_mask):
    ratio = torch.where(response_mask, policy_log_probs - old_log_probs.detach(), 0.0).exp()
    return torch.where(response_mask, -advantages.detach() * ratio, 0.0)


BROKEN_OBJECTIVES = {
    "shape": [
        (
            lambda policy_log_probs: -policy_log_probs.mean(),
            "returns shape (), but must return (4, 5), a loss per tok",
        ),
        (lambda policy_log_probs: 0.0, "returns float, but must return a tensor of shape (4, 5)"),
        (lambda policy_log_probs: policy_log_probs > 0, "returns shape (4, 5), but must return"),
        (lambda policy_log_probs: (policy_log_probs, [1]), "returns list beside the losses"),
        (lambda policy_log_probs: (policy_log_probs, {"low": policy_log_probs}), "a flag low that is no Bool tensor"),
        (lambda policy_log_probs: 1 / 0, "raises ZeroDivisionError on a valid batch (division by zero)"),
        (lambda policy_log_probs, beta: policy_log_probs, "its parameter beta needs a value or a default"),
    ],
    "gradient": [
        (lambda policy_log_probs: -policy_log_probs.detach(), "has no gradient in policy_log_probs"),
        (lambda policy_log_probs: policy_log_probs * 0, "has no gradient in policy_log_probs"),
        (lambda policy_log_probs, old_log_probs: old_log_probs - policy_log_probs, "has a gradient in old_log_probs"),
        (lambda policy_log_probs, advantages: -advantages * policy_log_probs, "has a gradient in advantages"),
    ],
    "finite": [(mean_over_response, "is not finite for a response of 0 tokens")],
    "rows": [(centered_in_batch, "its rows must be independent")],
    "padding": [(mean_over_padding, "use response_mask in every mean and sum over tokens")],
    "mask": [
        (lambda policy_log_probs: -policy_log_probs, "other than 0 outside response_mask, where a log-prob is nan"),
        (lambda policy_log_probs, response_mask: -policy_log_probs * response_mask, "outside response_mask"),
        (
            lambda policy_log_probs, response_mask: torch.where(
                response_mask, -policy_log_probs * policy_log_probs.detach().max().isfinite(), 0.0
            ),
            "changes with a log-prob of nan outside response_mask",
        ),
    ],
    "nan": [
        (lambda policy_log_probs: -policy_log_probs.nan_to_num(0.0), "hides a log-prob that is NaN"),
    ],
    "bounded": [(exact_ratio, "is not finite at a log ratio of 10000; clamp the log ratio before the exponential")],
    "signal": [
        (
            lambda policy_log_probs, advantages: -(advantages.detach() + 1) * policy_log_probs,
            "has a gradient where advantage and reward are 0",
        )
    ],
    "on_policy": [
        (lambda policy_log_probs, advantages: -2 * advantages * policy_log_probs, "has another gradient than REINFOR"),
        (lambda policy_log_probs: policy_log_probs, "has another gradient than REINFORCE"),
    ],
}
BROKEN_ADVANTAGES = {
    "shape": [
        (lambda rewards: rewards[:, None], "returns (20, 1), but must return a tensor of shape (20,)"),
        (lambda rewards: rewards / 0, "an advantage that is not finite"),
        (lambda rewards: None, "returns NoneType, but must return a tensor of shape (20,)"),
        (lambda rewards, scale: rewards, "its parameter scale needs a value or a default"),
    ],
    "unscored": [
        (lambda rewards: rewards - rewards.nanmean(), "(NaN) the advantage nan instead of 0"),
        (lambda rewards: (rewards - rewards.mean()).where(~rewards.isnan(), 0.0), "gives other responses NaN"),
    ],
    "order": [
        (lambda rewards: rewards * torch.arange(5).repeat_interleave(4), "depends on the order of the groups"),
        (lambda rewards: rewards * torch.arange(4).repeat(5), "or of the responses in a group"),
    ],
    "equal_rewards": [(lambda rewards: rewards - 0.5, "gives a group of equal rewards advantages other than 0")],
    "detached": [(lambda rewards: rewards - 0.5, "has a gradient in rewards; detach the advantages")],
}


def list_broken(table):
    return [(law, *one) for law, ones in table.items() for one in ones]


@pytest.mark.parametrize(("law", "function", "sentence"), list_broken(BROKEN_OBJECTIVES))
def test_objective_that_breaks_a_law_is_told_which(law, function, sentence):
    with pytest.raises(AssertionError, match=re.escape(sentence)) as raised:
        check_objective(function, laws=[law])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("law", "function", "sentence"), list_broken(BROKEN_ADVANTAGES))
def test_advantage_that_breaks_a_law_is_told_which(law, function, sentence):
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        check_advantage(function, laws=[law])


def test_every_law_has_a_function_that_breaks_it():
    assert [*BROKEN_OBJECTIVES] == [*OBJECTIVE_LAWS]
    assert [*BROKEN_ADVANTAGES] == [*ADVANTAGE_LAWS]
    assert set(REQUIRED_LAWS) < set(OBJECTIVE_LAWS)


def test_check_objective_passes_settings_and_keeps_defaults():
    def scaled(policy_log_probs, advantages, response_mask, scale, power=1.0, **_):
        return reinforce(advantages.detach(), policy_log_probs * scale**power, response_mask)

    check_objective(scaled, scale=1.0)
    with pytest.raises(AssertionError, match="has another gradient than REINFORCE"):
        check_objective(scaled, scale=2.0)
    check_objective(scaled, scale=2.0, power=0.0)
