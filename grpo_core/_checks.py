"""The run-time shape checker and the checks of argument values that many functions share."""

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

from grpo_core._type_errors import explain_type_error, to_plain_number

P = ParamSpec("P")
R = TypeVar("R")

# Ragged batches have an unbounded number of shapes, so the cache of checked signatures is bounded.
_MAX_CACHED_SIGNATURES = 4096
# Accept an int where a float is annotated: cliprange=1, normalize_constant=1024.
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def shape_checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Check the jaxtyping annotations of `fn` on every eager call: its arguments against each other and its result.

    Only shapes and types decide the outcome, so a combination that has passed once is not checked again, which takes 3
    microseconds instead of 50. The check is skipped under `torch.compile`, where it would break the graph, and
    everywhere if the environment sets `JAXTYPING_DISABLE=1`.
    """
    checked = jaxtyped(fn, typechecker=_typechecker)
    passed: set[tuple[object, ...]] = set()

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        signature = (*map(_signature_key, args), *kwargs, *map(_signature_key, kwargs.values()))
        if signature in passed:
            return fn(*args, **kwargs)
        args = tuple(map(to_plain_number, args))  # type: ignore[assignment]
        kwargs = {name: to_plain_number(value) for name, value in kwargs.items()}  # type: ignore[assignment]
        try:
            inspect.signature(fn).bind(*args, **kwargs)
        except TypeError as error:  # jaxtyping would raise it without the name of the function
            raise TypeError(f"{fn.__name__}: {error}") from None
        try:
            result = checked(*args, **kwargs)
        except TypeCheckError as error:
            message = explain_type_error(str(error), fn, args, kwargs)
            if message is None:
                raise
            raise TypeCheckError(message) from None
        if None not in signature:
            if len(passed) >= _MAX_CACHED_SIGNATURES:
                passed.clear()
            passed.add(signature)
        return result

    return wrapper


def _signature_key(value: object) -> object:
    """Return everything about `value` that decides a check, or None if the check depends on the value's contents."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return type(value) if value is None or isinstance(value, bool | int | float | str) else None


def disable_compile(fn: Callable[P, R]) -> Callable[P, R]:
    """Run `fn` eagerly even when the caller is compiled with `torch.compile`."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # checked at call time, because torch.compiler.disable imports the compiler
            return torch.compiler.disable(fn)(*args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]
        return fn(*args, **kwargs)

    return wrapper


def is_traced() -> bool:
    """Return True under torch.compile or a torch.func transform, which need plain differentiable expressions."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal type `literal`."""
    choices = get_args(literal)
    if value not in choices:
        near = get_close_matches(value, choices, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}{hint}")


def require(fulfilled: bool, name: str, value: object, requirement: str) -> None:
    """Raise ValueError if the argument `name` does not meet its requirement."""
    if not fulfilled:
        raise ValueError(f"{name}={value} must be {requirement}")
