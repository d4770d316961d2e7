"""Rules of the test suite itself."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def list_imports(source: str) -> set[str]:
    """Return the dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_test_module(name: str) -> bool:
    return name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))


def test_list_imports_finds_every_form():
    source = "import tests.a.test_b\nfrom tests.a import test_c as d\ndef f():\n    from tests.a.test_e import go\n"
    assert sorted(filter(imports_test_module, list_imports(source))) == [
        *("tests.a.test_b", "tests.a.test_c", "tests.a.test_e.go")
    ]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_no_test_module_is_imported(file):
    """What several test modules share is in a helper module, so that each of them can be read and moved alone."""
    assert not sorted(filter(imports_test_module, list_imports(file.read_text(encoding="utf-8"))))


def test_items_of_a_group_run_in_one_process(request):
    """Two engines at once would need more memory and time than their tests allow.

    pytest-xdist appends the group to the name of a test and schedules by that name. Its version 3.8 has no effect
    under pytest 9.2.
    """
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process runs all tests, or groups are not in use")
    items = request.session.items
    assert all(item.get_closest_marker("xdist_group") for item in items if item.get_closest_marker("vllm"))
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    assert not [item.nodeid for item in grouped if "@" not in item.nodeid.rpartition("]")[2]]
