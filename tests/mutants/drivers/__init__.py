"""Mutants of the programs, by folder of drivers/."""

from tests.mutants.drivers import (
    datasets,
    engines,
    evaluation,
    grading,
    policy,
    programs,
    reports,
    runs,
    settings,
    sweeps,
    tasks,
    training,
)
from tests.mutants.table import Mutant

TABLES = (programs, training, evaluation, grading, engines, policy, runs, settings, tasks, datasets, sweeps, reports)
MUTANTS: list[Mutant] = [mutant for table in TABLES for mutant in table.MUTANTS]
