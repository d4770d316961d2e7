"""Each promise of docs/reliability.md names tests that exist and that `make test` runs."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
BULLETS = re.findall(r"^- (?:.+\n)+?(?=- |\n)", PAGE, flags=re.MULTILINE)
ROWS = re.findall(r"\|\n(?:\|(?:-+\|)+\n)((?:\|.+\n)+)", PAGE)
PROMISES = [*BULLETS, *(row for rows in ROWS for row in rows.splitlines())]


@cache
def find_tests() -> frozenset[str]:
    """Return the tests that run without --nightly by parsing them; an import would load torch and vLLM."""
    return frozenset(
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and "pytest.mark.nightly" not in {ast.unparse(decorator) for decorator in node.decorator_list}
    )


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.strip("-|* \n")[:30])
def test_promise_names_a_test(promise):
    assert re.search(r"`test_\w+`", promise)


def test_reliability_page_names_tests_that_run():
    assert len(PROMISES) > 30
    assert set(re.findall(r"`(test_\w+)`", PAGE)) - find_tests() == set()
