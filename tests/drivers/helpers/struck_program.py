"""Run train.py and send it a signal at a chosen moment of its engine."""

import os
import threading
import time

from drivers import train
from tests.drivers.helpers.forked import fork_engine_from_here
from tests.drivers.helpers.processes import list_engine_processes, list_shared_memory


def strike(number: int) -> None:
    """Print the engine's processes and shared memory, then send this process a signal."""
    pids = [one.pid for one in list_engine_processes()]
    print("pids", *pids, flush=True)
    print("shared", *list_shared_memory([os.getpid(), *pids]), flush=True)
    os.kill(os.getpid(), number)


def strike_during_start(number: int) -> None:
    """Send the signal soon after the engine's process exists.

    For the first milliseconds it waits for the trainer's answer to its greeting, and gives up after five minutes.
    """
    while not any(one.name() == "VLLM::EngineCore" for one in list_engine_processes()):
        time.sleep(0.05)
    time.sleep(0.5)
    strike(number)


def strike_in_fourth_call(owner: type, name: str, number: int) -> None:
    """Send the signal at the beginning of the fourth call of a method."""
    call, calls = getattr(owner, name), []

    def struck(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            strike(number)
        return call(*arguments, **named)

    setattr(owner, name, struck)


def main(where: str, number: int, flags: list[str]) -> None:
    """Train with `flags`; `where` is a push, a generation or the start of the engine."""
    from drivers.engines.vllm_transfer import LLM, LocalClient

    if where == "start":
        threading.Thread(target=strike_during_start, args=(number,), daemon=True).start()
    else:
        fork_engine_from_here()
        strike_in_fourth_call(*((LocalClient, "update_weights") if where == "push" else (LLM, "generate")), number)
    train.main(flags)
