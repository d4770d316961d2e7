"""What a mutant is: one replacement in one file of grpo_core, and the tests that ought to notice it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`before`, found exactly once in `file`, becomes `after`."""

    function: str
    name: str
    file: str
    before: str
    after: str
    tests: str
    """Arguments of pytest, as in a shell: files, cheapest first, and often a `-k`."""
    needs: str = ""
    """A package without which those tests are skipped."""


def breaks(function: str, file: str, tests: str, *changes: tuple[str, str, str], needs: str = "") -> list[Mutant]:
    """The mutants of one function: a name, what stands there, and what comes in its place."""
    return [Mutant(function, name, file, before, after, tests, needs) for name, before, after in changes]
