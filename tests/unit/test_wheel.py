"""The wheel: its contents, its requirements, and that it works without this repository."""

import email
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import grpo_core

ROOT = Path(__file__).resolve().parents[2]
LIGHT = {"torch", "einops", "jaxtyping", "beartype", "mpmath"}
"""What the functions need; mpmath is loaded only when two answers are compared as expressions."""

ONLY_LIGHT = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Installed:
    # Nothing else is there, as in an environment that was empty before.
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        first = name.split(".")[0]
        is_there = first in {allowed} or first in sys.stdlib_module_names
        return PathFinder.find_spec(name, path, target) if is_there else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Installed]
sys.path[:] = [entry for entry in sys.path if entry != {root!r}]
sys.path.insert(0, {target!r})
"""


def what_pip_brings(names):
    """Return the modules of these distributions and of all that they require, without extras."""
    found, waiting = set(), [*names]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return {
        module
        for module, owners in packages_distributions().items()
        if any(canonicalize_name(owner) in found for owner in owners)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run_light(installed, code, **kwargs):
    """Run code in a process that can import the functions' dependencies only."""
    allowed = what_pip_brings(LIGHT) | {"grpo_core"}
    begin = ONLY_LIGHT.format(allowed=allowed, root=str(ROOT), target=str(installed))
    command = [sys.executable, "-P", "-c", begin + code]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True, check=False, **kwargs)


@pytest.mark.medium
def test_wheel_contains_only_grpo_core(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grpo_core/__init__.py", "grpo_core/py.typed"} <= names
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"grpo_core"}
    assert not [name for name in names if name.endswith("entry_points.txt")]
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    written = email.message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    required = {line.split(">")[0] for line in written.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == LIGHT
    assert written["Version"] == grpo_core.__version__


@pytest.mark.medium
def test_wheel_functions_work_with_light_dependencies(installed):
    code = """
import grpo_core, torch
assert grpo_core.__file__.startswith({target!r}), grpo_core.__file__
assert "mpmath" not in sys.modules
advantages = grpo_core.normalize_group_rewards(torch.tensor([1.0, 0.0]), 2)
assert advantages[0] > 0 > advantages[1]
assert grpo_core.question_only_reward_fn(r"\\\\boxed{{1/2}}", "0.5")["reward"] == 1.0
print("fine")
"""
    done = run_light(installed, code.format(target=str(installed)))
    assert done.stdout == "fine\n", done.stderr


def test_light_environment_lacks_heavy_packages():
    allowed = what_pip_brings(LIGHT)
    assert {"torch", "sympy", "jaxtyping", "beartype", "mpmath"} <= allowed
    assert not {"tyro", "transformers", "rich", "vllm", "matplotlib", "wandb", "safetensors", "httpx"} & allowed
