"""Messages between a `GradingPool` and its workers, as JSON, which cannot run code in the trainer.

A worker sends `Ready` or `Refused` once. Then the pool sends a `Chunk` of requests at a time, and the worker answers
with a `Grade` for each. A worker may be corrupted by a hostile response, so everything it sends is checked.
"""

import json
from typing import Any, NamedTuple

from drivers.grading.verdicts import MAX_REWARD, Graded, GradeStatus, GradingRequest


class Ready(NamedTuple):
    """The reward function is loaded."""

    pid: int
    is_async: bool


class Refused(NamedTuple):
    """The reward function cannot be loaded."""

    text: str


class Invalid(NamedTuple):
    """The reward function returned something that is not a reward."""

    text: str


class Chunk(NamedTuple):
    """Requests that one worker grades."""

    number: int
    """Grades repeat this number, so that a grade of an earlier chunk is never taken for one of this chunk."""
    requests: list[GradingRequest]


class Grade(NamedTuple):
    """The verdict on one request of a chunk."""

    chunk: int
    place: int
    """Position of the request in its chunk."""
    graded: Graded
    is_last: bool
    """The worker exits after this grade, because the response has used up its memory."""


Message = Ready | Refused | Invalid | Grade


def encode_message(message: Message) -> bytes:
    """Return a message of a worker as JSON."""
    return json.dumps([type(message).__name__, *message]).encode()


def decode_message(data: bytes) -> Message | None:
    """Return the message in `data`, or None if no worker of ours would send it."""
    try:
        parts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    match parts:
        case ["Ready", int(pid), bool(is_async)]:
            return Ready(pid, is_async)
        case ["Refused", str(text)]:
            return Refused(text)
        case ["Invalid", str(text)]:
            return Invalid(text)
        case ["Grade", int(chunk), int(place), [dict(scores), str(status), str(detail)], bool(is_last)]:
            if status in set(GradeStatus) and _are_scores(scores):
                return Grade(chunk, place, Graded(scores, GradeStatus(status), detail), is_last)
    return None


def encode_chunk(chunk: Chunk) -> bytes:
    """Return a chunk as JSON."""
    return json.dumps(chunk).encode()


def decode_chunk(data: bytes) -> Chunk:
    """Return the chunk in `data`."""
    number, requests = json.loads(data)
    return Chunk(number, [GradingRequest(*parts) for parts in requests])


def _are_scores(scores: dict[str, Any]) -> bool:
    numbers = [value for value in scores.values() if value is not None]
    return "reward" in scores and all(isinstance(n, float) and abs(n) <= MAX_REWARD for n in numbers)
