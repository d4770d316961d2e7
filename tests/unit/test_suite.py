"""Rules of the test suite itself."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import LONGEST, apply_markers, order_by_duration

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


def test_readme_names_every_test_module_and_no_other():
    named = set(re.findall(r"`([a-z]+/test_\w+\.py)`", (TESTS / "README.md").read_text(encoding="utf-8")))
    assert named == {str(file.relative_to(TESTS)) for file in TESTS.rglob("test_*.py")}


class Item:
    """A collected test with the marks of another, to which marks can be added without effect on the session."""

    def __init__(self, item=None, marks=(), originalname=""):
        self.originalname = originalname
        self.name, self.marks = getattr(item, "nodeid", ""), [*(item.iter_markers() if item else ()), *marks]

    def get_closest_marker(self, name):
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, decorator):
        self.marks.append(decorator.mark)

    @property
    def skip_reasons(self):
        return [mark.kwargs["reason"] for mark in self.marks if mark.name == "skip"]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_vllm_on_cpu_is_skipped_where_vllm_is_built_for_cuda(request, on_cpu):
    """This holds for every test of the session that starts vLLM, and for no test that needs a GPU."""
    items = [Item(marks=[pytest.mark.vllm.mark]), Item(marks=[pytest.mark.vllm.mark, pytest.mark.gpu.mark])]
    items += [Item(item) for item in request.session.items if item.get_closest_marker("vllm")]
    for item in items:
        item.marks = [mark for mark in item.marks if mark.name != "skip"]
    apply_markers(items, nightly=True, on_cpu=on_cpu)
    for item in items:
        is_cpu_test = item.get_closest_marker("gpu") is None
        assert bool(item.skip_reasons) == (is_cpu_test and not on_cpu), item.name
        assert item.get_closest_marker("slow"), item.name


def test_gpu_tests_are_skipped_without_gpu(request):
    """The condition stands at each module: no test marked gpu lacks it."""
    for item in request.session.items:
        if item.get_closest_marker("gpu"):
            assert item.get_closest_marker("skipif"), item.nodeid


@pytest.mark.parametrize("nightly", [True, False])
def test_nightly_repetitions_run_with_their_flag_only(nightly):
    item = Item(marks=[pytest.mark.nightly.mark])
    apply_markers([item], nightly=nightly, on_cpu=True)
    assert bool(item.skip_reasons) is not nightly
    assert item.get_closest_marker("slow")


def test_longest_tests_start_first():
    ranks = [order_by_duration(Item(marks=marks)) for marks in ([pytest.mark.vllm.mark], [pytest.mark.slow.mark], [])]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 3
    source = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    for name in LONGEST:
        assert source.count(f"def {name}(") == 1
        assert order_by_duration(Item(originalname=name)) < ranks[0]
