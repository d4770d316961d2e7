"""docs/pitfalls.md has thirty answers, each with reports and with tests that `make test` runs."""

import re

import pytest

from tests.named_tests import ROOT, find_tests

PAGE = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
ANSWERS = PAGE.split("\n## ")[1:]


def test_pitfalls_page_has_thirty_answers():
    assert [answer.partition(". ")[0] for answer in ANSWERS] == [str(number) for number in range(1, 31)]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.partition("\n")[0])
def test_pitfall_names_reports_and_existing_tests(answer):
    reports = answer.split("\n\n")[1]
    assert re.fullmatch(r"((^|,\s)(\S+ )?\[\d+\]\(https://github\.com/[\w.-]+/[\w.-]+/issues/\d+\))+\.", reports)
    named = re.findall(r"`(tests/[^`]+)`", answer)
    assert named
    assert set(named) - find_tests() == set()
