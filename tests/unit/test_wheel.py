"""The wheel: what is in it, what it asks for, and that it works without this repository."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = {"torch", "einops", "jaxtyping", "beartype", "mpmath"}
"""What the functions need. mpmath is loaded when two answers are compared as expressions, and not before."""

ONLY_LIGHT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name}}", name=name.split(".")[0])
sys.meta_path.insert(0, Refuse())
sys.path[:] = [entry for entry in sys.path if entry != {root!r}]
sys.path.insert(0, {target!r})
"""
REFUSED = {"transformers", "tyro", "rich", "vllm", "matplotlib", "wandb", "safetensors", "peft", "httpx", "accelerate"}


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
    """In a process that has what the functions need, and nothing of what the programs need."""
    begin = ONLY_LIGHT.format(refused=REFUSED, root=str(ROOT), target=str(installed))
    command = [sys.executable, "-P", "-c", begin + code]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True, check=False, **kwargs)


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"grpo_core/__init__.py", "grpo_core/py.typed", "drivers/py.typed", "drivers/train.py"} <= names
    assert {f"drivers/report.{kind}" for kind in ("py", "html", "css", "js")} <= names
    assert "drivers/shipped/data/wordadd/train.jsonl" in names
    assert not {name for name in names if name.startswith(("tests", "docs", "data"))}
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    written = email.message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    required = {line.split(">")[0] for line in written.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == LIGHT
    (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "grpo-train = drivers.commands:train" in zipfile.ZipFile(wheel).read(scripts).decode()


def test_the_functions_work_with_light_packages_alone(installed):
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


@pytest.mark.slow
def test_a_command_says_which_package_is_missing(installed):
    done = run_light(installed, "from drivers.commands import train; train()")
    assert done.returncode == 2
    assert done.stderr.startswith("grpo-train: the package ")
    assert "pip install 'grpo_core[gpu]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_each_command_is_its_program(installed):
    """From another folder, without the repository; the shipped data are found."""
    code = f"""
import sys
from importlib.metadata import EntryPoint
sys.path[:] = [{str(installed)!r}, *(entry for entry in sys.path if entry != {str(ROOT)!r})]
from drivers.config import repository_path
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
