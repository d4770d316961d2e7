"""docs/parity.md agrees with TRL, verl and Liger as they run now. Skipped if they are not installed."""

import pytest
import torch

from tests.parity import peers
from tests.parity.claims import CLAIMS
from tests.parity.make_page import PAGE, claim_start, row_start
from tests.parity.members import SECTIONS, Row, clip, mean, measure

ROWS = [row for rows in SECTIONS.values() for row in rows]
needs_peers = pytest.mark.skipif(
    bool(peers.MISSING), reason=f"not installed: {', '.join(peers.MISSING)}; make parity installs and runs them"
)


@pytest.fixture(autouse=True)
def _rng():
    """Protect the global generator, which TRL's trainers seed in their constructor."""
    with torch.random.fork_rng():
        yield


def test_the_page_has_these_rows_and_no_others():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    starts = [f"| {row.member} | {row.peer} {row.setting} |" for row in ROWS]
    starts += [f"| {claim.section} | {claim.text} |" for claim in CLAIMS]
    found = [start for start in starts if any(line.startswith(start) for line in lines)]
    headers = len(SECTIONS) + 1
    assert found == starts
    assert len(lines) == len(starts) + headers
    assert len(set(starts)) == len(starts)


def test_the_page_names_the_pinned_versions():
    pins = (PAGE.parents[1] / ".ci/requirements-parity.txt").read_text()
    for name, package in {"TRL": "trl", "verl": "verl", "Liger": "liger-kernel"}.items():
        version = next(line.split("==")[1] for line in pins.splitlines() if line.startswith(f"{package}=="))
        assert f"{name} {version}" in " ".join(PAGE.read_text().split())


@pytest.mark.parametrize(
    ("theirs", "changed", "verdict"),
    [
        (lambda c: mean(c, clip(c)), None, "equal"),
        (lambda c: 3.5 * mean(c, clip(c)), None, "equal up to the factor 3.5"),
        (lambda c: len(c.mask) * mean(c, clip(c)), None, "equal up to a factor per batch, 8 to 14"),
        (lambda c: mean(c, clip(c)) + 1, lambda c: mean(c, clip(c)) + 1, "gradient equal, value different"),
        (lambda c: mean(c, clip(c, dual=3.0)), lambda c: mean(c, clip(c, dual=3.0)), "different"),
        (lambda c: mean(c, clip(c, dual=3.0)), lambda c: mean(c, clip(c, dual=3.1)), "different, NOT EXPLAINED"),
        (lambda c: mean(c, clip(c)) * (1 + 1e-5), None, "equal up to the factor 1"),
    ],
)
def test_the_measurement_tells_apart(theirs, changed, verdict):
    """Check every kind of verdict, wrong reasons included."""
    assert measure(Row("", "", "", lambda c: mean(c, clip(c)), theirs, "", changed)).verdict == verdict


@needs_peers
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_verdict_is_what_is_measured(row):
    measured = measure(row)
    assert row_start(row, measured) in PAGE.read_text(), measured
    equal = measured.verdict == "equal"
    assert bool(row.because) != equal, "a reason is given where, and only where, there is a difference"
    assert equal or measured.explained, f"the reason does not account for the difference: {measured}"


@needs_peers
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_is_what_is_found(claim):
    holds, found = claim.check()
    assert claim_start(claim, holds) in PAGE.read_text(), found
