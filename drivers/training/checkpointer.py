"""Save the checkpoints of a run and publish its final model."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from drivers.common import distributed
from drivers.common.atomic_files import free_path, remove_unfinished
from drivers.common.errors import TrainingAbortedError, first_line
from drivers.runs.checkpoint import (
    WRITE_ERRORS,
    CheckpointContent,
    Entries,
    begin_checkpoint,
    commit_checkpoint,
    copy_content,
    has_all_shards,
    publish_model,
    read_state_values,
    save_checkpoint,
    write_files,
)
from drivers.runs.folder import drop_old_states, find_newest_checkpoint, prune_checkpoints
from drivers.settings.grpo import GrpoConfig
from drivers.training.disk import checkpoint_bytes, is_full
from drivers.training.state import TrainingState

ABORT_WAIT_S = 10.0
"""Seconds that rank 0 waits for the shards of other ranks when a run is aborted: torchrun kills it after 30."""


NICENESS = 10
"""Increase of the niceness of the writing thread, which would otherwise delay the training step."""


class SavedCheckpoint(NamedTuple):
    """A checkpoint that was written."""

    step: int
    folder: Path
    write_s: float
    """Seconds that a thread wrote; 0 if it failed and the checkpoint was written again in the foreground."""


@dataclass(frozen=True)
class _Save:
    """A checkpoint that a thread is writing."""

    state: TrainingState
    step: int
    folder: Path
    content: CheckpointContent
    written: Future[tuple[Entries, float]]


class Checkpointer:
    """Writes into the folder of one run, one checkpoint at a time, in a thread."""

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
        self._save: _Save | None = None
        """The checkpoint that is being written."""
        self._newest: tuple[int, Path] | None = None
        """Step and folder of the checkpoint that this process has written last."""

    def start(self, policy: nn.Module, state: TrainingState, name: str) -> None:
        """Copy the state to host memory and let a thread write it, after `finish` has ended the save before.

        The checkpoint is resumable unless the state is inside a step. All ranks copy together; each writes its files.
        """
        values, tensors = {"step": state.step}, None
        if state.is_at_snapshot:
            values, tensors = state.values() | ({"data": self._data} if self._data else {}), state.tensors()
        content = copy_content(policy, self._tokenizer, values=values, tensors=tensors)
        folder, written = self._folder / name, Future[tuple[Entries, float]]()
        try:
            self._sync_log()
            if distributed.size() > 1:
                distributed.run_on_rank_zero(partial(begin_checkpoint, folder))
        except WRITE_ERRORS as error:
            if distributed.size() > 1:  # the others wait for rank 0
                raise TrainingAbortedError(_describe_failure(folder, error)) from error
            written.set_exception(error)
        else:
            thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            written = thread.submit(_write, content, folder)
            thread.shutdown(wait=False)
        self._save = _Save(state, state.step, folder, content, written)

    def is_written(self) -> bool:
        """Return whether a checkpoint was started and all ranks have written their files, or failed."""
        return self._save is not None and all(distributed.gather(self._save.written.done()))

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the checkpoint that was started is written, and prune older ones; return it if there is one.

        If it cannot be written, older training states are deleted to make room. If that does not help, warn and return
        None: earlier checkpoints stay and the run continues. With several ranks, and after the last step, raise a
        TrainingAbortedError instead.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        write_s = 0.0
        try:
            write_s = _wait(save)
        except WRITE_ERRORS as error:
            reason = _describe_failure(save.folder, error)
            if distributed.size() > 1:
                raise TrainingAbortedError(reason) from error
            if not self._write_with_less_room(save):
                with suppress(OSError):
                    remove_unfinished(self._folder)
                if save.step == self._config.n_grpo_steps:
                    raise TrainingAbortedError(reason) from error
                self._warn_of_failure(reason)
                return None
        self._has_failed, self._newest = False, (save.step, save.folder)
        if distributed.is_rank_zero():
            try:
                prune_checkpoints(self._folder, save.state.accuracies, self._config.keep_checkpoints)
            except (OSError, ValueError, KeyError) as error:  # a checkpoint that cannot be pruned must not end the run
                self._warn(f"{self._folder}: earlier checkpoints cannot be pruned ({first_line(error)})")
        return SavedCheckpoint(save.step, save.folder, write_s)

    def close(self) -> None:
        """Wait for the thread before the run ends. Other ranks may be anywhere, so rank 0 looks for their files."""
        save, self._save = self._save, None
        if save is None or save.written.exception() is not None or distributed.size() == 1:
            return
        end = time.monotonic() + ABORT_WAIT_S
        while distributed.is_rank_zero() and time.monotonic() < end:
            if has_all_shards(save.folder):
                with suppress(*WRITE_ERRORS):  # the error that ends the run matters more
                    commit_checkpoint(save.folder, save.written.result()[0])
                return
            time.sleep(0.05)

    def _write_with_less_room(self, save: _Save) -> bool:
        """Write the checkpoint after older training states were deleted, and return whether that worked.

        After the last step, the model is worth more than the training state: it is written alone if there is no room
        for both, and at last in the place of the newest state.
        """
        # Room does not remove another reason.
        if not is_full(self._folder, checkpoint_bytes(save.content.policy)):
            return False
        model_alone = replace(save.content, shards=None, values={"step": save.step})
        attempts = [(1, save.content)]
        if save.step == self._config.n_grpo_steps:
            attempts += [(1, model_alone), (0, model_alone)]
        for n_kept_states, content in attempts:
            try:
                remove_unfinished(self._folder)
                if n_kept_states == 0:  # else the last resumable state could go and nothing take its place
                    self._sync_log()
                drop_old_states(self._folder, keep=n_kept_states)
                self._sync_log()
                save_checkpoint(content, save.folder)
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


def _describe_failure(folder: Path, error: BaseException) -> str:
    return f"{folder}: the checkpoint cannot be written ({first_line(error)})"


def _write(content: CheckpointContent, folder: Path) -> tuple[Entries, float]:
    """Write the files of this rank, and return their entries and the seconds; one process commits them at once."""
    entries: Entries = {}
    begin = time.monotonic()
    if sys.platform == "linux":  # where this changes the thread alone; the step has the cores first
        os.nice(NICENESS)
    if distributed.size() == 1:
        save_checkpoint(content, folder)
    else:
        entries = write_files(content, folder)
    return entries, time.monotonic() - begin


def _wait(save: _Save) -> float:
    """Wait for the thread of each rank, commit the files of several on rank 0, and return the seconds of writing.

    Raise the error of writing, of any rank.
    """
    if distributed.size() == 1:
        return save.written.result()[1]
    error = save.written.exception()
    if error is not None and not isinstance(error, WRITE_ERRORS):
        raise error
    outcome: tuple[tuple[Entries, float] | None, str] = (
        (None, first_line(error)) if error else (save.written.result(), "")
    )
    outcomes = distributed.gather(outcome)
    failed = [reason for of_rank, reason in outcomes if of_rank is None]
    if failed:
        raise error or OSError(failed[0])
    written = [of_rank for of_rank, _ in outcomes if of_rank is not None]
    entries = {name: entry for of_rank, _ in written for name, entry in of_rank.items()}
    distributed.run_on_rank_zero(partial(commit_checkpoint, save.folder, entries))
    return max(seconds for _, seconds in written)
