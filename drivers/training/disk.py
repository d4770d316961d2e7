"""Plan the disk space of a run's checkpoints before it starts."""

import math
import shutil
from functools import partial
from pathlib import Path

from torch import nn

from drivers.common import distributed
from drivers.common.errors import UsageError
from drivers.policy import fsdp
from drivers.runs.folder import N_RESUMABLE
from drivers.settings.grpo import GrpoConfig

GIB = 2**30


def model_bytes(policy: nn.Module) -> int:
    """Return the bytes of a saved model."""
    return sum(p.numel() for p in policy.parameters()) * fsdp.computing_dtype(policy).itemsize


def checkpoint_bytes(policy: nn.Module) -> int:
    """Return the bytes of a checkpoint: the model, and master weights with both moments in float32."""
    return model_bytes(policy) + 12 * sum(p.numel() for p in policy.parameters() if p.requires_grad)


def is_full(folder: Path, needed: int) -> bool:
    """Return whether fewer than `needed` bytes are free where `folder` is."""
    return shutil.disk_usage(folder).free < needed


def check_disk(config: GrpoConfig, policy: nn.Module, folder: Path, step: int) -> str | None:
    """Return a warning if the checkpoints after `step` may not fit; raise a UsageError if a single one does not.

    The newest checkpoints keep their training state, and one more is written before the oldest of them loses it. All
    ranks take part, and rank 0 decides.
    """
    model, whole = model_bytes(policy), checkpoint_bytes(policy)
    if config.kl_reference_steps is not None:  # a moving reference is part of the training state
        whole += model
    return distributed.run_on_rank_zero(partial(_check_room, config, model, whole, folder, step))


def _check_room(config: GrpoConfig, model: int, whole: int, folder: Path, step: int) -> str | None:
    free = shutil.disk_usage(folder).free
    if free < whole:
        raise UsageError(
            f"--save-dir {folder}: a checkpoint takes {whole / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free; free "
            "some space, or choose a folder on another disk"
        )
    n_saves = math.ceil((config.n_grpo_steps - step) / config.checkpoint_steps)
    n_whole = min(n_saves, N_RESUMABLE + 1)
    n_models = n_saves - n_whole
    if config.keep_checkpoints is not None:  # and the best one
        n_models = min(n_models, max(0, config.keep_checkpoints + 1 - N_RESUMABLE))
    needed = n_whole * whole + n_models * model
    if free >= needed:
        return None
    return (
        f"the checkpoints take up to {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; pass "
        "--keep-checkpoints 1, or a larger --checkpoint-steps"
    )
