"""The pages describe what is there: snippets run, names are documented, papers are listed, links lead somewhere."""

import re
from pathlib import Path

import pytest

import grpo_core

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED_BY_THEIR_FILE = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_of_a_page_run(page):
    """The Python blocks of a page, one after the other; a block that shows an error shows the one it raises."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        shown = re.search(r"^# (\w+Error): .*?'(\w+)'", block, flags=re.MULTILINE)
        if shown:
            with pytest.raises(Exception, match=shown[2]) as raised:
                exec(compile(block, str(page), "exec"), names)
            assert type(raised.value).__name__ == shown[1]
        else:
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("name", grpo_core.__all__)
def test_a_public_name_stands_in_the_reference(name):
    value = getattr(grpo_core, name)
    module = getattr(value, "__module__", "grpo_core.types")
    module = module if module.startswith("grpo_core.") else "grpo_core.types"
    assert f"::: {module}\n" in DOCUMENTED_BY_THEIR_FILE + "\n"


def test_papers_of_docstrings_are_listed():
    listed = (ROOT / "docs/papers.md").read_text()
    cited = {
        number
        for file in (ROOT / "grpo_core").glob("*.py")
        for number in re.findall(r"arXiv:(\d{4}\.\d{5})", file.read_text())
    }
    assert cited
    assert not {number for number in cited if number not in listed}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), target


def test_the_verbs_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    verbs = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"train", "test"} <= verbs
    assert all(re.search(rf"^{verb}:", makefile, flags=re.MULTILINE) for verb in verbs)
