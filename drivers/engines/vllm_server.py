"""vLLM servers as a rollout engine: one or several, on this machine or others; several are data-parallel.

Prompts go round among them as token ids, and weights to all of them, by the same transfer API as in `vllm_engine`:
`nccl` from a GPU, a file in memory from a CPU (then they run on this machine, under this user).
"""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from torch import nn
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.protocol import Completion, check_weight_version
from drivers.engines.supervision import call_with_timeout, in_thread
from drivers.engines.vllm import sampling_parameters
from drivers.engines.vllm_transfer import (
    PACKED_BUFFER_BYTES,
    HostTrainerInit,
    read_checksums,
    synchronize_before_send,
    version_of,
)
from drivers.policy.weights import Checksum, PolicyWeights, check_arrived
from drivers.settings.sampling import Sampling

T = TypeVar("T")


START_S = 600.0
"""How long a server may take to be there, at the start and when it died."""


CLOSE_S = 10.0
"""How long servers may take to let go of this process; a dead one never does."""


RESET_TRIES, RESET_WAIT_S = 20, 0.25


CONNECT_S = 60.0
"""How long a connection may take, and how long a host may say nothing at all before it has vanished."""


MAX_CONNECTIONS = 512


_LOOK_EVERY_S = 0.2


COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 PYTHONPATH=. vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
    "--load-format dummy --dtype %s --max-model-len TOKENS "
    '--weight-transfer-config \'{"backend": "%s"}\' '
    "--worker-extension-cls drivers.engines.vllm_transfer.WorkerExtension"
)


def keepalive() -> list[tuple[int, int, int]]:
    """Options of a socket by which a host that vanishes is noticed after `CONNECT_S`, in the middle of an answer too.

    Else the kernel would wait for hours: a machine that has lost its power ends no connection.
    """
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    # Asked after half of the time, three times; and what is sent and not acknowledged. Not every system has all.
    seconds = int(CONNECT_S)
    for name, value in {
        "TCP_KEEPIDLE": seconds // 2,
        "TCP_KEEPINTVL": seconds // 6,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 1000 * seconds,
    }.items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


class Servers:
    """As one client of a weight transfer: each call goes to all of them at once."""

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._timeout_s = timeout_s
        # A connection is used once: vLLM closes it after an error, and when it was idle for some seconds.
        limits = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.HTTPTransport(limits=limits, socket_options=keepalive())
        self._client = httpx.Client(transport=transport, trust_env=False)  # nor is a proxy on the way to a server
        self._closed = False
        self.sizes = [1] * len(self.urls)
        """Workers of each."""
        self.failed: Exception | None = None
        """Why nothing more is to be sent."""

    def close(self) -> None:
        """Who still waits for an answer comes out, but for the threads that ask: nothing waits for those."""
        self._closed = True
        self._client.close()

    def wait(self, seconds: float) -> None:
        """Until all of them are there."""
        end = time.monotonic() + seconds
        for url in self.urls:
            while True:
                with suppress(httpx.HTTPError):
                    if self._client.get(f"{url}/health", timeout=5.0).is_success:
                        break
                if time.monotonic() > end:
                    raise EngineDiedError(f"{url}/health did not answer within {seconds:g} s")
                time.sleep(0.5)

    def call(
        self, method: str, path: str, bodies: Sequence[Any] | None = None, seconds: float | None = None
    ) -> list[Any]:
        """One answer of each, or the first error; a TimeoutError after `seconds`. `bodies` are theirs, in order."""
        seconds = self._timeout_s if seconds is None else seconds

        timeout = httpx.Timeout(seconds, connect=min(seconds, CONNECT_S))

        def ask(url: str, body: Any) -> Any:
            answer = self._client.request(method, f"{url}/{path}", json=body, timeout=timeout)
            answer.raise_for_status()
            return answer.json() if answer.content else None

        bodies = bodies or [None] * len(self.urls)
        requests = [in_thread(partial(ask, *one), "server") for one in zip(self.urls, bodies, strict=True)]
        end, waiting = time.monotonic() + seconds, set(requests)
        while waiting and not self._closed and time.monotonic() < end:
            done, waiting = futures.wait(requests, _LOOK_EVERY_S, futures.FIRST_EXCEPTION)
            if any(request.exception() for request in done):
                break
        answers = [request.result() for request in requests if request not in waiting]
        if waiting:
            raise (self._closed and self.failed) or TimeoutError
        return answers

    def post(self, path: str, body: Any = None, seconds: float | None = None) -> list[Any]:
        return self.call("POST", path, [body] * len(self.urls), seconds)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, offset = [], init_info.get("rank_offset")
        for url, size in zip(self.urls, self.sizes, strict=True):
            own: dict[str, Any] = {}
            if offset is not None:  # each has its own places in the group, and its own way to this machine
                own = {"rank_offset": offset, "master_address": _address_towards(url)}
                offset += size
            infos.append({"init_info": init_info | own})
        with self._noting_failure():
            self.call("POST", "init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        try:
            self.post("start_weight_update")
        except httpx.HTTPStatusError:  # vLLM starts none where one is open still: the last push was broken off
            for url in self.urls:
                self._client.post(f"{url}/finish_weight_update", timeout=self._timeout_s)
            self.post("start_weight_update")
        if self.failed is not None:  # given up while they were asked: the sender must not gather weights any more
            raise self.failed

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self._noting_failure():
            self.post("update_weights", {"update_info": update_info})

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """Meanwhile the sender of nccl waits for them where it hears of no error."""
        try:
            yield
        except Exception as error:
            self.failed = self.failed or error
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", None if weight_version is None else {"weight_version": weight_version})


class ServerEngine:
    """Samples with the servers at `urls`, with the policy's weights as of the last `load_weights`."""

    def __init__(
        self,
        urls: Sequence[str],
        policy: nn.Module,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        deadline_s: float = 3600.0,
        start_s: float = START_S,
        end_token_id: int | None = None,
    ) -> None:
        self._deadline_s, self._device = deadline_s, next(policy.parameters()).device
        backend = "checked_nccl" if self._device.type == "cuda" else "host"
        self._command = COMMAND % (str(dtype).removeprefix("torch."), backend)
        self._weights = PolicyWeights(policy, dtype)
        self._sender: Any = None
        self._version: int | None = None
        self._end_token_id = end_token_id
        self._servers = Servers(urls, deadline_s)
        try:
            self._servers.wait(start_s)
            self._ask("get ready for weights", lambda: self._connect(max_model_len))
        except BaseException:
            self.close()
            raise

    def _connect(self, max_model_len: int) -> None:
        """With servers that can do what they are for."""
        synchronize_before_send(self._device)
        self._servers.sizes = [int(answer["world_size"]) for answer in self._servers.call("GET", "get_world_size")]
        self._check(max_model_len)
        self._sender = WeightTransferTrainerFactory.trainer_init(
            self._transfer_init(), client=self._servers, source=self._weights
        )

    def _check(self, max_model_len: int) -> None:
        try:
            answers = self._servers.post("collective_rpc", {"method": "received_checksums"})
        except httpx.HTTPStatusError as error:
            raise UsageError(f"--rollout-url {error.request.url}: is to be started with: {self._command}") from error
        for url, size, answer in zip(self._servers.urls, self._servers.sizes, answers, strict=True):
            if len(answer["results"]) != size:  # with --data-parallel-size only the first engine answers
                raise UsageError(
                    f"--rollout-url {url}: only {len(answer['results'])} of its {size} workers can be asked what they "
                    "received, so no push could be checked: start one server for each engine, without "
                    "--data-parallel-size"
                )
        for url, answer in zip(self._servers.urls, self._servers.call("GET", "v1/models"), strict=True):
            length = answer["data"][0]["max_model_len"]
            if length < max_model_len:
                raise UsageError(
                    f"--rollout-url {url}: its --max-model-len is {length}; prompts and responses of this run take up "
                    f"to {max_model_len} tokens"
                )

    def _transfer_init(self) -> TrainerInitInfo:
        if self._device.type == "cpu":
            return HostTrainerInit(rank=0, by_file=True)
        addresses = {_address_towards(url) for url in self._servers.urls}
        return NCCLTrainerInitInfo(
            # The group's store is this process's, and listens at this address alone: where servers come from several
            # sides, at all of them. What each is told to come to is its own view (`init_weight_transfer_engine`).
            master_address=addresses.pop() if len(addresses) == 1 else "0.0.0.0",
            master_port=get_open_port(),
            world_size=1 + sum(self._servers.sizes),
            rank=0,
            packed_buffer_size_bytes=PACKED_BUFFER_BYTES,
        )

    def load_weights(self, version: int) -> None:
        """See `VLLMEngine.load_weights`."""
        self._ask("take the weights over", lambda: self._load_weights(version))

    def _load_weights(self, version: int) -> None:
        synchronize_before_send(self._device)
        self._version = version
        self._weights.take_checksums()
        self._sender.send_weights()
        self._servers.post("update_weight_version", {"new_version": str(version)})
        synchronize_before_send(self._device)  # the sums too are taken on streams of the sender
        check_arrived(self._weights.take_checksums(), self._received(), version)
        self._drop_prefix_cache()

    def _drop_prefix_cache(self) -> None:
        for _ in range(RESET_TRIES):
            answers = self._servers.post("reset_prefix_cache")
            refused = [u for u, answer in zip(self._servers.urls, answers, strict=True) if not answer["success"]]
            if not refused:
                return
            time.sleep(RESET_WAIT_S)  # the last requests may be about to leave the scheduler
        raise RuntimeError(
            f"{', '.join(refused)} refused to drop the prefix cache after a weight push: it holds keys of old weights"
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """See `VLLMEngine.generate`."""
        return self._ask(
            f"answer {len(prompts)} prompts", lambda: asyncio.run(self._generate(prompts, sampling, seed))
        )

    async def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        urls = self._servers.urls
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        timeout = httpx.Timeout(self._deadline_s, connect=min(self._deadline_s, CONNECT_S), pool=None)
        transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=keepalive())
        async with httpx.AsyncClient(timeout=timeout, transport=transport, trust_env=False) as client:
            groups = await asyncio.gather(
                *(
                    self._ask_for_one(client, urls[i % len(urls)], prompt, sampling, seed + i * sampling.n)
                    for i, prompt in enumerate(prompts)
                )
            )
        return [completion for group in groups for completion in group]

    async def _ask_for_one(
        self, client: httpx.AsyncClient, url: str, prompt: Sequence[int], sampling: Sampling, seed: int
    ) -> list[Completion]:
        body = {
            "token_ids": list(prompt),
            "sampling_params": sampling_parameters(sampling, seed, self._end_token_id),
            "output_mode": "text",
        }
        answer = await client.post(f"{url}/inference/v1/generate", json=body)
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return check_weight_version(self._version, url, [_completion(prompt, choice) for choice in choices])

    def sleep(self) -> None:
        """They have devices of their own."""

    def received(self) -> list[dict[str, Checksum]]:
        """What each worker of each server summed up of the last push."""
        return self._ask("sum its weights up", self._received)

    def _received(self) -> list[dict[str, Checksum]]:
        answers = self._servers.post("collective_rpc", {"method": "received_checksums"})
        return read_checksums([worker for answer in answers for worker in answer["results"]])

    def close(self) -> None:
        """The servers stay; they belong to whoever started them."""
        self._servers.failed = self._servers.failed or EngineDiedError(
            f"{', '.join(self._servers.urls)}: were given up"
        )
        if self._sender is not None:
            self._sender.shutdown()
        with suppress(Exception):  # a dead one has nothing to let go of, nor has any the second time
            self._servers.post("shutdown_weight_transfer_engine", seconds=CLOSE_S)
        self._servers.close()

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """What went wrong is one line, and whose fault it is."""
        named = ", ".join(self._servers.urls)
        try:
            try:
                return call_with_timeout(self._deadline_s, call, lambda: self._servers.failed is None, self.close)
            except EngineDiedError as error:
                raise self._servers.failed or error from None
        except TimeoutError as error:
            raise EngineDiedError(
                f"{named} did not {what} within {self._deadline_s:g} s (--engine-deadline-s)"
            ) from error
        except httpx.HTTPStatusError as error:
            url, status, text = error.request.url, error.response.status_code, error.response.text
            if error.response.is_server_error:
                raise EngineDiedError(f"{url}: answers {status}: {text[:300]}") from error
            raise UsageError(
                f"--rollout-url {url}: answers {status}: {text[:300]}; it is to be started with: {self._command}"
            ) from error
        except httpx.HTTPError as error:
            raise EngineDiedError(
                f"{named}: no answer when asked to {what} ({type(error).__name__} {error})".rstrip()
            ) from error


def _completion(prompt: Sequence[int], choice: dict[str, Any]) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineDiedError(f"a server ended a completion with finish_reason={choice['finish_reason']!r}")
    return Completion(
        text=choice["text"],
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(choice["token_ids"]),
        log_probs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
        finish_reason=choice["finish_reason"],
        weight_version=version_of([span["version"] for span in choice["weight_versions"] or ()]),
    )


def _address_towards(url: str) -> str:
    """Of this machine, as the one at `url` sees it: by IPv4, as vLLM's store listens. Nothing is sent to find out."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((urlsplit(url).hostname or "", 1))
            return str(way.getsockname()[0])
    except OSError as error:
        raise EngineDiedError(f"{url}: there is no way to it from this machine ({error})") from error
