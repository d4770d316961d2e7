"""Commands in messages work as they are printed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drivers.common.commands import spell_program, spell_tool

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.medium
@pytest.mark.parametrize("folder", [ROOT, ROOT.parent, Path("/")])
def test_spell_program_runs_from_the_current_folder(monkeypatch, folder):
    monkeypatch.chdir(folder)
    command = spell_program("report.py")
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=False)
    assert "no run folders given" in done.stderr


def test_spell_tool_is_a_name_only_if_the_shell_finds_it(monkeypatch, tmp_path):
    tool = tmp_path / "bin/wandb"
    monkeypatch.setattr(sys, "executable", str(tool.with_name("python")))
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/wandb")
    monkeypatch.chdir(tmp_path)
    assert spell_tool("wandb") == "bin/wandb"
    monkeypatch.setattr(shutil, "which", lambda _: str(tool))
    assert spell_tool("wandb") == "wandb"
