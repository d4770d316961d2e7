"""Report the errors of a program in one line."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from drivers.common.errors import GrpoError, UsageError


def exit_with(program: str, error: Exception, status: int) -> None:
    """Print one line instead of a traceback and exit; with several ranks, rank 0 prints first."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"{program}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5.0)  # torchrun ends the other ranks once rank 0 has exited with the same error
        print(f"{program}, rank {rank}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def exit_on_user_error(program: str) -> Iterator[None]:
    """Turn errors that a user can act on into one line on stderr and an exit status; others keep their traceback."""
    try:
        yield
    except UsageError as error:
        exit_with(program, error, status=2)
    except GrpoError as error:
        exit_with(program, error, status=1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; `--help` does without torch
            reason = " ".join(str(error).split())[:200]
            advice = "lower --micro-batch-tokens, or pass --gradient-checkpointing on or --lora-rank 16"
            exit_with(program, RuntimeError(f"the GPU is out of memory ({reason}); {advice}"), status=1)
        from drivers.common import distributed  # it imports torch

        if not distributed.is_peer_failure(error):
            raise
        exit_with(program, RuntimeError(f"another rank has exited: {error}"), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def check_number(name: str, value: int, least: int, required: str) -> None:
    """Raise a UsageError if the value of a flag is below `least`."""
    if value < least:
        raise UsageError(f"--{name.replace('_', '-')} {value}: {required}")
