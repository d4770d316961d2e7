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

ROOT = Path(__file__).resolve().parents[2]
LIGHT = {"torch", "einops", "jaxtyping", "beartype", "mpmath", "tyro"}
"""What the functions need; mpmath is loaded when two answers are compared as expressions, and not before. tyro is for
the help of the commands."""

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
    allowed = what_pip_brings(LIGHT) | {"grpo_core", "drivers"}
    begin = ONLY_LIGHT.format(allowed=allowed, root=str(ROOT), target=str(installed))
    command = [sys.executable, "-P", "-c", begin + code]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True, check=False, **kwargs)


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grpo_core/__init__.py", "grpo_core/py.typed", "drivers/py.typed", "drivers/train.py"} <= names
    assert {f"drivers/reports/page.{kind}" for kind in ("py", "html", "css", "js")} <= names
    assert "drivers/shipped/data/wordadd/train.jsonl" in names
    assert not {name for name in names if name.startswith(("tests", "docs", "data"))}
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    written = email.message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    required = {line.split(">")[0] for line in written.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == LIGHT
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "grpo-train = drivers.commands:train" in zipfile.ZipFile(wheel).read(scripts).decode()


def test_wheel_functions_work_with_light_dependencies(installed):
    code = """
import grpo_core, torch
assert grpo_core.__file__.startswith({target!r}), grpo_core.__file__
assert not {{"mpmath", "tyro"}} & sys.modules.keys()
advantages = grpo_core.normalize_group_rewards(torch.tensor([1.0, 0.0]), 2)
assert advantages[0] > 0 > advantages[1]
assert grpo_core.question_only_reward_fn(r"\\\\boxed{{1/2}}", "0.5")["reward"] == 1.0
print("fine")
"""
    done = run_light(installed, code.format(target=str(installed)))
    assert done.stdout == "fine\n", done.stderr


def test_light_environment_lacks_heavy_packages():
    allowed = what_pip_brings(LIGHT)
    assert {"torch", "sympy", "jaxtyping", "beartype", "mpmath", "tyro"} <= allowed
    assert not {"transformers", "rich", "vllm", "matplotlib", "wandb", "safetensors", "peft", "httpx"} & allowed


@pytest.mark.slow
def test_help_works_with_light_dependencies(installed):
    code = """
from drivers import commands
sys.argv = ["grpo", "--help"]
for program in ("train", "sft", "expert_iteration", "evaluate"):
    try:
        getattr(commands, program)()
    except SystemExit as ended:
        assert ended.code == 0
        print("helped by", program)
"""
    done = run_light(installed, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helped by") == done.stdout.count("--sampling-max-tokens INT") == 4, done.stdout


@pytest.mark.slow
def test_command_names_missing_package(installed):
    done = run_light(installed, "from drivers.commands import train; train()")
    assert done.returncode == 2
    assert "\ngrpo-train: the package " in f"\n{done.stderr}"
    assert "pip install 'grpo_core[gpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_command_runs_its_program(installed):
    """It runs from another folder, without the repository, and finds the shipped data."""
    code = f"""
import sys
from importlib.metadata import EntryPoint
sys.path[:] = [{str(installed)!r}, *(entry for entry in sys.path if entry != {str(ROOT)!r})]
from drivers.common.paths import repository_path
assert repository_path("data/wordadd/train.jsonl").is_relative_to({str(installed)!r})
for line in open({str(installed)!r} + "/" + sys.argv[1]).read().split("[console_scripts]")[1].split("\\n"):
    if line:
        name, _, value = line.partition(" = ")
        sys.argv = [name, "--help"]
        try:
            EntryPoint(name, value, "console_scripts").load()()
        except SystemExit as ended:
            assert not ended.code, name
        print("told by", name)
"""
    (scripts,) = (path.relative_to(installed) for path in installed.glob("*.dist-info/entry_points.txt"))
    command = [sys.executable, "-P", "-c", code, str(scripts)]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told by grpo-") == 10
    assert done.stdout.count("usage: ") == 10
