"""A teacher that is a vLLM server: it returns the log-probs of a prompt's tokens."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from itertools import chain, compress
from typing import Any, TypeVar

import httpx

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.protocol import Completion
from drivers.engines.supervision import call_with_timeout
from drivers.engines.vllm_http import Servers, open_client, report_failures

T = TypeVar("T")
RETURN_S = 600.0
"""Longest wait for a server that stopped responding during a run."""
_MAX_LOG_PROB = 1e-3
"""A log-prob exceeds 0 by rounding only."""
_REMEDY = "pass the URL of a server that `vllm serve` has started"


class TeacherServer:
    """A teacher that a vLLM server holds. It computes log-probs at temperature 1, over the whole vocabulary."""

    def __init__(self, url: str, deadline_s: float, say: Callable[[str], None] = print) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._deadline_s, self._say = deadline_s, say

    def check(self, tokenizer: Any, last_id: int, longest: int) -> None:
        """Raise a UsageError if the server does not know every token of the policy.

        `tokenizer` is the policy's, `last_id` the largest id that it can sample, and `longest` the number of tokens of
        the longest prompt with its response.
        """
        try:
            self._call("the check of the teacher", lambda client: self._check(client, tokenizer, last_id, longest))
        except EngineDiedError as error:
            raise UsageError(f"--teacher {error}; {_REMEDY}") from error

    async def _check(self, client: httpx.AsyncClient, tokenizer: Any, last_id: int, longest: int) -> None:
        answer = await client.get(f"{self._url}/v1/models")
        room = self._read(answer, lambda body: int(body["data"][0]["max_model_len"]), "max_model_len")
        if room <= longest:  # vLLM samples one token after the response
            raise UsageError(
                f"--teacher {self._url}: its --max-model-len is {room}, but a prompt, its response and one more token "
                f"take up to {longest + 1}; start it with --max-model-len {longest + 1}"
            )
        await self._check_vocabulary(client, tokenizer)
        await self._ask_one(client, (tokenizer.eos_token_id,), (last_id,))

    async def _check_vocabulary(self, client: httpx.AsyncClient, tokenizer: Any) -> None:
        """Raise a UsageError that names a token if the server decodes the policy's ids to another text."""

        async def decode(ids: Sequence[int]) -> str:
            answer = await self._post(client, "detokenize", {"tokens": list(ids)})
            return self._read(answer, lambda body: str(body["prompt"]), "text")

        ids = sorted(tokenizer.get_vocab().values())
        if await decode(ids) == tokenizer.decode(ids):
            return
        while len(ids) > 1:
            half = ids[: len(ids) // 2]
            ids = ids[len(half) :] if await decode(half) == tokenizer.decode(half) else half
        theirs, ours = await decode(ids), tokenizer.decode(ids)
        raise UsageError(
            f"--teacher {self._url}: its tokenizer is not the policy's (id {ids[0]} is {theirs!r} instead of {ours!r})"
            "; pass a teacher with the tokenizer of --model-path"
        )

    def compute_log_probs(self, completions: Sequence[Completion]) -> list[float]:
        """Return the teacher's log-prob of each sampled token, one response after the other."""
        try:
            return self._ask(completions)
        except EngineDiedError as error:
            self._say(f"warning: --teacher {error}; waiting for the server to respond again")
        with closing(Servers([self._url], self._deadline_s)) as server:
            server.wait_until_healthy(RETURN_S)
        return self._ask(completions)

    def _ask(self, completions: Sequence[Completion]) -> list[float]:
        async def ask_all(client: httpx.AsyncClient) -> list[list[float]]:
            requests = [self._ask_one(client, one.prompt_token_ids, one.token_ids) for one in completions]
            answers = await asyncio.gather(*requests)
            return [[*compress(values, one.is_sampled)] for one, values in zip(completions, answers, strict=True)]

        return list(chain(*self._call(f"computing log-probs of {len(completions)} responses", ask_all)))

    async def _ask_one(self, client: httpx.AsyncClient, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        ids = [*prompt, *response]
        answer = await self._post(client, "v1/completions", {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0})

        def find_log_probs(body: Any) -> list[float]:
            entries = body["choices"][0]["prompt_logprobs"][len(prompt) :]
            return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, response, strict=True)]

        log_probs = self._read(answer, find_log_probs, f"log-prob for each of the {len(ids)} tokens of a prompt")
        highest = max(log_probs, default=0.0)
        if highest > _MAX_LOG_PROB:
            raise UsageError(
                f"--teacher {self._url}: returned a log-prob of {highest:g}; start it without --logprobs-mode"
            )
        return log_probs

    async def _post(self, client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
        return await client.post(f"{self._url}/{path}", json=body)

    def _read(self, answer: httpx.Response, read: Callable[[Any], T], what: str) -> T:
        """Return `read` of the answer's body; raise a UsageError if the answer is not one of vLLM."""
        answer.raise_for_status()
        try:
            return read(answer.json())
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(f"--teacher {answer.request.url}: returned no {what}; {_REMEDY}") from error

    def _call(self, operation: str, ask: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """Return what `ask` answers within the deadline; turn every failure into one line."""

        async def run() -> T:
            async with asyncio.timeout(self._deadline_s), open_client(self._deadline_s) as client:
                return await ask(client)

        with report_failures("--teacher", self._url, operation, self._deadline_s, _REMEDY):
            return call_with_timeout(math.inf, lambda: asyncio.run(run()))
