"""The one run-time shape checker, its one switch, and the checks of values that many functions share."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

# Where a float is asked for, an int is one: cliprange=1, normalize_constant=1024.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shape_checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Check every jaxtyping annotation of `fn`, argument against argument and result, on each eager call.

    Under `torch.compile` the check steps aside: there, tracing the checker would break the graph. Setting
    `JAXTYPING_DISABLE=1` in the environment turns the check off everywhere.
    """
    checked = jaxtyped(fn, typechecker=_typechecker)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        return checked(*args, **kwargs)

    return wrapper


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise unless `value` is one of the names of `literal`."""
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(get_args(literal))}")


def require(fulfilled: bool, name: str, value: object, required: str) -> None:
    """Raise unless the argument `name` is what is required of it."""
    if not fulfilled:
        raise ValueError(f"{name}={value} must be {required}")
