"""Save the checkpoints of a run and publish its final model."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from drivers.common import distributed
from drivers.common.atomic_files import free_path, remove_unfinished
from drivers.common.errors import TrainingAbortedError, first_line
from drivers.runs.checkpoint import WRITE_ERRORS, publish_model, read_state_values, save_checkpoint
from drivers.runs.folder import find_newest_checkpoint, prune_checkpoints
from drivers.settings.grpo import GrpoConfig
from drivers.training.state import TrainingState


class Checkpointer:
    """Writes into the folder of one run."""

    def __init__(
        self,
        config: GrpoConfig,
        folder: Path,
        tokenizer: Any,
        warn: Callable[[str], None],
        sync_log: Callable[[], None],
        data: str | None,
    ) -> None:
        """Flush the log with `sync_log` before each checkpoint, which must not exist without its log lines.

        `data`, the fingerprint of the run's prompts and answers, is kept in every resumable checkpoint.
        """
        self._config, self._folder, self._tokenizer = config, folder, tokenizer
        self._warn, self._sync_log, self._data = warn, sync_log, data

    def save(self, policy: nn.Module, state: TrainingState, name: str) -> Path | None:
        """Write a checkpoint and prune older ones. It is resumable unless the state is inside a step.

        If it cannot be written, warn and return None: earlier checkpoints stay and the run continues. With several
        ranks, and after the last step, raise a TrainingAbortedError instead.
        """
        folder = self._folder / name
        try:
            self._sync_log()
            values, tensors = {"step": state.step}, None
            if state.is_at_snapshot:
                values, tensors = state.values() | ({"data": self._data} if self._data else {}), state.tensors()
            save_checkpoint(policy, self._tokenizer, folder, values=values, tensors=tensors)
        except WRITE_ERRORS as error:
            reason = f"{folder}: the checkpoint cannot be written ({first_line(error)})"
            if distributed.size() > 1 or state.step == self._config.n_grpo_steps:
                raise TrainingAbortedError(reason) from error
            with suppress(OSError):
                remove_unfinished(self._folder)
            newest = find_newest_checkpoint(self._folder)
            self._warn(f"{reason}; the run continues, and its last checkpoint is {newest.name if newest else 'none'}")
            return None
        if distributed.is_rank_zero():
            try:
                prune_checkpoints(self._folder, state.accuracies, self._config.keep_checkpoints)
            except (OSError, ValueError, KeyError) as error:  # a checkpoint that cannot be pruned must not end the run
                self._warn(f"{self._folder}: earlier checkpoints cannot be pruned ({first_line(error)})")
        return folder

    def latest(self, state: TrainingState) -> Path | None:
        """Return the newest checkpoint if it contains all updates so far, and None otherwise."""
        newest = find_newest_checkpoint(self._folder)
        if newest is None or not state.is_at_snapshot:
            return None
        return newest if read_state_values(newest)["step"] == state.saved_step else None

    def publish(self, state: TrainingState, name: str) -> Path:
        """Copy the model of the latest checkpoint, which must contain all updates, to the folder `name`."""
        checkpoint, folder = distributed.run_on_rank_zero(partial(self.latest, state)), self._folder / name
        if checkpoint is None:
            raise RuntimeError(f"{folder}: no checkpoint contains step {state.step}")
        try:
            distributed.run_on_rank_zero(partial(publish_model, checkpoint, folder))
        except OSError as error:
            raise TrainingAbortedError(
                f"{folder}: cannot be written ({first_line(error)}); the same model is in {checkpoint}/"
            ) from error
        return folder

    def free_name(self, name: str) -> str:
        """Return `name`, or if an earlier process of this run has used it, `name-2` and so on."""
        return free_path(self._folder / name).name
