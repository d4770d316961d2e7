"""Sample with vLLM servers, on this machine or on others.

Prompts are spread over the servers as token ids, and each push goes to all servers, by the same transfer API as in
`drivers.engines.vllm`: `nccl` from a GPU, or a file in memory from a CPU, which servers on this machine can read.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import starmap
from typing import Any, TypeVar

import httpx
import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines import vllm_http
from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import Completion, check_weight_version, end_token_ids, exclude_end
from drivers.engines.supervision import call_with_timeout
from drivers.engines.vllm import sampling_parameters
from drivers.engines.vllm_http import Servers
from drivers.engines.vllm_transfer import (
    HostSenderInit,
    WeightSender,
    nccl_init,
    read_checksums,
    synchronize_device,
    version_of,
)
from drivers.policy.checksums import Checksum, check_arrived, check_loaded
from drivers.policy.weights import WeightGatherer
from drivers.settings.sampling import Sampling

T = TypeVar("T")
START_S = 600.0
"""Longest wait for a server at the start, and after it died."""
CLOSE_S = 10.0
"""Longest wait for the servers to disconnect; a dead one never does."""
RESET_TRIES, RESET_WAIT_S = 20, 0.25
_EXCLUDED_LOG_PROB = -9999.0
"""The value that stands for -inf in a server's JSON."""


def format_command(dtype: torch.dtype, policy_device: torch.device) -> str:
    """Return the command that starts a server for a policy of this type on this device."""
    on_gpu = policy_device.type == "cuda"
    backend, head = ("checked_nccl", """ --hf-overrides '{"head_dtype": "float32"}'""") if on_gpu else ("host", "")
    return (
        "VLLM_SERVER_DEV_MODE=1 PYTHONPATH=. vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs "
        "--max-logprobs -1 --return-tokens-as-token-ids "
        f"--load-format dummy --dtype {str(dtype).removeprefix('torch.')} --max-model-len TOKENS{head} "
        f"""--weight-transfer-config '{{"backend": "{backend}"}}' """
        "--worker-extension-cls drivers.engines.vllm_transfer.WorkerExtension"
    )


class ServerEngine:
    """A `RolloutEngine` that samples with vLLM servers."""

    def __init__(
        self,
        options: EngineOptions,
        weights: WeightGatherer,
        end_token_id: int | None = None,
        *,
        start_s: float = START_S,
    ) -> None:
        """Wait for the servers at `options.urls` and connect to them. A response ends at `end_token_id`."""
        self._deadline_s, self._device, self._end_token_id = options.deadline_s, weights.device, end_token_id
        self._policy: Any = weights.policy
        self._command = format_command(options.dtype, weights.device)
        self._version: int | None = None
        self._sender: WeightSender | None = None
        self._servers = Servers(options.urls, options.deadline_s)
        try:
            self._servers.wait_until_healthy(start_s)
            self._sender = self._call(
                "the setup of the weight transfer", lambda: self._connect(weights, options.max_model_len)
            )
        except BaseException:
            self.close()
            raise

    def _connect(self, weights: WeightGatherer, max_model_len: int) -> WeightSender:
        self._servers.n_workers = [int(answer["world_size"]) for answer in self._servers.call("GET", "get_world_size")]
        self._check_workers()
        self._check_max_model_len(max_model_len)
        return WeightSender(weights, self._transfer_init(weights), self._servers)

    def _check_workers(self) -> None:
        try:
            answers = self._servers.post("collective_rpc", {"method": "received_checksums"})
        except httpx.HTTPStatusError as error:
            raise UsageError(
                f"--rollout-url {error.request.url}: lacks a required flag; start it with: {self._command}"
            ) from error
        for url, size, answer in zip(self._servers.urls, self._servers.n_workers, answers, strict=True):
            if len(answer["results"]) != size:  # with --data-parallel-size only the first engine answers
                raise UsageError(
                    f"--rollout-url {url}: only {len(answer['results'])} of its {size} workers report checksums, so a "
                    "push could not be checked; start one server per engine, without --data-parallel-size"
                )

    def _check_max_model_len(self, max_model_len: int) -> None:
        for url, answer in zip(self._servers.urls, self._servers.call("GET", "v1/models"), strict=True):
            length = answer["data"][0]["max_model_len"]
            if length < max_model_len:
                raise UsageError(
                    f"--rollout-url {url}: its --max-model-len is {length}, but a prompt and its response take up to "
                    f"{max_model_len} tokens; start it with --max-model-len {max_model_len}"
                )

    def _transfer_init(self, weights: WeightGatherer) -> TrainerInitInfo:
        if self._device.type == "cpu":
            return HostSenderInit(rank=0, by_file=True)
        addresses = {vllm_http.local_address_towards(url) for url in self._servers.urls}
        # Servers on different networks reach this machine at different addresses: then listen on all.
        return nccl_init(addresses.pop() if len(addresses) == 1 else "0.0.0.0", sum(self._servers.n_workers), weights)

    def load_weights(self, version: int) -> None:
        """Push the policy's weights and check that they arrived; later samples carry `version`."""
        self._call("the weight push", lambda: self._load_weights(version))

    def _load_weights(self, version: int) -> None:
        assert self._sender is not None
        synchronize_device(self._device)
        self._version = version
        sent = self._sender.send()
        self._servers.post("update_weight_version", {"new_version": str(version)})
        check_arrived(sent, self._received(), version)
        check_loaded(self._unloaded(), version)
        self._reset_prefix_cache()

    def _reset_prefix_cache(self) -> None:
        for _ in range(RESET_TRIES):
            answers = self._servers.post("reset_prefix_cache")
            refused = [u for u, answer in zip(self._servers.urls, answers, strict=True) if not answer["success"]]
            if not refused:
                return
            time.sleep(RESET_WAIT_S)  # the scheduler may still be removing the last requests
        raise RuntimeError(
            f"{', '.join(refused)} refused to drop the prefix cache after a weight push: it has keys of old weights"
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """Sample `sampling.n` completions of each prompt, in the order of the prompts."""
        return self._call(
            f"sampling from {len(prompts)} prompts", lambda: asyncio.run(self._generate(prompts, sampling, seed))
        )

    async def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Completion]:
        vocab = self._policy.config.get_text_config().vocab_size
        end_ids = end_token_ids(self._policy, self._end_token_id)

        async def sample_group(index: int, prompt: Sequence[int]) -> list[Completion]:
            url, own_seed = self._servers.urls[index % len(self._servers.urls)], seed + index * sampling.n
            body = {
                "token_ids": list(prompt),
                "sampling_params": sampling_parameters(
                    sampling.for_prompt(index), own_seed, self._end_token_id, vocab
                ),
                "output_mode": "text",
            }
            answer = await client.post(f"{url}/inference/v1/generate", json=body)
            answer.raise_for_status()
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            completions = [_completion(prompt, choice, sampling, end_ids) for choice in choices]
            return check_weight_version(self._version, url, completions)

        async with vllm_http.open_client(self._deadline_s) as client:
            groups = await asyncio.gather(*starmap(sample_group, enumerate(prompts)))
        return [completion for group in groups for completion in group]

    def sleep(self) -> None:
        """Do nothing: servers share no GPU with the policy."""

    def received(self) -> list[dict[str, Checksum]]:
        """Return the checksums of the last push, as each worker of each server took them."""
        return self._call("the request for checksums", self._received)

    def _received(self) -> list[dict[str, Checksum]]:
        return read_checksums(self._ask_workers("received_checksums"))

    def _unloaded(self) -> list[str]:
        """Return what each worker of each server has not loaded of the last push."""
        return self._ask_workers("unloaded_weights")

    def _ask_workers(self, method: str) -> list[Any]:
        """Return the answer of each worker of each server."""
        answers = self._servers.post("collective_rpc", {"method": method})
        return [worker for answer in answers for worker in answer["results"]]

    def close(self) -> None:
        """Disconnect from the servers, which keep running."""
        self._servers.failure = self._servers.failure or EngineDiedError(
            f"connection to {', '.join(self._servers.urls)} was closed"
        )
        if self._sender is not None:
            self._sender.shutdown()
        with suppress(Exception):  # fails on a dead server, and on the second call
            self._servers.post("shutdown_weight_transfer_engine", timeout_s=CLOSE_S)
        self._servers.close()

    def _call(self, operation: str, call: Callable[[], T]) -> T:
        """Return `call()`; turn every failure of a server into one line that names the server and the operation."""
        named, remedy = ", ".join(self._servers.urls), f"start it with: {self._command}"
        with vllm_http.report_failures("--rollout-url", named, operation, self._deadline_s, remedy):
            try:
                return call_with_timeout(self._deadline_s, call, lambda: self._servers.failure is None, self.close)
            except EngineDiedError as error:
                raise self._servers.failure or error from None


def _completion(
    prompt: Sequence[int], choice: dict[str, Any], sampling: Sampling, end_ids: Sequence[int]
) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise EngineDiedError(f"a server ended a completion with finish_reason={choice['finish_reason']!r}")
    positions = choice["logprobs"]["content"]
    return Completion(
        text=choice["text"],
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(choice["token_ids"]),
        log_probs=tuple(token["logprob"] for token in positions),
        finish_reason=choice["finish_reason"],
        weight_version=version_of([span["version"] for span in choice["weight_versions"] or ()]),
        kept=_read_kept(positions) if sampling.replays and sampling.truncates else None,
        excluded=exclude_end(sampling, end_ids, len(choice["token_ids"])),
    )


def _read_kept(positions: Sequence[dict[str, Any]]) -> KeptTokens:
    """Return the tokens that the sampler kept, from the log-probs of each position."""
    try:
        return KeptTokens.pack(
            [
                [
                    int(token["token"].split("token_id:")[1])
                    for token in position["top_logprobs"]
                    if token["logprob"] > _EXCLUDED_LOG_PROB
                ]
                for position in positions
            ]
        )
    except IndexError as error:
        raise UsageError(
            "--sampling-replay: a server names tokens by their text; start it with --return-tokens-as-token-ids"
        ) from error
