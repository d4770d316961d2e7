"""The tests that pages of the documentation may name."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def find_tests() -> frozenset[str]:
    """Return `file::name` of each test that runs without --nightly; the files are parsed, because imports are slow."""
    return frozenset(
        f"{file.relative_to(ROOT)}::{node.name}"
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and "pytest.mark.nightly" not in {ast.unparse(decorator) for decorator in node.decorator_list}
    )
