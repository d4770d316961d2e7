"""Reward functions as users write them, and what hostile or unlucky responses do to them."""

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import time


def deepen():
    deepen()


def fill_memory():
    kept = []
    while True:
        kept.append(bytes(64 << 20))


def scribble(message=b'["Grade",1,0,[{},"parsed",""],false]'):
    """Write to all descriptors, as hostile code in a response might do to speak for the worker."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, len(message).to_bytes(4, "big") + message)
        except OSError:
            continue
    time.sleep(1000)


def start_another_and_hang(path):
    with open(path, "w") as file:
        file.write(str(subprocess.Popen(["sleep", "1000"]).pid))
    time.sleep(1000)


def start_in_another_session(path, *, hang):
    """Start a process as a program does that wants to live on: no signal to the group reaches it or its child."""
    script = 'sleep 1000 & echo $$ $! > "$0"; wait'
    other = subprocess.Popen(["sh", "-c", script, path], start_new_session=True)
    while not (os.path.exists(path) and os.path.getsize(path)):
        time.sleep(0.01)
    if hang:
        time.sleep(1000)
    return other.pid > 0


def turn_the_alarm_off_and_hang():
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(1000)


DEEDS = {
    "loop": lambda: [None for _ in iter(int, 1)],
    "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),  # holds the interpreter's lock and never returns
    "sleep": lambda: time.sleep(1000),
    "no alarm": turn_the_alarm_off_and_hang,
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "close": lambda: (os.closerange(3, 64), time.sleep(1000)),
    "scribble": scribble,
    "pretend": lambda: scribble(b'["Ready",1,true]'),
    "refuse": lambda: scribble(b'["Refused","no reason"]'),
    "allocate": lambda: bytearray(8 << 30),
    "fill": fill_memory,
    "raise": lambda: int("no number"),
    "recursion": deepen,
    "leave": lambda: sys.exit(4),
    "fork": os.fork,  # both processes go on as the worker, on one connection
}


def reward(response, ground_truth):
    """Do what the response says, then return 1 or 0."""
    if response.startswith("other: "):
        start_another_and_hang(response.removeprefix("other: "))
    if response.startswith(("stray: ", "hanging stray: ")):
        kind, _, path = response.partition(": ")
        return start_in_another_session(path, hang=kind == "hanging stray")
    if response == "text":
        return "1.0"
    if response == "nan":
        return float("nan")
    if response in DEEDS:
        DEEDS[response]()
    return response == ground_truth


async def swallow():
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            continue


async def async_reward(response, ground_truth):
    """A fifth of a second of waiting, as for a judge elsewhere; the name of a deed is done."""
    if response == "await":
        await asyncio.sleep(1000)
    elif response == "swallow":
        await swallow()
    elif response == "impatient":
        raise TimeoutError("the judge is slow")
    elif response in DEEDS:
        DEEDS[response]()
    await asyncio.sleep(0.2)
    return {"reward": float(response == ground_truth), "length": len(response)}


def parts(response, ground_truth):
    """Return three named numbers without a total."""
    return {
        "right": response.count(ground_truth),
        "short": len(response) < 5,
        "unsure": None if "?" in response else 0,
    }


def hanging_sometimes(response, ground_truth):
    """Return the share of a letter, and fail or hang for some responses."""
    if "b" in response:
        time.sleep(1000)
    if "c" in response:
        raise ValueError("c is for chaos")
    if "d" in response:
        return {"letters": None, "length": len(response)}
    return {"letters": response.count("a") / max(1, len(response)), "length": len(response)}


def about(response, ground_truth, question):
    """Return whether the response names the question."""
    return question is not None and question in response


async def async_about(response, ground_truth, *, question="nothing"):
    return about(response, ground_truth, question)


def another(response, ground_truth, prompt):
    return 1.0


def one_argument(response):
    return 0.0


not_callable = 37
