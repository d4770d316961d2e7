"""Find the row of a --loss-type or --advantage: in the table, or described after the user's own function.

An own function gets what its parameters ask for by name. It is imported and checked on a tiny batch where the settings
are made, because the flags that have an effect depend on it. Only then do settings load torch.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from drivers.common.errors import UsageError, suggest
from drivers.common.own_functions import SPELLING, hash_source, import_function, is_own
from drivers.settings.recipes import RECIPES
from drivers.settings.tables import ADVANTAGES, OBJECTIVES, Advantage, Choice, Objective

LOSS_SYMBOLS = {
    "advantages": "{A}",
    "raw_rewards": "r_i",
    "policy_log_probs": "log pi(o_it)",
    "old_log_probs": "log {old}(o_it)",
    "response_mask": "mask",
}
"""Rollouts' values that an own loss may ask for, and their symbols in its formula."""
LOSS_SETTINGS: dict[str, Any] = {
    "cliprange": 0.2,
    "cliprange_high": 0.28,
    "dual_clip": None,
    "ratio_low": 0.0,
    "ratio_high": 5.0,
}
"""Settings that an own loss may ask for, with values for the check."""
ADVANTAGE_SYMBOLS = {"rewards": "r", "group_sizes": "G", "lengths": "|o|"}
ADVANTAGE_SETTINGS: dict[str, Any] = {"advantage_eps": 1e-6, "pass_k": 2}


def find_objective(loss_type: str) -> Objective:
    """Return the row of a --loss-type; raise a UsageError if there is none."""
    return OBJECTIVES[loss_type] if loss_type in OBJECTIVES else _describe_own_loss(loss_type)


def find_advantage(advantage: str) -> Advantage:
    """Return the row of an --advantage; raise a UsageError if there is none."""
    return ADVANTAGES[advantage] if advantage in ADVANTAGES else _describe_own_advantage(advantage)


@cache
def _describe_own_loss(name: str) -> Objective:
    """Return the row of an own loss; its kind and its laws are those that it shows on a tiny batch."""
    function = _import("--loss-type", name, OBJECTIVES)
    from grpo_core.testing import OBJECTIVE_LAWS, REQUIRED_LAWS, check_objective

    row = _describe("--loss-type", name, function, LOSS_SYMBOLS, LOSS_SETTINGS)
    values = {setting: LOSS_SETTINGS[setting] for setting in row["settings"]}

    def find_break(law: str, **options: bool) -> str:
        try:
            check_objective(function, laws=[law], **options, **values)
        except AssertionError as error:
            return str(error).partition(": ")[2]
        return ""

    try:
        per_response = check_objective(function, laws=REQUIRED_LAWS, **values) == "response"
    except AssertionError as error:
        raise UsageError(f"--loss-type {name}: {str(error).partition(': ')[2]}") from error
    uses_advantages = "advantages" in row["inputs"]
    broken = {law: find_break(law) for law in OBJECTIVE_LAWS if law not in REQUIRED_LAWS}
    return Objective(
        **row,
        other_settings=("off_policy_threshold",) if uses_advantages else (),
        has_response_loss=per_response,
        has_response_ratio=per_response,
        accepts_token_advantages=not per_response and not find_break("shape", token_advantages=True),
        has_gradient_without_signal=bool(broken["signal"]),
        broken_laws=tuple(filter(None, broken.values())),
    )


@cache
def _describe_own_advantage(name: str) -> Advantage:
    """Return the row of an own advantage."""
    function = _import("--advantage", name, ADVANTAGES)
    from grpo_core.testing import check_advantage

    row = _describe("--advantage", name, function, ADVANTAGE_SYMBOLS, ADVANTAGE_SETTINGS)
    values = {setting: ADVANTAGE_SETTINGS[setting] for setting in row["settings"]}
    try:
        check_advantage(function, laws=("shape", "unscored", "order"), **values)
    except AssertionError as error:
        raise UsageError(f"--advantage {name}: {str(error).partition(': ')[2]}") from error
    try:
        check_advantage(function, laws=("equal_rewards",), **values)
        compares_within_group = True
    except AssertionError:
        compares_within_group = False
    return Advantage(**row, compares_within_group=compares_within_group)


def _import(flag: str, name: str, table: Mapping[str, Choice]) -> Callable[..., Any]:
    """Import an own function; raise a UsageError for a name that is neither in the table nor spelled like one."""
    if not is_own(name):
        recipe = name.replace("_", "-")
        hint = f"; it is a recipe: pass --recipe {recipe}" if recipe in RECIPES else suggest(name, table)
        raise UsageError(f"{flag} {name}: must be one of {', '.join(table)}, or {SPELLING}{hint}")
    return import_function(flag, name)


def _describe(
    flag: str, name: str, function: Callable[..., Any], symbols: Mapping[str, str], settings: Mapping[str, object]
) -> dict[str, Any]:
    """Return the part of a row that follows from the function's parameters."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"{flag} {name}: its parameters cannot be read ({error}); wrap it in a def") from error
    inputs = {parameter: parameter for parameter in symbols if parameter in parameters}
    read = {parameter: parameter for parameter in settings if parameter in parameters}
    for parameter in parameters.values():
        is_required = parameter.default is parameter.empty and "VAR" not in parameter.kind.name
        if is_required and parameter.kind is not parameter.POSITIONAL_ONLY and parameter.name not in inputs | read:
            known = ", ".join((*symbols, *settings))
            raise UsageError(f"{flag} {name}: its parameter {parameter.name} needs a default; known are {known}")
    arguments = [symbols[parameter] for parameter in inputs] + [f"{setting}={{{setting}}}" for setting in read]
    return {
        "function": name,
        "own_function": function,
        "source_hash": hash_source(function),
        "inputs": inputs,
        "settings": read,
        "formula": f"{name.rpartition(':')[2]}({', '.join(arguments)})",
    }
