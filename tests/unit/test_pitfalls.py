"""docs/pitfalls.md has thirty answers, each with reports and with tests that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
ANSWERS = PAGE.split("\n## ")[1:]


@cache
def functions_of(file: str) -> set[str]:
    """Return the functions of a test file by parsing it; an import would load torch and vLLM."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_pitfalls_page_has_thirty_answers():
    assert [answer.partition(". ")[0] for answer in ANSWERS] == [str(number) for number in range(1, 31)]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.partition("\n")[0])
def test_pitfall_names_reports_and_existing_tests(answer):
    reports = answer.split("\n\n")[1]
    assert re.fullmatch(r"((^|,\s)(\S+ )?\[\d+\]\(https://github\.com/[\w.-]+/[\w.-]+/issues/\d+\))+\.", reports)
    named = re.findall(r"`(tests/[^`]+)`", answer)
    assert named
    missing = []
    for test in named:
        file, _, name = test.partition("::")
        if not name.startswith("test_") or name not in functions_of(file):
            missing.append(test)
    assert not missing
