"""Sample for a function of `--rollout`, and compose its response from the samples."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import Any, Literal, NamedTuple

from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.protocol import Completion
from drivers.settings.sampling import Sampling
from drivers.tasks.questions import Question

MAX_EMPTY_TURNS = 100
"""Turns without a token that a conversation may ask for once its response is full."""


@dataclass(frozen=True)
class Turn:
    """The tokens that the policy sampled in one call of a `Sampler`."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Log-prob of each token under the distribution that it was drawn from, in nats."""
    text: str
    """The tokens as text, including the stop string that ended them."""
    finish_reason: Literal["stop", "length"]
    """`length`: the turn has `max_tokens` tokens, or the response is full."""
    stop: str | None = None
    """The string of the call's own `stop` that ended the turn. Otherwise the end token, a string of --sampling-stop or
    the limit has ended it."""


class Request(NamedTuple):
    """A call of a sampler that waits for the engine."""

    context: tuple[int, ...]
    sampling: Sampling
    answer: "asyncio.Future[Completion]"


class Sampler:
    """Samples from the policy for one response: `turn = await sample(token_ids)`."""

    tokenizer: Any
    """The policy's tokenizer, to encode what is inserted."""

    def __init__(self, question: Question, sampling: Sampling, tokenizer: Any) -> None:
        """Sample as in a plain response to `question`; `sampling.max_tokens` limits the whole response."""
        self.tokenizer, self.question = tokenizer, question
        self.asked = asyncio.Event()  # set while a call waits
        self._prompt, self._sampling = question.prompt_token_ids, sampling
        self._waiting: list[Request] = []
        self._samples: dict[tuple[int, ...], list[Completion]] = {}
        self._n_empty = 0

    async def __call__(
        self, token_ids: Sequence[int], *, stop: Sequence[str] = (), max_tokens: int | None = None
    ) -> Turn:
        """Sample what follows `token_ids`, which are the prompt and the response so far.

        The turn ends where a response ends, at a string of `stop`, or after `max_tokens` tokens.
        """
        context = tuple(token_ids)
        _check_call(context, stop, max_tokens)
        room = len(self._prompt) + self._sampling.max_tokens - len(context)
        if room < 1:
            self._n_empty += 1
            if self._n_empty > MAX_EMPTY_TURNS:  # a loop that nothing else would end
                raise ValueError(
                    f"got {MAX_EMPTY_TURNS} empty turns; return the response after finish_reason 'length'"
                )
            return Turn((), (), "", "length")
        limit = room if max_tokens is None else min(room, max_tokens)
        n_missing = self._sampling.min_tokens - (len(context) - len(self._prompt))
        sampling = replace(
            self._sampling,
            stop=(*self._sampling.stop, *stop),
            min_tokens=min(limit, max(0, n_missing)),
            max_tokens=limit,
        )
        request = Request(context, sampling, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self.asked.set()
        sample = await request.answer
        self._samples.setdefault(context, []).append(sample)
        ended_by = [text for text in stop if sample.finish_reason == "stop" and sample.text.endswith(text)]
        return Turn(sample.token_ids, sample.log_probs, sample.text, sample.finish_reason, *ended_by[:1])

    def take_requests(self) -> list[Request]:
        """Return the calls that wait; the caller answers them."""
        self.asked.clear()
        waiting, self._waiting = self._waiting, []
        return waiting

    def compose(self, token_ids: Sequence[int], sampled: Sequence[bool]) -> Completion:
        """Return a response of these tokens with the log-probs of those that were `sampled`.

        What exceeds the longest response is cut off. Raise a ValueError unless each sampled token was sampled after
        exactly the tokens before it: the loss would otherwise use a wrong log-prob.
        """
        longest = self._sampling.max_tokens
        ids, flags = tuple(token_ids[:longest]), tuple(sampled[:longest])
        if not any(flags):
            raise ValueError("no token of the response was sampled, so there is nothing to train on")
        parts = list(self._find_parts(ids, flags))
        last = parts[-1]
        ends_without_room = len(token_ids) >= longest and not sampled[-1]
        is_truncated = ends_without_room or last.finish_reason == "length"
        excluded = tuple(hidden for part in parts for hidden in _pad(part.excluded, len(part.token_ids)))
        sets = [kept for part in parts for kept in _pad(part.kept.unpack() if part.kept else (), len(part.token_ids))]
        return Completion(
            text=self._decode(ids, last),
            prompt_token_ids=self._prompt,
            token_ids=ids,
            log_probs=tuple(value for part in parts for value in part.log_probs),
            finish_reason="length" if is_truncated else "stop",
            weight_version=next((part.weight_version for part in parts if not part.sampled), None),
            kept=KeptTokens.pack(sets) if any(part.kept for part in parts) else None,
            excluded=excluded if any(excluded) else (),
            sampled=flags,
        )

    def _find_parts(self, ids: tuple[int, ...], flags: tuple[bool, ...]) -> Iterator[Completion]:
        """Yield the samples, or beginnings of samples, and the inserted tokens that a response consists of."""
        place = 0
        for is_sampled, alike in groupby(flags):
            end = place + len(list(alike))
            while place < end:
                following = ids[place:end]
                part = self._find_sample(ids[:place], following) if is_sampled else _insert(following)
                yield part
                place += len(part.token_ids)

    def _find_sample(self, context: tuple[int, ...], following: tuple[int, ...]) -> Completion:
        """Return the part that the sample after `context` with most tokens of `following` has in common with it."""
        found, longest = None, 0
        for sample in self._samples.get(self._prompt + context, ()):
            n_common = _count_common(sample.token_ids, following)
            if n_common > longest:
                found, longest = sample, n_common
        if found is None:
            raise ValueError(
                f"token {len(context)} of the response counts as sampled, but was not sampled after the tokens before "
                "it; return the token ids of each turn as the sampler gave them, in the context that it was given"
            )
        return found if longest == len(found.token_ids) else _cut(found, longest)

    def _decode(self, token_ids: Sequence[int], last: Completion) -> str:
        """Return the response as text, without what follows a stop string within its last token."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        stop = next((stop for stop in self._sampling.stop if last.text.endswith(stop)), None)
        return text if stop is None or stop not in text else text[: text.rindex(stop) + len(stop)]


def _check_call(context: Sequence[int], stop: Sequence[str], max_tokens: int | None) -> None:
    """Raise a TypeError or ValueError unless an engine can answer the call."""
    if not context or not all(isinstance(token, int) for token in context):
        raise TypeError("sample takes a list of token ids: those of the prompt, and of the response so far")
    if isinstance(stop, str):  # its letters would be taken one by one
        raise TypeError(f"stop must be a list of strings: pass stop=[{stop!r}]")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, but a turn has at least one token; omit it to use all room")


def _insert(token_ids: tuple[int, ...]) -> Completion:
    """Return inserted tokens as a part of a response."""
    n = len(token_ids)
    return Completion("", (), token_ids, (0.0,) * n, "stop", sampled=(False,) * n)


def _cut(sample: Completion, length: int) -> Completion:
    """Return the first tokens of a sample."""
    return replace(
        sample,
        text="",
        token_ids=sample.token_ids[:length],
        log_probs=sample.log_probs[:length],
        finish_reason="stop",
        kept=None if sample.kept is None else KeptTokens.pack(sample.kept.unpack()[:length]),
        excluded=sample.excluded[:length],
    )


def _pad(sets: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """Return a set for each of `length` tokens: an empty one after the last."""
    return [*map(tuple, sets), *[()] * (length - len(sets))]


def _count_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
