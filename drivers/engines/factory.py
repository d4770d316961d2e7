"""Choose and start a rollout engine."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from drivers.common.errors import UsageError
from drivers.engines.hf import HFEngine
from drivers.engines.protocol import RolloutEngine


def make_engine(
    kind: Literal["vllm", "hf"],
    *,
    model_path: str,
    policy: nn.Module,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    gpu_memory_utilization: float,
    reserved_bytes: int,
    seed: int,
    own_process: bool = False,
    deadline_s: float = 3600.0,
    urls: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> RolloutEngine:
    """The engine that was asked for: the servers at `urls`, if any. vLLM is imported here and nowhere earlier.

    A response ends with the tokenizer's end token, and with those that the model's own configuration names.
    `reserved_bytes` of a GPU that engine and policy share are not the engine's. In a process of its own (on the CPU
    with `own_process`, on a second GPU in any case) it is supervised, and `say` tells when it had to be started again.
    """
    if kind == "hf":
        return HFEngine(policy, tokenizer)
    try:
        from drivers.engines.vllm import VLLMEngine
    except ImportError as error:
        raise UsageError(
            f"--engine vllm: vLLM cannot be imported ({error}); install the extra 'cpu' or 'gpu', or pass --engine hf"
        ) from error
    try:
        from drivers.engines.supervision import SupervisedEngine

        if urls:
            from drivers.engines.vllm_server import ServerEngine

            settings: dict[str, Any] = {"dtype": dtype, "max_model_len": max_model_len, "deadline_s": deadline_s}
            settings["end_token_id"] = tokenizer.eos_token_id
            say(f"Waiting for {', '.join(urls)} ...")
            return SupervisedEngine(partial(ServerEngine, urls, policy, **settings), say)
        start = partial(
            VLLMEngine,
            model_path,
            policy,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            reserved_bytes=reserved_bytes,
            seed=seed,
            own_process=own_process,
            deadline_s=deadline_s,
            end_token_id=tokenizer.eos_token_id,
        )
        apart = own_process or (device.type == "cuda" and device != next(policy.parameters()).device)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between vLLM and torch
            return SupervisedEngine(start, say) if apart else start()
    except UsageError:
        raise
    except (ValueError, RuntimeError, OSError) as error:  # an unknown architecture, too little memory, a full disk
        raise UsageError(f"--engine vllm: vLLM cannot start: {' '.join(str(error).split())[:600]}") from error
