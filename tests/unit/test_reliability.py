"""Each promise of docs/reliability.md names tests that exist and that `make test` runs."""

import re

import pytest

from tests.named_tests import ROOT, find_tests

PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
BULLETS = re.findall(r"^- (?:.+\n)+?(?=- |\n)", PAGE, flags=re.MULTILINE)
ROWS = re.findall(r"\|\n(?:\|(?:-+\|)+\n)((?:\|.+\n)+)", PAGE)
PROMISES = [*BULLETS, *(row for rows in ROWS for row in rows.splitlines())]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.strip("-|* \n")[:30])
def test_promise_names_a_test(promise):
    assert re.search(r"`test_\w+`", promise)


def test_reliability_page_names_tests_that_run():
    assert len(PROMISES) > 30
    existing = {test.partition("::")[2] for test in find_tests()}
    assert set(re.findall(r"`(test_\w+)`", PAGE)) - existing == set()
