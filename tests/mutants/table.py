"""What a mutant is: one replacement in one file of grpo_core or drivers, and the tests that ought to notice it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`before`, found exactly once in `file`, becomes `after`."""

    function: str
    name: str
    file: str
    """Path within grpo_core, or from `drivers/` on."""
    before: str
    after: str
    tests: str
    """Arguments of pytest, as in a shell: files, cheapest first, and often a `-k`."""
    needs: str = ""
    """A package without which those tests are skipped."""

    @property
    def is_of_drivers(self) -> bool:
        return self.file.startswith("drivers/")

    @property
    def path(self) -> str:
        """Return the path of the file within the repository."""
        return self.file if self.is_of_drivers else f"grpo_core/{self.file}"

    @property
    def subject(self) -> str:
        """Return what mutants are counted by: the function of grpo_core, or the file of drivers."""
        return self.file if self.is_of_drivers else self.function

    def __str__(self) -> str:
        where = f"{self.file} " if self.is_of_drivers else ""
        return f"{where}{self.function}: {self.name}"


def breaks(function: str, file: str, tests: str, *changes: tuple[str, str, str], needs: str = "") -> list[Mutant]:
    """The mutants of one function: a name, what stands there, and what comes in its place."""
    return [Mutant(function, name, file, before, after, tests, needs) for name, before, after in changes]
