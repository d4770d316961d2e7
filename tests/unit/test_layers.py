"""Who imports whom: a file of the core imports lower rows only, so that the picture in docs/design.md stays true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"types", "_check", "_expression", "_sweep", "_kernels"},
    {"_groups", "_ratios", "masking", "distributions", "shaping", "_forward", "_symbolic", "_spelling"}
    | {"_linear_head"},
    {"advantages", "pass_at_k", "losses", "token_losses", "sequence_losses", "selection", "kl", "importance"}
    | {"aggregation", "diagnostics", "tokenization", "scoring", "group_rows", "grading", "rewards"},
    {"steps", "fused_head"},
    {"__init__"},
]
# Neighbors that may know each other, in one direction.
SIDEWAYS = {("rewards", "grading"), ("group_rows", "scoring"), ("_sweep", "_kernels")}
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
CORE = sorted((ROOT / "grpo_core").glob("*.py"))
FOREIGN = {"drivers", "transformers", "vllm", "tyro", "wandb", "numpy"}


def imported_by(path: Path) -> set[str]:
    """Modules that the file names in an import statement, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write the package name out"
            # `from grpo_core import _symbolic` names a file too.
            modules |= (
                {f"grpo_core.{alias.name}" for alias in node.names} if node.module == "grpo_core" else {node.module}
            )
    return modules


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_a_file_imports_lower_rows_only(path):
    assert path.stem in ROW_OF, "a new file needs a row"
    for module in imported_by(path):
        package, _, name = module.partition(".")
        assert package not in FOREIGN
        assert name in ROW_OF or package != "grpo_core", f"{name} needs a row"
        if package == "grpo_core":
            lower = ROW_OF[name] < ROW_OF[path.stem] or (path.stem, name) in SIDEWAYS
            assert lower, f"{path.stem} imports {name}"


def test_the_reference_owes_nothing_to_its_subject():
    for name in ("reference", "objectives", "estimators"):
        assert imported_by(ROOT / f"tests/oracle/{name}.py") <= {"math", "itertools"}


def test_importing_the_core_is_cheap():
    """What only drivers and graders need is not loaded with it."""
    code = "import sys, grpo_core; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = sorted(FOREIGN - {"numpy"} | {"math_verify", "sympy.parsing", "triton"})
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
