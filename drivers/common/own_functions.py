"""Import a function of the user's own, which a flag names as `my_module:function` or `path/to/file.py:function`."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drivers.common.errors import UsageError, suggest

SPELLING = "your own function as my_module:function or path/to/file.py:function"


def is_own(name: str) -> bool:
    """Return whether the text is spelled like a user's own function."""
    module, _, function = name.rpartition(":")
    return bool(module) and function.isidentifier()


def check_file(flag: str, name: str) -> None:
    """Raise a UsageError if the file that `name` begins with does not exist."""
    file, _, _ = name.rpartition(":")
    if file.endswith(".py") and not Path(file).is_file():
        raise UsageError(f"{flag} {name}: no such file, {file}")


def import_function(flag: str, name: str) -> Callable[..., Any]:
    """Return the function that `name` spells, or raise a UsageError, which names `flag`, if there is none."""
    where, _, function_name = name.rpartition(":")
    check_file(flag, name)
    try:
        module = _import_file(Path(where).resolve()) if where.endswith(".py") else _import_module(where)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{flag} {name}: cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"{flag} {name}: {module.__file__} has no function {function_name}{suggest(function_name, vars(module))}"
        )
    return function  # type: ignore[no-any-return]


def hash_source(function: Callable[..., Any]) -> str | None:
    """Return the SHA-256 of the file that defines the function, or None if there is no such file."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _import_module(name: str) -> Any:
    sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _import_file(file: Path) -> Any:
    """Import a file under its name, or under its path if another module has that name. Import it once."""
    known = sys.modules.get(file.stem)
    name = file.stem if known is None or getattr(known, "__file__", None) == str(file) else str(file)
    if name in sys.modules:
        return sys.modules[name]
    sys.path.insert(0, str(file.parent))  # what lies beside it may be imported
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # it is a file, and ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
