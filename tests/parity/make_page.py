"""Measure every row and claim, and write docs/parity.md: `make parity`."""

from collections import Counter
from pathlib import Path

import torch

from tests.parity import peers
from tests.parity.claims import CLAIMS, Claim
from tests.parity.members import SECTIONS, SEEDS, TOLERANCE, Measured, Row, measure

PAGE = Path(__file__).resolve().parents[2] / "docs/parity.md"

INTRODUCTION = """# Parity with TRL, verl and Liger

`make parity` writes this page: everything except the reasons is measured. TRL {TRL}, verl {verl} and Liger
{Liger} from PyPI run beside our functions on {cases} random batches of ragged responses in float64 (torch {torch}).
TRL's trainer methods are called directly, with a model that returns the log-probs of the batch.

*Value* is the largest difference between both results (loss, advantages, weights or mask), relative to the largest
value of theirs. *Gradient* is the same for the loss's gradient with respect to the policy's log-probs. Differences up
to {tolerance:g} count as equal; many come from float32 arithmetic on their side. Every reason was verified: with that
one change, our call equals theirs. {summary}

The calls are in `tests/parity/members.py` and `tests/parity/claims.py`. These have no counterpart in any of the
three: `compute_pass_at_k_advantages`, `compute_pkpo_advantages`, `compute_maxrl_advantages`,
`compute_cosine_length_reward`, `keep_within_second_moment`, the aggregation prompt_mean, and log-probs over the tokens
that a sampler kept.
"""

CLAIMS_INTRODUCTION = """## Claims of the specification, checked

The family was specified from TRL 1.10 and verl as of August 2026. This table checks each executable claim about them
against the versions above. *Corrected* means that the claim is wrong today. Claims about OpenRLHF, SkyRL, prime-rl,
open-instruct, oat and nano-aha-moment are not checked.
"""


def row_start(row: Row, measured: Measured) -> str:
    """Return the start of a row, up to its verdict."""
    return f"| {row.member} | {row.peer} {row.setting} | {measured.verdict} |"


def claim_start(claim: Claim, holds: bool) -> str:
    """Return the start of a claim's row, up to its verdict."""
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
            "| ours | theirs | verdict | value | gradient | reason |",
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
        "equal" if found.verdict == "equal" else "equal up to a factor" if found.factors else "different"
        for rows in measured.values()
        for _, found in rows
    )
    return (
        f"Of {sum(kinds.values())} rows, "
        + ", ".join(f"{kinds[kind]} are {kind}" for kind in ("equal", "equal up to a factor", "different"))
        + "."
    )


if __name__ == "__main__":
    if peers.MISSING:
        raise SystemExit(f"{', '.join(peers.MISSING)} missing: make parity installs what is needed")
    torch.set_num_threads(1)
    main()
