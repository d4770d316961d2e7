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
from drivers.runs.folder import drop_old_states, find_newest_checkpoint, prune_checkpoints
from drivers.settings.grpo import GrpoConfig
from drivers.training.disk import checkpoint_bytes, is_full
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
        self._has_failed = False
        self._newest: tuple[int, Path] | None = None
        """Step and folder of the checkpoint that this process has written last."""

    def save(self, policy: nn.Module, state: TrainingState, name: str) -> Path | None:
        """Write a checkpoint and prune older ones. It is resumable unless the state is inside a step.

        If it cannot be written, older training states are deleted to make room. If that does not help, warn and return
        None: earlier checkpoints stay and the run continues. With several ranks, and after the last step, raise a
        TrainingAbortedError instead.
        """
        folder = self._folder / name
        try:
            self._write(policy, state, folder)
        except WRITE_ERRORS as error:
            reason = f"{folder}: the checkpoint cannot be written ({first_line(error)})"
            if distributed.size() > 1:
                raise TrainingAbortedError(reason) from error
            if not self._write_with_less_room(policy, state, folder):
                with suppress(OSError):
                    remove_unfinished(self._folder)
                if state.step == self._config.n_grpo_steps:
                    raise TrainingAbortedError(reason) from error
                self._warn_of_failure(reason)
                return None
        self._has_failed, self._newest = False, (state.step, folder)
        if distributed.is_rank_zero():
            try:
                prune_checkpoints(self._folder, state.accuracies, self._config.keep_checkpoints)
            except (OSError, ValueError, KeyError) as error:  # a checkpoint that cannot be pruned must not end the run
                self._warn(f"{self._folder}: earlier checkpoints cannot be pruned ({first_line(error)})")
        return folder

    def _write(self, policy: nn.Module, state: TrainingState, folder: Path, *, with_state: bool = True) -> None:
        self._sync_log()
        values, tensors = {"step": state.step}, None
        if with_state and state.is_at_snapshot:
            values, tensors = state.values() | ({"data": self._data} if self._data else {}), state.tensors()
        save_checkpoint(policy, self._tokenizer, folder, values=values, tensors=tensors)

    def _write_with_less_room(self, policy: nn.Module, state: TrainingState, folder: Path) -> bool:
        """Write the checkpoint after older training states were deleted, and return whether that worked.

        After the last step, the model is worth more than the training state: it is written alone if there is no room
        for both, and at last in the place of the newest state.
        """
        if not is_full(self._folder, checkpoint_bytes(policy)):  # another reason, which room does not remove
            return False
        attempts = [(1, True)]
        if state.step == self._config.n_grpo_steps:
            attempts += [(1, False), (0, False)]
        for n_kept_states, with_state in attempts:
            try:
                remove_unfinished(self._folder)
                drop_old_states(self._folder, keep=n_kept_states)
                self._write(policy, state, folder, with_state=with_state)
            except (*WRITE_ERRORS, ValueError, KeyError):  # or an earlier checkpoint is damaged
                continue
            return True
        return False

    def _warn_of_failure(self, reason: str) -> None:
        """Warn once, until a checkpoint is written again."""
        if not self._has_failed:
            newest = find_newest_checkpoint(self._folder)
            last = newest.name if newest else "none"
            self._warn(f"{reason}; the run continues and tries again, and its last checkpoint is {last}")
        self._has_failed = True

    def latest(self, state: TrainingState) -> Path | None:
        """Return the newest checkpoint if it contains all updates so far, and None otherwise."""
        newest = find_newest_checkpoint(self._folder)
        if newest is None or not state.is_at_snapshot:
            return None
        return newest if read_state_values(newest)["step"] == state.saved_step else None

    def publish(self, state: TrainingState, name: str) -> Path:
        """Copy the model of the latest checkpoint, which must contain all updates, to the folder `name`."""
        folder = self._folder / name
        if self._newest is not None and self._newest[0] == state.step:
            checkpoint: Path | None = self._newest[1]  # of the model alone, if there was no room for more
        else:
            checkpoint = distributed.run_on_rank_zero(partial(self.latest, state))
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
