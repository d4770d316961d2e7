"""The components that a training loop combines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from drivers.engines.conversations import Rollout
from drivers.engines.protocol import RolloutEngine
from drivers.engines.teacher_server import TeacherServer
from drivers.grading.pool import GradingPool
from drivers.grading.verdicts import Grader
from drivers.tasks.questions import Question


@dataclass(frozen=True)
class Components:
    """Models, engine, grader and data of a run."""

    policy: nn.Module
    engine: RolloutEngine
    grade: Grader
    train_set: Sequence[Question]
    val_set: Sequence[Question]
    """Held-out questions that decide which checkpoint is the best."""
    reference: nn.Module | None = None
    """Frozen copy of the initial policy, for the KL penalty. None if none is needed, or with LoRA."""
    other_val_sets: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    """Further sets of held-out questions by name."""
    teacher: nn.Module | TeacherServer | None = None
    """Frozen model of `--teacher`, or the server that has it."""
    rollout: Rollout | None = None
    """The function of `--rollout`."""

    def close(self) -> None:
        """End the processes that sample and grade."""
        try:
            self.engine.close()
        finally:
            if isinstance(self.grade, GradingPool):
                self.grade.close()
