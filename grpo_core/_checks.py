"""The one run-time shape checker, its one switch, and the checks of values that many functions share."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

P = ParamSpec("P")
R = TypeVar("R")

# Of ragged batches there is no end.
_MOST_KINDS = 4096
# Where a float is asked for, an int is one: cliprange=1, normalize_constant=1024.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shape_checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Check every jaxtyping annotation of `fn`, argument against argument and result, in eager calls.

    Shapes and types decide a check, so arguments of shapes and types that have passed once are not checked again:
    3 microseconds in place of 50. Under `torch.compile` the check steps aside: there, tracing the checker would break
    the graph. Setting `JAXTYPING_DISABLE=1` in the environment turns the check off everywhere.
    """
    checked = jaxtyped(fn, typechecker=_typechecker)
    passed: set[tuple[object, ...]] = set()

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        kind = (*map(_kind_of, args), *kwargs, *map(_kind_of, kwargs.values()))
        if kind in passed:
            return fn(*args, **kwargs)
        result = checked(*args, **kwargs)
        if None not in kind:
            if len(passed) >= _MOST_KINDS:
                passed.clear()
            passed.add(kind)
        return result

    return wrapper


def _kind_of(value: object) -> object:
    """All that a check looks at; None for what it looks into."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return type(value) if value is None or isinstance(value, bool | int | float | str) else None


def eager_alone(fn: Callable[P, R]) -> Callable[P, R]:
    """For what is no graph: torch.compile goes around `fn`."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # asked for here, for it imports the compiler
            return torch.compiler.disable(fn)(*args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]
        return fn(*args, **kwargs)

    return wrapper


def is_traced() -> bool:
    """Whether torch.compile or torch.func is looking on: both want plain expressions, which one of them fuses."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise unless `value` is one of the names of `literal`."""
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(get_args(literal))}")


def require(fulfilled: bool, name: str, value: object, required: str) -> None:
    """Raise unless the argument `name` is what is required of it."""
    if not fulfilled:
        raise ValueError(f"{name}={value} must be {required}")
