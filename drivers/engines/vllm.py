"""vLLM as a rollout engine. Everything that touches vLLM's API stands in this file.

Weights travel by vLLM's own weight-transfer API (`start_weight_update`, `update_weights`, `finish_weight_update`),
never by reaching into the engine's model:

- two GPUs: the engine is a process of its own on the other GPU, and the `nccl` backend broadcasts to it;
- one GPU, or CPU: the engine lives in this process, and the `host` backend below hands it the tensors by reference;
- CPU, asked for: a process of its own as on two GPUs, which the `host` backend gives a file in memory.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import nn
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from drivers.common.errors import EngineDiedError, UsageError
from drivers.engines.protocol import Completion, check_weight_version
from drivers.engines.supervision import TRAINER, call_with_timeout, exit_when_trainer_exits, is_running
from drivers.engines.vllm_transfer import (
    PACKED_BUFFER_BYTES,
    HostTrainerInit,
    LocalClient,
    read_checksums,
    synchronize_before_send,
    version_of,
)
from drivers.policy.weights import Checksum, PolicyWeights, check_arrived
from drivers.settings.sampling import Sampling

T = TypeVar("T")


KV_CACHE_BYTES_ON_CPU = 512 << 20


CPU_BLOCK_SIZE = (
    32  # prefixes are shared in whole blocks; vLLM's default on CPU (128) would share none of a short prompt
)


exit_when_trainer_exits()


# --- the engine ------------------------------------------------------------------------------------------------------
class VLLMEngine:
    """Samples with vLLM, with the policy's weights as of the last `load_weights`."""

    def __init__(
        self,
        model_path: str,
        policy: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
        gpu_memory_utilization: float,
        reserved_bytes: int,
        seed: int,
        own_process: bool = False,
        deadline_s: float = 3600.0,
        end_token_id: int | None = None,
    ) -> None:
        """`own_process` is for a CPU; on another GPU than the policy's it is the only way. There every wait ends.

        `end_token_id` ends a response, as those do that the model's folder names.
        """
        policy_device = self._policy_device = next(policy.parameters()).device
        if (device.type == "cpu") != current_platform.is_cpu():
            raise UsageError(
                f"rollout_device={device}: this vLLM is built for {current_platform.device_name} and samples there "
                "alone; install the other build, or pass --engine hf"
            )
        own_gpu = device.type == "cuda" and device != policy_device
        self._own_process, self._deadline_s = own_gpu or own_process, deadline_s
        self._end_token_id = end_token_id
        self._shares_gpu = device.type == "cuda" and not own_gpu
        self._asleep = False
        self._busy = threading.Lock()
        if self._shares_gpu:
            from drivers.engines.placement import (
                engine_memory_fraction,
            )  # here: a worker, which imports this file too, plans nothing

            total = torch.cuda.get_device_properties(device).total_memory
            gpu_memory_utilization = min(gpu_memory_utilization, engine_memory_fraction(reserved_bytes, total))
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(self._own_process)), TRAINER: str(os.getpid())}
        if self._own_process:  # the two take turns: neither keeps a core from the other
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if policy_device.type == "cuda":  # the sending side of nccl takes the current device, and LLM() may change it
            torch.cuda.set_device(policy_device)
        set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
        before = set(multiprocessing.active_children())
        with _in_time(deadline_s, before) if self._own_process else nullcontext():
            self._llm = LLM(
                model=model_path,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_model_len,
                seed=seed % 2**31,
                load_format="dummy",  # the first push brings the weights: the policy is their one source
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
                weight_transfer_config=WeightTransferConfig(backend="checked_nccl" if own_gpu else "host"),
                worker_extension_cls="drivers.engines.vllm_transfer.WorkerExtension",
                **placement(device, shared=self._shares_gpu, gpu_memory_utilization=gpu_memory_utilization),
            )
        self._processes = set(multiprocessing.active_children()) - before
        # vLLM's CPU worker replaces torch.set_num_threads by a no-op and may lower the count: undo both.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if policy_device.type == "cuda":
            torch.cuda.set_device(policy_device)
        self._version: int | None = None
        self._weights = PolicyWeights(policy, dtype)
        self._sender: TrainerWeightTransferEngine[Any] | None = None
        self._sender = self._ask("get ready for weights", lambda: self._make_sender(own_gpu))

    def _make_sender(self, own_gpu: bool) -> TrainerWeightTransferEngine[Any]:
        synchronize_before_send(
            self._policy_device
        )  # nccl's sends from the current device, and asked in a thread that is the first
        init, client = self._transfer_init(own_gpu), LocalClient(self._llm)
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=self._weights)

    def _transfer_init(self, own_gpu: bool) -> TrainerInitInfo:
        if not own_gpu:
            return HostTrainerInit(rank=0, by_file=self._own_process)
        from vllm.utils.network_utils import get_open_port

        return NCCLTrainerInitInfo(
            master_address="127.0.0.1",
            master_port=get_open_port(),
            world_size=1 + self._llm.get_world_size(),
            rank=0,
            packed_buffer_size_bytes=PACKED_BUFFER_BYTES,
        )

    def load_weights(self, version: int) -> None:
        """Push the policy's weights; every later sample is theirs, and says so by `version`."""
        self._ask("take the weights over", lambda: self._load_weights(version))

    def _load_weights(self, version: int) -> None:
        synchronize_before_send(self._policy_device)
        if self._asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
        assert self._sender is not None
        self._weights.take_checksums()
        self._sender.send_weights()
        self._version = version
        self._llm.update_weight_version(str(version))
        synchronize_before_send(self._policy_device)  # the sums too are taken on streams of the sender
        check_arrived(self._weights.take_checksums(), self._received(), version)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM refused to drop its prefix cache after a weight push: it holds keys of old weights"
            )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """`sampling.n` completions of each prompt, in order, all of one prompt together."""
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        # vLLM gives sample k of a request the seed s + k; prompts that share s would share their noise.
        parameters = [
            SamplingParams(
                **sampling_parameters(sampling, seed + index * sampling.n, self._end_token_id), flat_logprobs=True
            )
            for index in range(len(prompts))
        ]
        outputs = self._ask(
            f"answer {len(prompts)} prompts", lambda: self._llm.generate(requests, parameters, use_tqdm=False)
        )
        return check_weight_version(
            self._version, "vLLM", [_completion(output, sample) for output in outputs for sample in output.outputs]
        )

    def sleep(self) -> None:
        """Give the shared GPU's memory to the trainer until the next `load_weights`."""
        if self._shares_gpu and not self._asleep:
            self._llm.sleep(level=2)  # 2: the weights are pushed again anyway, so none need be kept
            self._asleep = True

    def received(self) -> list[dict[str, Checksum]]:
        """What each worker summed up of the last push."""
        return self._ask("sum its weights up", self._received)

    def _received(self) -> list[dict[str, Checksum]]:
        return read_checksums(self._llm.collective_rpc("received_checksums"))

    def close(self) -> None:
        """In this process, after what it still generates; a process of its own is ended at once."""
        if self._sender is not None:
            self._sender.shutdown()
        core = self._llm.llm_engine.engine_core
        with nullcontext() if self._own_process else self._busy:
            core.shutdown()
        if self._own_process:  # vLLM wakes nobody who waits for an answer of what has ended
            for answer in list(core.utility_results.values()):
                with suppress(InvalidStateError):
                    answer.set_exception(EngineDeadError())
            core.outputs_queue.put_nowait(EngineDeadError())

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """A process of its own may die, or never answer."""
        if not self._own_process:
            with self._busy:
                return call()
        try:
            return call_with_timeout(self._deadline_s, call, self._is_alive, self.close)
        except TimeoutError as error:
            raise EngineDiedError(
                f"vLLM did not {what} within {self._deadline_s:g} s (--engine-deadline-s) and was ended"
            ) from error
        except Exception as error:
            if self._is_alive() and not isinstance(error, EngineDeadError):
                raise
            self.close()
            raise EngineDiedError(f"vLLM's process died when it was to {what}; {self._exit_reason()}") from error

    def _exit_reason(self) -> str:
        """How it ended, as far as that is known: of a signal it says nothing itself."""
        status = next((code for process in self._processes if (code := process.exitcode) is not None), None)
        if status is not None and status < 0:
            return f"it was ended by {signal.Signals(-status).name}"
        return "its own error stands above" + (f" (exit status {status})" if status else "")

    def _is_alive(self) -> bool:
        return all(is_running(process.pid) for process in self._processes)


def sampling_parameters(sampling: Sampling, seed: int, end_token_id: int | None = None) -> dict[str, Any]:
    """Of one request, in vLLM's words."""
    return {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": [] if end_token_id is None else [end_token_id],
        "include_stop_str_in_output": True,
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone
    }


@contextmanager
def _in_time(seconds: float, before: set[Any]) -> Iterator[None]:
    """Child processes that start here never see Ctrl-C: the trainer ends them, after its update and its push.

    Those that are not among the children of `before` are ended when they are not there after so many seconds: vLLM
    waits for one that lives as long as it lives.
    """
    is_there, is_late = threading.Event(), threading.Event()

    def watch() -> None:
        wait_s = seconds
        while not is_there.wait(wait_s):  # once late, whatever is started after all is ended too
            is_late.set()
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            wait_s = 0.2

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not is_late.is_set():
            raise
        failure = error
    finally:
        is_there.set()
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if is_late.is_set():
        raise EngineDiedError(
            f"vLLM did not start within {seconds:g} s (--engine-deadline-s) and was ended"
        ) from failure


def _completion(output: Any, sample: Any) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a completion with finish_reason={sample.finish_reason!r}; 'stop' or 'length' is required"
        )
    return Completion(
        text=sample.text,
        prompt_token_ids=tuple(output.prompt_token_ids),
        token_ids=tuple(sample.token_ids),
        log_probs=tuple(sample.logprobs.logprobs),
        finish_reason=sample.finish_reason,
        weight_version=version_of([span.version for span in sample.weight_versions or ()]),
    )


def placement(device: torch.device, *, shared: bool, gpu_memory_utilization: float) -> dict[str, Any]:
    """Where the engine runs, and how much memory it takes there."""
    if device.type == "cpu":
        return {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": KV_CACHE_BYTES_ON_CPU,
            # A prompt that is prefilled in two parts ends seeded sampling: CPU generators have no offset to set.
            "enable_chunked_prefill": False,
            # An engine's process is its worker too: vLLM would start another, to bind threads to cores, which is not
            # asked for here. So it starts in half of the time.
            "distributed_executor_backend": UniProcExecutor,
        }
    return {
        "device_ids": [device.index or 0],
        "gpu_memory_utilization": gpu_memory_utilization,
        "enable_sleep_mode": shared,
    }
