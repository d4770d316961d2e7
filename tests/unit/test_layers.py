"""Imports that import-linter's contracts in pyproject.toml do not cover."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_core

ROOT = Path(__file__).resolve().parents[2]
CORE = sorted((ROOT / "grpo_core").rglob("*.py"))
FOLDERS = sorted(path.parent.name for path in CORE if path.name == "__init__.py" and path.parent.name != "grpo_core")
FOREIGN = {"drivers", "transformers", "vllm", "tyro", "wandb", "numpy"}


def imported_modules(path: Path) -> set[str]:
    """Return the modules that the file names in import statements, those inside functions included."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write the package name out"
            # `from grpo_core.grading import _symbolic` names a file, not a name of the folder.
            package = ROOT.joinpath(*node.module.split("."))
            files = {alias.name for alias in node.names if (package / f"{alias.name}.py").exists()}
            modules |= {f"{node.module}.{name}" for name in files} or {node.module}
    return modules


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_file_imports_no_foreign_package(path):
    assert not {module.partition(".")[0] for module in imported_modules(path)} & FOREIGN


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_core_file_inside_a_folder_imports_no_folder_surface(path):
    """`from grpo_core.losses import x` inside the package would make the order of imports matter."""
    if path.name != "__init__.py":
        assert not imported_modules(path) & {"grpo_core", *(f"grpo_core.{folder}" for folder in FOLDERS)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_namespace_exports_the_public_names_of_its_files(folder):
    namespace = getattr(grpo_core, folder)
    inside = {
        name
        for name in grpo_core.__all__
        if getattr(getattr(grpo_core, name), "__module__", "").startswith(f"grpo_core.{folder}.")
    }
    assert set(namespace.__all__) == inside
    assert all(getattr(namespace, name) is getattr(grpo_core, name) for name in inside)


@pytest.mark.parametrize("package", ["grpo_core", "drivers"])
def test_file_has_at_most_400_lines(package):
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / package).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400}


def test_oracle_imports_nothing_of_its_subject():
    for name in ("reference", "objectives", "estimators"):
        assert imported_modules(ROOT / f"tests/oracle/{name}.py") <= {"math", "itertools"}


@pytest.mark.medium
def test_importing_the_core_loads_no_heavy_package():
    """Packages that only drivers and graders need are not loaded with the core."""
    code = "import sys; from grpo_core import *; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = sorted(FOREIGN - {"numpy"} | {"math_verify", "sympy.parsing", "triton"})
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
