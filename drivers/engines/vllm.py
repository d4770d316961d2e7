"""Sample with vLLM, in this process or in a separate one.

Weights travel by vLLM's own weight-transfer API (`start_weight_update`, `update_weights`, `finish_weight_update`):

- two GPUs: vLLM is a separate process on its own GPU, and the `nccl` backend broadcasts to it;
- one GPU, or a CPU: vLLM lives in this process, and the `host` backend hands it the tensors by reference;
- a CPU with `--rollout-process own`: a separate process, which the `host` backend gives a file in memory.

With `--lora-push adapter`, only the frozen weights travel this way; `vllm_adapter` sends the updates.
"""

import math
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import torch
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import TrainerInitInfo
from vllm.v1.engine.exceptions import EngineDeadError

from drivers.common.errors import EngineDiedError
from drivers.engines.kept_tokens import KeptTokens
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import Completion, check_weight_version, end_token_ids, exclude_end
from drivers.engines.supervision import call_with_timeout, is_running
from drivers.engines.vllm_adapter import AdapterSender
from drivers.engines.vllm_startup import place, start_llm
from drivers.engines.vllm_transfer import (
    HostSenderInit,
    LocalClient,
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
_MAX_TIES = 16
"""Tokens as likely as the last one of top-k, which vLLM keeps too. More than these are not replayed."""
MAX_SETUP_S = 600.0
"""Longest wait for the handshake of the weight transfer, during which an error of the worker is not reported."""


class VLLMEngine:
    """A `RolloutEngine` that samples with vLLM."""

    def __init__(self, options: EngineOptions, weights: WeightGatherer, end_token_id: int | None = None) -> None:
        """Start vLLM. A response ends at `end_token_id`, or at one that the model's folder names."""
        self._policy, self._policy_device, self._end_token_id = weights.policy, weights.device, end_token_id
        self._placement, self._deadline_s = place(options, weights.device), options.deadline_s
        self._version: int | None = None
        self._is_asleep = False
        self._busy = threading.Lock()
        self._llm, self._processes = start_llm(options, self._placement, weights.device)
        self._adapter = None if options.adapter is None else AdapterSender(self._llm, weights)
        self._base: dict[str, Checksum] = {}
        self._sender: WeightSender | None = None
        self._sender = self._call(
            "the setup of the weight transfer",
            lambda: WeightSender(weights, self._transfer_init(weights), LocalClient(self._llm)),
            MAX_SETUP_S,
        )

    def _transfer_init(self, weights: WeightGatherer) -> TrainerInitInfo:
        if not self._placement.has_own_gpu:
            return HostSenderInit(rank=0, by_file=self._placement.has_own_process)
        return nccl_init("127.0.0.1", self._llm.get_world_size(), weights)

    def load_weights(self, version: int) -> None:
        """Push the policy's weights and check that they arrived; later samples carry `version`."""
        self._call("the weight push", lambda: self._load_weights(version))

    def _load_weights(self, version: int) -> None:
        synchronize_device(self._policy_device)
        if self._is_asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
        sent = self._send()
        self._version = version
        self._llm.update_weight_version(str(version))
        check_arrived(sent, self._received(), version)
        check_loaded(self._unloaded(), version)
        if self._is_asleep:  # the cache comes after the weights, so that their memory peaks do not add up
            self._llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to drop its prefix cache after a weight push: it has keys of old weights")

    def _send(self) -> dict[str, Checksum]:
        """Send what the workers lack, and return the checksums of all that they must have then."""
        assert self._sender is not None
        if self._adapter is None:
            return self._sender.send()
        if self._is_asleep or not self._base:  # sleep has dropped the frozen weights too
            self._base = self._sender.send()
        return self._base | self._adapter.send()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """Sample `sampling.n` completions of each prompt, in the order of the prompts."""
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        # vLLM gives sample k of a request the seed s + k; prompts with the same s would share their noise.
        seeds = [seed + index * sampling.n for index in range(len(prompts))]
        vocab, end_ids = self._llm.model_config.get_vocab_size(), end_token_ids(self._policy, self._end_token_id)
        parameters = [
            SamplingParams(
                **sampling_parameters(sampling.for_prompt(index), own_seed, self._end_token_id, vocab),
                flat_logprobs=True,
            )
            for index, own_seed in enumerate(seeds)
        ]
        adapter = None if self._adapter is None else self._adapter.request
        outputs = self._call(
            f"sampling from {len(prompts)} prompts",
            lambda: self._llm.generate(requests, parameters, use_tqdm=False, lora_request=adapter),
        )
        completions = [
            _completion(output, sample, sampling, end_ids) for output in outputs for sample in output.outputs
        ]
        return check_weight_version(self._version, "vLLM", completions)

    def sleep(self) -> None:
        """Give the memory of a shared GPU to the trainer until the next `load_weights`."""
        if self._placement.shares_gpu and not self._is_asleep:
            self._llm.sleep(level=2)  # level 2 drops the weights: the next push brings them
            self._is_asleep = True

    def received(self) -> list[dict[str, Checksum]]:
        """Return the checksums of the last push, as each worker took them."""
        return self._call("the request for checksums", self._received)

    def _received(self) -> list[dict[str, Checksum]]:
        received = read_checksums(self._llm.collective_rpc("received_checksums"))
        if self._adapter is None:
            return received
        adapters = read_checksums(self._adapter.received())
        return [base | adapter for base, adapter in zip(received, adapters, strict=True)]

    def _unloaded(self) -> list[str]:
        """Return what each worker has not loaded of the last push."""
        return list(self._llm.collective_rpc("unloaded_weights"))

    def close(self) -> None:
        """Shut vLLM down: in this process after its current request, in a separate process at once."""
        if self._sender is not None:
            self._sender.shutdown()
        core, has_own_process = self._llm.llm_engine.engine_core, self._placement.has_own_process
        with nullcontext() if has_own_process else self._busy:
            try:
                if not has_own_process:
                    self._llm.collective_rpc("release_model")
            finally:
                core.shutdown()
        if has_own_process:  # wake threads that wait for an answer: vLLM leaves them waiting
            for answer in list(core.utility_results.values()):
                with suppress(InvalidStateError):
                    answer.set_exception(EngineDeadError())
            core.outputs_queue.put_nowait(EngineDeadError())

    def _call(self, operation: str, call: Callable[[], T], limit_s: float = math.inf) -> T:
        """Return `call()`; raise EngineDiedError if vLLM's separate process exits or takes too long."""
        deadline_s = min(self._deadline_s, limit_s)
        if not self._placement.has_own_process:
            with self._busy:
                return call()
        try:
            return call_with_timeout(deadline_s, call, self._is_alive, self.close)
        except TimeoutError as error:
            raise EngineDiedError(
                f"vLLM did not finish {operation} within {deadline_s:g} s (--engine-deadline-s) and was killed"
            ) from error
        except Exception as error:
            if self._is_alive() and not isinstance(error, EngineDeadError):
                raise
            self.close()
            raise EngineDiedError(f"vLLM process exited during {operation}: {self._exit_reason()}") from error

    def _exit_reason(self) -> str:
        """Return why the process exited. Only a process that no signal killed reports an error itself."""
        status = next((code for process in self._processes if (code := process.exitcode) is not None), None)
        if status is not None and status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return "see its own error above" + (f" (exit status {status})" if status else "")

    def _is_alive(self) -> bool:
        return all(is_running(process.pid) for process in self._processes)


def sampling_parameters(
    sampling: Sampling, seed: int, end_token_id: int | None = None, vocab: int = 0
) -> dict[str, Any]:
    """Return the fields of a request to vLLM for a model of `vocab` tokens."""
    reads_sets = sampling.replays and sampling.truncates
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": [] if end_token_id is None else [end_token_id],
        "include_stop_str_in_output": True,
        "seed": seed,
        # Of the sampled token only, or of all that top-k kept: tokens that were not kept have a log-prob of -inf.
        "logprobs": min(sampling.top_k + _MAX_TIES, vocab) if reads_sets else 0,
    }


def _completion(output: Any, sample: Any, sampling: Sampling, end_ids: Sequence[int]) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a completion with finish_reason={sample.finish_reason!r}; expected 'stop' or 'length'"
        )
    return Completion(
        text=sample.text,
        prompt_token_ids=tuple(output.prompt_token_ids),
        token_ids=tuple(sample.token_ids),
        log_probs=tuple(sample.logprobs.logprobs[start] for start in sample.logprobs.start_indices),
        finish_reason=sample.finish_reason,
        weight_version=version_of([span.version for span in sample.weight_versions or ()]),
        kept=_read_kept(sample.logprobs) if sampling.replays and sampling.truncates else None,
        excluded=exclude_end(sampling, end_ids, len(sample.token_ids)),
    )


def _read_kept(flat: Any) -> KeptTokens:
    """Return the tokens with a finite log-prob, from the log-probs of each position; the first is the sampled one."""
    return KeptTokens.pack(
        [
            list(dict.fromkeys(token for token, value in zip(ids, values, strict=True) if value > -math.inf))
            for ids, values in (
                (flat.token_ids[start:end], flat.logprobs[start:end])
                for start, end in zip(flat.start_indices, flat.end_indices, strict=True)
            )
        ]
    )
