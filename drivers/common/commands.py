"""Spell the commands in messages so that they work as they are printed."""

import os
import shutil
import sys
from pathlib import Path

DRIVERS = Path(__file__).resolve().parents[1]


def spell_program(name: str) -> str:
    """Return the command that starts a program of drivers/ from the current folder, with this interpreter."""
    return f"{spell_tool('python')} {_shorten(DRIVERS / name)}"


def spell_tool(name: str) -> str:
    """Return the command of a tool of this environment: its name if the shell finds that one, else its path."""
    path = Path(sys.executable).with_name(name)
    return name if shutil.which(name) == str(path) else _shorten(path)


def _shorten(path: Path) -> str:
    """Return the path from the current folder if it is below, else the whole one."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
