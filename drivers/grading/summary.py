"""Summarize the grades of many responses."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from drivers.grading.verdicts import Graded, GradeStatus

STANDARD = ("reward", "format_reward", "answer_reward")
"""Numbers that the programs use. Any other number of a reward function is logged as `part_NAME`."""


def name_parts(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return scores under the names that the log uses."""
    return {name if name in STANDARD else f"part_{name}": value for name, value in scores.items()}


def describe_grades(graded: Sequence[Graded]) -> dict[str, float]:
    """Return the rates of ungraded responses, and the mean of each other number by name."""
    values: dict[str, list[float]] = {}
    for name, value in (item for verdict in graded for item in name_parts(verdict.scores).items()):
        if value is not None and name not in STANDARD:
            values.setdefault(name, []).append(value)
    statuses = [verdict.status for verdict in graded]
    return {
        "unscored": sum(not verdict.is_scored for verdict in graded) / len(graded),
        "grader_timeouts": float(statuses.count(GradeStatus.TIMEOUT)),
        "grader_errors": float(statuses.count(GradeStatus.ERROR)),
        "grader_not_finite": float(statuses.count(GradeStatus.NOT_FINITE)),
        **{name: fmean(values[name]) for name in sorted(values)},
    }
