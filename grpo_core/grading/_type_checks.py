"""The type check of functions of texts."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintParamViolation

P = ParamSpec("P")
R = TypeVar("R")
_typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))


def type_checked(fn: Callable[P, R]) -> Callable[P, R]:
    """Check the types of the arguments of `fn`, as `shape_checked` does. Only an error loads torch."""
    checked = _typechecker(fn)

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return checked(*args, **kwargs)
        except (BeartypeCallHintParamViolation, TypeError):  # a number of NumPy, or an error to explain in one line
            from grpo_core._checks import shape_checked

            return shape_checked(fn)(*args, **kwargs)

    return wrapper
