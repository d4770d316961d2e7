"""Summarize the grades of many responses."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from drivers.grading.verdicts import Graded

STANDARD = ("reward", "format_reward", "answer_reward")
"""What of a score has a meaning to the programs; what else a reward function returns is logged as `part_NAME`."""


def name_parts(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """A score by the names that it is logged under."""
    return {name if name in STANDARD else f"part_{name}": value for name, value in scores.items()}


def describe_grades(graded: Sequence[Graded]) -> dict[str, float]:
    """What could not be graded, and the mean of each part that has no meaning to the programs."""
    values: dict[str, list[float]] = {}
    for name, value in (item for verdict in graded for item in name_parts(verdict.scores).items()):
        if value is not None and name not in STANDARD:
            values.setdefault(name, []).append(value)
    whys = [verdict.why for verdict in graded]
    return {
        "unscored": sum(not verdict.is_scored for verdict in graded) / len(graded),
        "grader_timeouts": float(whys.count("timeout")),
        "grader_errors": float(whys.count("error")),
        "grader_not_finite": float(whys.count("not_finite")),
        **{name: fmean(values[name]) for name in sorted(values)},
    }
