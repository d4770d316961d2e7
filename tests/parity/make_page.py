"""Write docs/parity.md from what is measured now: `make parity`."""

from collections import Counter
from pathlib import Path

import torch

from tests.parity import peers
from tests.parity.claims import CLAIMS, Claim
from tests.parity.members import SECTIONS, SEEDS, TOLERANCE, Measured, Row, measure

PAGE = Path(__file__).resolve().parents[2] / "docs/parity.md"

INTRODUCTION = """# Parity with the originals

This page is written by `make parity`; nothing on it is typed by hand but the reasons. TRL {TRL}, verl {verl} and Liger
{Liger} run their own code, from the Python Package Index, beside ours on {cases} random batches of ragged responses in
float64 (torch {torch}). Of TRL's trainers the methods themselves are called, with a model that returns the
log-probabilities of the batch.

A difference is the largest one, over the largest value of theirs: of the loss (or of the advantages, weights, masks
compared), and of its gradient in the log-probabilities of the policy. Up to {tolerance:g} it is called equal; much
of what is not zero is their float32. Where a row is different, its reason was checked: our call with that one thing
changed is equal to theirs. {summary}

`tests/parity/members.py` holds the calls of every row, `tests/parity/claims.py` those of the last table. There is no
row for what none of the three has: `compute_pass_at_k_advantages`, `compute_pkpo_advantages`,
`compute_maxrl_advantages`, `compute_cosine_length_reward`, prompt_mean.
"""

CLAIMS_INTRODUCTION = """## Claims of the specification, checked

The specification of the family was read from TRL 1.10 and from verl as of August 2026. Here is what it says of them,
as far as it can be executed, and what the versions above do. A corrected claim is wrong today, whatever it was then.
What it says of OpenRLHF, SkyRL, prime-rl, open-instruct, oat and nano-aha-moment is not checked here.
"""


def row_start(row: Row, measured: Measured) -> str:
    """The cells that decide."""
    return f"| {row.member} | {row.peer} {row.setting} | {measured.verdict} |"


def claim_start(claim: Claim, holds: bool) -> str:
    return f"| {claim.section} | {claim.text} | {'holds' if holds else 'corrected'} |"


def main() -> None:
    measured = {section: [(row, measure(row)) for row in rows] for section, rows in SECTIONS.items()}
    checked = [(claim, *claim.check()) for claim in CLAIMS]
    PAGE.write_text("\n".join(_lines(measured, checked)) + "\n")
    print(f"{PAGE.name}: {_summary(measured)}")
    print(f"claims: {dict(Counter('hold' if holds else 'corrected' for _, holds, _ in checked))}")


def _lines(measured: dict[str, list[tuple[Row, Measured]]], checked: list[tuple[Claim, bool, str]]) -> list[str]:
    lines = [
        INTRODUCTION.format(
            **peers.versions(),
            cases=len(SEEDS),
            torch=torch.__version__,
            tolerance=TOLERANCE,
            summary=_summary(measured),
        )
    ]
    for section, rows in measured.items():
        lines += [
            f"## {section}",
            "",
            "| ours | theirs | verdict | value | gradient | because |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"{row_start(row, found)} {_difference(found.value)} | {_difference(found.gradient)} | {row.because} |"
            for row, found in rows
        ]
        lines.append("")
    lines += [CLAIMS_INTRODUCTION, "| section | claim | verdict | found |", "|---|---|---|---|"]
    return lines + [f"{claim_start(claim, holds)} {found} |" for claim, holds, found in checked]


def _difference(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.0e}"


def _summary(measured: dict[str, list[tuple[Row, Measured]]]) -> str:
    kinds = Counter(
        "equal" if found.verdict == "equal to 1e-6" else "equal up to a factor" if found.factors else "different"
        for rows in measured.values()
        for _, found in rows
    )
    return (
        f"Of {sum(kinds.values())} rows, "
        + ", ".join(f"{kinds[kind]} are {kind}" for kind in sorted(kinds, reverse=True))
        + "."
    )


if __name__ == "__main__":
    if peers.MISSING:
        raise SystemExit(f"{', '.join(peers.MISSING)} missing: make parity installs what is needed")
    torch.set_num_threads(1)
    main()
