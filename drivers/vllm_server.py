"""vLLM servers as a rollout engine: one or several, on this machine or others, each data-parallel by vLLM itself.

Prompts go round among them as token ids, and weights to all of them, by the same transfer API as in `vllm_engine`:
`nccl` from a GPU, a file in memory from a CPU (then they run on this machine, under this user).
"""

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from torch import nn
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from drivers.errors import EngineDiedError, UsageError
from drivers.rollout import Completion, Sampling
from drivers.supervise import within
from drivers.vllm_engine import PACKED_BUFFER_BYTES, HostTrainerInit, read_checksums, sampling_parameters
from drivers.weights import Checksum, PolicyWeights

T = TypeVar("T")

START_S = 600.0
"""How long a server may take to be there, at the start and when it died."""
MAX_CONNECTIONS = 512
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 PYTHONPATH=. vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
    '--weight-transfer-config \'{"backend": "%s"}\' --worker-extension-cls drivers.vllm_engine.WorkerExtension'
)


class Servers:
    """As one client of a weight transfer: each call goes to all of them at once."""

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._client = httpx.Client(timeout=timeout_s)
        self._threads = ThreadPoolExecutor(len(self.urls), thread_name_prefix="server")
        self.sizes = [1] * len(self.urls)
        """Workers of each."""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
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
        self.sizes = [int(answer["world_size"]) for answer in self.call("GET", "get_world_size")]

    def call(self, method: str, path: str, bodies: Sequence[Any] | None = None) -> list[Any]:
        """One answer of each. `bodies` are theirs, in order."""
        requests = [
            self._threads.submit(self._client.request, method, f"{url}/{path}", json=body)
            for url, body in zip(self.urls, bodies or [None] * len(self.urls), strict=True)
        ]
        answers = [request.result() for request in requests]
        for answer in answers:
            answer.raise_for_status()
        return [answer.json() if answer.content else None for answer in answers]

    def post(self, path: str, body: Any = None) -> list[Any]:
        return self.call("POST", path, [body] * len(self.urls))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos, offset = [], init_info.get("rank_offset")
        for size in self.sizes:  # each has its own places in the group
            infos.append(init_info if offset is None else init_info | {"rank_offset": offset})
            offset = None if offset is None else offset + size
        self.call("POST", "init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("update_weights", {"update_info": update_info})

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
    ) -> None:
        self._deadline_s = deadline_s
        self._servers = Servers(urls, deadline_s)
        self._servers.wait(start_s)
        device = next(policy.parameters()).device
        self._check(device, max_model_len)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._sender = WeightTransferTrainerFactory.trainer_init(
            self._transfer_init(device), client=self._servers, source=PolicyWeights(policy, dtype)
        )

    def _check(self, device: torch.device, max_model_len: int) -> None:
        """That they can do what they are for."""
        try:
            self._servers.post("collective_rpc", {"method": "received_checksums"})
        except httpx.HTTPStatusError as error:
            command = COMMAND % ("checked_nccl" if device.type == "cuda" else "host")
            raise UsageError(f"--rollout-url {error.request.url}: is to be started with: {command}") from error
        for url, answer in zip(self._servers.urls, self._servers.call("GET", "v1/models"), strict=True):
            length = answer["data"][0]["max_model_len"]
            if length < max_model_len:
                raise UsageError(
                    f"--rollout-url {url}: its --max-model-len is {length}; prompts and responses of this run take up "
                    f"to {max_model_len} tokens"
                )

    def _transfer_init(self, device: torch.device) -> TrainerInitInfo:
        if device.type == "cpu":
            return HostTrainerInit(rank=0, by_file=True)
        return NCCLTrainerInitInfo(
            master_address=_address_towards(self._servers.urls[0]),
            master_port=get_open_port(),
            world_size=1 + sum(self._servers.sizes),
            rank=0,
            packed_buffer_size_bytes=PACKED_BUFFER_BYTES,
        )

    def load_weights(self, version: int) -> None:
        """See `VLLMEngine.load_weights`."""
        self._ask("take the weights over", lambda: self._load_weights(version))

    def _load_weights(self, version: int) -> None:
        self._sender.send_weights()
        self._servers.post("update_weight_version", {"new_version": str(version)})
        self._servers.post("reset_prefix_cache")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """See `VLLMEngine.generate`."""
        return self._ask(
            f"answer {len(prompts)} prompts", lambda: asyncio.run(self._generate(prompts, sampling, seed))
        )

    async def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        urls = self._servers.urls
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        async with httpx.AsyncClient(timeout=httpx.Timeout(self._deadline_s, pool=None), limits=limits) as client:
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
            "sampling_params": sampling_parameters(sampling, seed),
            "output_mode": "text",
        }
        answer = await client.post(f"{url}/inference/v1/generate", json=body)
        answer.raise_for_status()
        choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
        return [_completion(prompt, choice) for choice in choices]

    def sleep(self) -> None:
        """They have devices of their own."""

    def received(self) -> list[dict[str, Checksum]]:
        """What each worker of each server summed up of the last push."""
        answers = self._ask(
            "sum its weights up", lambda: self._servers.post("collective_rpc", {"method": "received_checksums"})
        )
        return read_checksums([worker for answer in answers for worker in answer["results"]])

    def close(self) -> None:
        """The servers stay; they belong to whoever started them."""
        self._sender.shutdown()
        with suppress(httpx.HTTPError):
            self._servers.post("shutdown_weight_transfer_engine")
        self._servers.close()

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        named = ", ".join(self._servers.urls)
        try:
            return within(self._deadline_s, call)
        except TimeoutError as error:
            raise EngineDiedError(
                f"{named} did not {what} within {self._deadline_s:g} s (--engine-deadline-s)"
            ) from error
        except httpx.HTTPStatusError as error:
            url, status, text = error.request.url, error.response.status_code, error.response.text
            if error.response.is_server_error:
                raise EngineDiedError(f"{url}: answers {status}: {text[:300]}") from error
            raise UsageError(f"--rollout-url: {url} answers {status}: {text[:300]}") from error
        except httpx.HTTPError as error:
            raise EngineDiedError(
                f"{named}: no answer when asked to {what} ({type(error).__name__} {error})".rstrip()
            ) from error


def _completion(prompt: Sequence[int], choice: dict[str, Any]) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineDiedError(f"a server ended a completion with finish_reason={choice['finish_reason']!r}")
    spans = choice["weight_versions"]
    return Completion(
        text=choice["text"],
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(choice["token_ids"]),
        log_probs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
        finish_reason=choice["finish_reason"],
        weight_version=int(spans[0]["version"]) if spans and spans[0]["version"].isdigit() else None,
    )


def _address_towards(url: str) -> str:
    """Of this machine, as the one at `url` sees it."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=10) as connection:
        return str(connection.getsockname()[0])
