"""Conversations: responses that a function of the user's own composes of sampled tokens and others (`--rollout`).

All conversations of a batch are open at the same time. Once each of them waits for the policy or has ended, the engine
answers all that wait in one call. So every engine can sample them, and a run that is resumed samples the same.
"""

import asyncio
import inspect
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from drivers.common.errors import UsageError, shorten
from drivers.common.own_functions import import_function
from drivers.engines.protocol import Completion, RolloutEngine
from drivers.engines.sampler import Request, Sampler
from drivers.settings.sampling import ConversationSettings, Sampling
from drivers.tasks.questions import Question

Play = Callable[[Sampler, Question], Awaitable[tuple[Sequence[int], Sequence[bool]]]]
"""A function of the user's own: returns the token ids of a response, and which of them the policy sampled."""


@dataclass(frozen=True)
class Rollout:
    """The function of `--rollout`, and what it needs."""

    name: str
    play: Play
    tokenizer: Any
    deadline_s: float

    def error(self, problem: str) -> UsageError:
        """Return the error that names the function."""
        return UsageError(f"--rollout {self.name}: {problem}")


def load_rollout(settings: ConversationSettings, tokenizer: Any) -> Rollout | None:
    """Return the function of `--rollout`, or None if responses are plain completions."""
    if settings.rollout is None:
        return None
    play = import_function("--rollout", settings.rollout)
    rollout = Rollout(settings.rollout, play, tokenizer, settings.rollout_deadline_s)
    if not inspect.iscoroutinefunction(play):
        raise rollout.error("must be an `async def`, because it awaits what the policy samples")
    try:
        inspect.signature(play).bind("sample", "question")
    except TypeError as error:
        raise rollout.error(f"must take (sample, question): {error}") from error
    return rollout


def sample_responses(
    engine: RolloutEngine, rollout: Rollout | None, questions: Sequence[Question], sampling: Sampling, *, seed: int
) -> list[Completion]:
    """Return `sampling.n` responses to each question, in the order of the questions."""
    if rollout is None:
        return engine.generate([question.prompt_token_ids for question in questions], sampling, seed=seed)
    return asyncio.run(_converse(engine, rollout, questions, sampling, seed))


async def _converse(
    engine: RolloutEngine, rollout: Rollout, questions: Sequence[Question], sampling: Sampling, seed: int
) -> list[Completion]:
    """Play all conversations to their ends, in rounds of one sample for each that waits."""
    repeated = [question for question in questions for _ in range(sampling.n)]
    samplers = [Sampler(question, replace(sampling, n=1), rollout.tokenizer) for question in repeated]
    tasks = [asyncio.create_task(_play(rollout, sampler)) for sampler in samplers]
    try:
        turn = 0
        while True:
            end = time.monotonic() + rollout.deadline_s
            for sampler, task in zip(samplers, tasks, strict=True):
                await _wait_until_idle(rollout, sampler, task, end)
            requests = [request for sampler in samplers for request in sampler.take_requests()]
            if not requests:
                return [task.result() for task in tasks]
            # Later turns have seeds far from those of the first turns, which count up from `seed` in each step.
            _answer(engine, requests, seed if turn == 0 else Random(f"{seed} {turn}").getrandbits(61))
            turn += 1
    finally:
        for task in tasks:
            task.cancel()


async def _wait_until_idle(rollout: Rollout, sampler: Sampler, task: "asyncio.Task[Completion]", end: float) -> None:
    """Wait until a conversation waits for the engine or has ended, at most until `end`; raise its error."""
    asked = asyncio.ensure_future(sampler.asked.wait())
    timeout_s = max(0.0, end - time.monotonic())
    await asyncio.wait({task, asked}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if task.done():
        task.result()
    elif not sampler.asked.is_set():
        raise rollout.error(
            f"did not continue for {rollout.deadline_s:g} s in a response to {_quote(sampler.question)}; limit what "
            "it waits for, or raise --rollout-deadline-s"
        )


def _answer(engine: RolloutEngine, requests: Sequence[Request], seed: int) -> None:
    """Answer the requests, in one call of the engine for all that have the same sampling but for its length limit."""
    alike: dict[Sampling, list[Request]] = {}
    for request in requests:
        alike.setdefault(replace(request.sampling, max_tokens=0), []).append(request)
    for group in alike.values():
        limits = tuple(request.sampling.max_tokens for request in group)
        sampling = replace(group[0].sampling, max_tokens=max(limits), limits=limits)
        samples = engine.generate([request.context for request in group], sampling, seed=seed)
        for request, sample in zip(group, samples, strict=True):
            request.answer.set_result(sample)
        seed += len(group)


async def _play(rollout: Rollout, sampler: Sampler) -> Completion:
    """Play one conversation and return its response."""
    try:
        returned = await rollout.play(sampler, sampler.question)
    except Exception as error:
        cause = f"{type(error).__name__}: {shorten(error)}" if str(error) else type(error).__name__
        where = _find_line(error, rollout.play)
        raise rollout.error(f"failed{where} in a response to {_quote(sampler.question)} ({cause})") from error
    try:
        token_ids, sampled = _check_returned(returned, len(rollout.tokenizer))
        return sampler.compose(token_ids, sampled)
    except ValueError as error:
        raise rollout.error(f"{error} (in a response to {_quote(sampler.question)})") from error


def _check_returned(returned: Any, vocab: int) -> tuple[list[int], list[bool]]:
    """Return the two lists that a function returned; raise a ValueError if they are something else."""
    try:
        token_ids, sampled = map(list, returned)
    except (TypeError, ValueError) as error:
        raise ValueError("must return two lists: token ids, and for each whether it was sampled") from error
    if len(token_ids) != len(sampled):
        raise ValueError(f"returned {len(token_ids)} token ids, but {len(sampled)} flags of whether each was sampled")
    if not all(isinstance(flag, bool) for flag in sampled):
        raise ValueError("must return True or False for whether each token was sampled")
    for token, flag in zip(token_ids, sampled, strict=True):
        if not isinstance(token, int) or not (flag or 0 <= token < vocab):
            raise ValueError(f"returned the token {token!r}, but token ids are integers from 0 to {vocab - 1}")
    return token_ids, sampled


def _find_line(error: Exception, play: Play) -> str:
    """Return the innermost line of the function's file that led to an error."""
    file = getattr(getattr(play, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at {Path(file).name}:{lines[-1]}" if file and lines else ""


def _quote(question: Question) -> str:
    return repr(shorten(question.example.question, 80))
