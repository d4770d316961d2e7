"""All that the next step of a run depends on, beside its settings, its data and its engine: one value."""

import math
import random
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from drivers.batch import Collected
from drivers.config import GrpoConfig
from drivers.guards import N_NORMS
from drivers.objective import EntropyBonus
from drivers.optim import PolicyOptimizer


class TrainingState:
    """Weights and optimizer, where data and noise stand, what is carried from step to step."""

    def __init__(self, config: GrpoConfig, policy: nn.Module) -> None:
        self.step = 0
        """The last step whose updates are all in the weights."""
        self.optimizer = PolicyOptimizer(policy, config.learning_rate)
        self.bonus = EntropyBonus(config)
        self.draw = random.Random(config.seed)
        """Of questions. Only the first rank draws."""
        self.shuffle = torch.Generator().manual_seed(config.seed)
        """Of groups, into train batches."""
        self.pending: Collected | None = None
        """What was sampled ahead, for the step after `step`."""
        self.grad_norms: deque[float] = deque(maxlen=N_NORMS)
        """Of the last updates, those that were left out among them: a lasting rise must not be skipped for ever."""
        self.accuracies: dict[int, float] = {}
        """Of the evaluations so far, by step."""
        self.mark()

    def update(self, grad_norm: float, *, made: bool) -> bool:
        """Take the optimizer's step, or leave weights and moments as they are. Returns `made`."""
        if made:
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()
        if 0 < grad_norm < math.inf:  # 0 is no size to compare others with
            self.grad_norms.append(grad_norm)
        return made

    def mark(self) -> None:
        """A step has ended: this is what a checkpoint goes on from."""
        version, words, gauss = self.draw.getstate()
        facts: dict[str, Any] = {
            "step": self.step,
            "updates": self.optimizer.n_updates,
            "entropy_coef": self.bonus.value,
            "draw": [version, list(words), gauss],
            "shuffle": self.shuffle.get_state().tolist(),
            "grad_norms": list(self.grad_norms),
            "accuracies": list(self.accuracies.items()),
        }
        # In one assignment: a Ctrl-C before it leaves the last mark, whole.
        self._marked = (self.optimizer.n_updates, facts, self.pending)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was updated since `mark`: else the facts and the weights are of different moments."""
        return self.optimizer.n_updates == self._marked[0]

    def facts(self) -> dict[str, Any]:
        """What is not a tensor, as of the last `mark`; JSON gives it back as it was."""
        _, facts, pending = self._marked
        return facts | {"pending": None if pending is None else pending.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """Master weights and moments, by name: whoever writes into them restores them."""
        return self.optimizer.tensors()

    def restore(self, facts: dict[str, Any]) -> None:
        """After `tensors` were filled: the rest."""
        self.step = facts["step"]
        self.optimizer.restored(facts["updates"])
        self.bonus.value = facts["entropy_coef"]
        version, words, gauss = facts["draw"]
        self.draw.setstate((version, tuple(words), gauss))
        self.shuffle.set_state(torch.tensor(facts["shuffle"], dtype=torch.uint8))
        self.grad_norms = deque(facts["grad_norms"], maxlen=N_NORMS)
        self.accuracies = dict(facts["accuracies"])
        self.pending = None if facts["pending"] is None else Collected.from_json(facts["pending"])
        self.mark()
