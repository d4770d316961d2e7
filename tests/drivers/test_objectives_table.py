"""The tables of objectives and advantages: their rows fit the functions, the settings, the formulas and the papers."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest
import torch

import grpo_core as core
from drivers.settings.algorithm import OPTIONS_READ_BY_LOSS
from drivers.settings.formula import formula
from drivers.settings.grpo import GrpoConfig
from drivers.settings.tables import ADVANTAGES, OBJECTIVES, AdvantageName, Objective, ObjectiveName
from drivers.training.advantages import prepare_rollouts
from drivers.training.metrics import UpdateMetrics
from drivers.training.objective import weigh_step
from drivers.training.update import accumulate_gradients
from tests.drivers.helpers.letters import make_tiny_config, make_tiny_parts, sample_rollouts

ROWS = {**OBJECTIVES, **ADVANTAGES}
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAPERS, ALGORITHM = (DOCS / "papers.md").read_text(), (DOCS / "algorithm.md").read_text()
SYMBOLS = {"A", "old", "sum_of_parts"}

# Written by hand, so that what the tables derive is checked against something else.
CLIPPED = {"grpo_clip", "clip_cov", "gspo", "gspo_token", "gmpo", "luspo", "dppo_tv"}
WITHOUT_RATIO = {"no_baseline", "reinforce_with_baseline"}
READERS = {
    "cliprange": CLIPPED | {"dppo_kl"},
    "cliprange_high": CLIPPED,
    "dual_clip": {"grpo_clip", "clip_cov"},
    "ratio_low": {"cispo"},
    "ratio_high": {"cispo"},
    "sapo_temperatures": {"sapo"},
    "dro_penalty": {"dro"},
    "covariance_fraction": {"clip_cov", "kl_cov"},
    "covariance_bounds": {"clip_cov"},
    "kl_cov_coef": {"kl_cov"},
    "off_policy_threshold": set(OBJECTIVES) - {"no_baseline"},
    "advantage_eps": {"group", "batch_std", "gdpo"},
    "use_std_normalization": {"group"},
    "std_correction": {"group"},
    "reward_weights": {"gdpo"},
    "pass_k": {"pass_at_k", "pkpo"},
    "importance_level": {"truncate", "mask", "reject"},
    "importance_measure": {"reject"},
    "importance_low": {"truncate", "mask", "reject"},
    "importance_high": {"truncate", "mask", "reject"},
    "overlong_buffer": {"soft_overlong"},
}


def fields_of(template):
    """The names in a `str.format` template, without their indices."""
    return {name.partition("[")[0] for _, name, _, _ in Formatter().parse(template) if name is not None}


def test_tables_have_one_row_per_name():
    assert tuple(OBJECTIVES) == get_args(get_args(ObjectiveName)[0])
    assert tuple(ADVANTAGES) == get_args(get_args(AdvantageName)[0])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.function is not None])
def test_row_has_the_arguments_of_its_function(name):
    row = ROWS[name]
    parameters = inspect.signature(getattr(core, row.function)).parameters
    given = [*row.inputs, *row.settings, *row.fixed_arguments]
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    assert len(given) == len(set(given))
    assert required <= set(given) <= parameters.keys()


@pytest.mark.parametrize("name", ROWS)
def test_row_names_settings_that_exist_and_shows_those_that_it_reads(name):
    row = ROWS[name]
    assert set(row.reads) <= {field.name for field in fields(GrpoConfig)}
    for template in (row.formula, *row.special_formulas.values()):
        assert fields_of(template) <= {*row.reads} | SYMBOLS
    assert {setting for setting, _ in row.special_formulas} <= set(row.reads)


@pytest.mark.parametrize("name", ROWS)
def test_algorithm_page_lists_every_name(name):
    assert re.search(rf"^\|[^|]*`{name}`", ALGORITHM, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.paper is not None])
def test_paper_of_row_is_on_the_page_of_papers(name):
    assert ROWS[name].paper in PAPERS


def test_new_objective_needs_one_function_and_one_row(monkeypatch):
    """The example of docs/tutorials/loss.md, from its formula to the gradient of a step."""

    def soft_clip_loss(advantages, policy_log_probs, old_log_probs, response_mask, cliprange, softness):
        ratio = torch.where(response_mask, policy_log_probs - old_log_probs, 0.0).exp()
        distance = torch.relu((ratio.detach() - 1).abs() - cliprange)
        return -advantages * ratio * torch.exp(-distance / softness)

    row = Objective(
        function="compute_soft_clip_loss",
        settings={"cliprange": "cliprange"},
        fixed_arguments={"softness": 0.1},
        formula="-rho_it {A} exp(-max(0, |rho_it - 1| - {cliprange:g}) / 0.1)",
    )
    monkeypatch.setattr(core, "compute_soft_clip_loss", soft_clip_loss, raising=False)
    monkeypatch.setitem(OBJECTIVES, "soft_clip", row)
    config, parts = make_tiny_config(loss_type="soft_clip"), make_tiny_parts()
    assert "loss_it  = -rho_it A_i exp(-max(0, |rho_it - 1| - 0.2) / 0.1)" in formula(config)
    rollouts, scores = sample_rollouts(config, parts)
    batch, _ = weigh_step(config, prepare_rollouts(config, parts.policy, None, rollouts, scores, None))
    accumulate_gradients(parts.policy, batch, config, 0.0, UpdateMetrics())
    assert max(parameter.grad.abs().max() for parameter in parts.policy.parameters()) > 0.01


def test_readers_of_each_setting_follow_from_the_tables():
    assert {name: set(readers) for name, (_, readers) in OPTIONS_READ_BY_LOSS.items()} == READERS


def test_kinds_of_objectives_and_advantages_are_these():
    assert {name for name, row in OBJECTIVES.items() if not row.uses_ratio} == WITHOUT_RATIO
    assert {name for name, row in OBJECTIVES.items() if row.has_response_loss} == {"gspo", "gmpo", "luspo"}
    assert {name for name, row in ADVANTAGES.items() if row.has_gradient_in_equal_groups} == {
        "remax",
        "reinforce_plus_plus",
        "gdpo",
    }
