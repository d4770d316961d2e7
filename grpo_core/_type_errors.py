"""Explain a type error in one line: the argument, its value, the expected type, and how to fix it."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, get_args

import torch

_ARGUMENT = re.compile(r"typechecking parameter '(\w+)'")
_AXES = re.compile(r"^(\w+)=(\d+)$", re.MULTILINE)


def to_plain_number(value: Any) -> Any:
    """Return a number of NumPy, or a sequence of them, as Python's numbers; anything else as it is."""
    if isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Integral) and not isinstance(value[0], int):
        return [to_plain_number(member) for member in value]
    return value


def explain_type_error(
    message: str, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Return one line for jaxtyping's message, or None if it blames no argument of `fn`."""
    found = _ARGUMENT.search(message)
    if found is None or f"{fn.__module__}.{fn.__qualname__}." not in message:  # of a function that `fn` has called
        return None
    name = found[1]
    arguments = inspect.signature(fn).bind(*args, **kwargs).arguments
    value, annotation = arguments[name], fn.__annotations__[name]
    axes = {axis: int(size) for axis, size in _AXES.findall(message.rpartition("axis annotation")[2])}
    wanted = _list_tensors(annotation)
    shapes = [shape for tensor in wanted if (shape := _resolve(tensor, axes)) is not None]
    here = f", here of shape {' or '.join(map(str, shapes))}" if shapes else ""
    fitting = (
        change for change, new in _list_changes(name, value) if any(_fits(new, tensor, axes) for tensor in wanted)
    )
    remedy = next((f"; pass {change}" for change in fitting), "")
    if not wanted and isinstance(value, torch.Tensor):
        remedy = f"; pass {name}.{'item' if value.numel() == 1 else 'tolist'}()"
    earlier = {other: (arguments[other], fn.__annotations__[other]) for other in arguments if other != name}
    remedy = remedy or "".join(_list_conflicts(value, wanted, axes, earlier))
    return f"{fn.__name__}: {name} is {_describe(value)}, but must be {_spell(annotation)}{here}{remedy}"


def _list_tensors(annotation: Any) -> list[Any]:
    """Return the tensor types of an annotation, which may be a union."""
    if hasattr(annotation, "dim_str"):
        return [annotation]
    return [tensor for part in get_args(annotation) for tensor in _list_tensors(part)]


def _resolve(tensor: Any, axes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return the shape that a tensor type stands for, or None if other arguments do not decide all of it."""
    sizes = [int(word) if word.isdigit() else axes.get(word) for word in tensor.dim_str.split()]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _list_conflicts(
    value: Any, wanted: Sequence[Any], axes: Mapping[str, int], others: Mapping[str, tuple[Any, Any]]
) -> Iterator[str]:
    """Yield which other argument has another size of an axis."""
    for axis, size in _list_axes(value, wanted):
        if axes.get(axis, size) != size:
            for other, (given, annotation) in others.items():
                if (axis, axes[axis]) in _list_axes(given, _list_tensors(annotation)):
                    yield f"; {axis} is {axes[axis]} in {other}"
                    break


def _list_axes(value: Any, tensors: Sequence[Any]) -> list[tuple[str, int]]:
    """Return the named axes of a tensor with their sizes, by the first type that has as many."""
    for words in (tensor.dim_str.split() for tensor in tensors):
        if isinstance(value, torch.Tensor) and len(words) == value.ndim and not any("*" in word for word in words):
            return [pair for pair in zip(words, value.shape, strict=True) if pair[0].isidentifier()]
    return []


def _list_changes(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield simple changes of an argument as code, with what they make of it."""
    if not isinstance(value, torch.Tensor):
        with suppress(ValueError, TypeError, RuntimeError):
            yield f"torch.as_tensor({name})", torch.as_tensor(value)
        return
    if value.ndim == 1:
        yield f"{name}[:, None]", value[:, None]
    if value.ndim == 2:
        yield (f"{name}[:, 0]", value[:, 0]) if value.shape[1] == 1 else (f"{name}.flatten()", value.flatten())
    for method in ("bool", "float", "long"):
        yield f"{name}.{method}()", getattr(value, method)()


def _fits(value: torch.Tensor, tensor: Any, axes: Mapping[str, int]) -> bool:
    """Return whether a value has the type and shape; an axis that no other argument decides may have any size."""
    kind = "Float" if value.is_floating_point() else "Bool" if value.dtype == torch.bool else "Int"
    words = tensor.dim_str.split()
    if tensor.__name__.partition("[")[0] != kind or len(words) != value.ndim or any("*" in word for word in words):
        return False
    for word, size in zip(words, value.shape, strict=True):
        axis = word.removeprefix("#")
        known = int(axis) if axis.isdigit() else axes.get(axis, size)
        if size != known and not (size == 1 and word.startswith("#")):
            return False
    return True


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 40 else text[:40] + '...'}, of type {type(value).__name__}"


def _spell(annotation: Any) -> str:
    """Return an annotation as it is written in the code."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("jaxtyping.", "").replace("collections.abc.", "")
