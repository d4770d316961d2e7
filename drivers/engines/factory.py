"""Choose and start a rollout engine."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch

from drivers.common import distributed
from drivers.common.errors import GrpoError, UsageError, shorten
from drivers.engines.hf import HFEngine
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import RolloutEngine
from drivers.engines.supervision import SupervisedEngine
from drivers.policy.weights import WeightGatherer


def describe_start(kind: Literal["vllm", "hf"], device: torch.device) -> str:
    """Return what `make_engine` does, for the display."""
    if kind == "hf":
        return "Starting the engine"
    return "Starting vLLM" + ", which compiles the model for the GPU" * (device.type == "cuda")


def make_engine(
    kind: Literal["vllm", "hf"],
    options: EngineOptions,
    weights: WeightGatherer,
    tokenizer: Any,
    say: Callable[[str], None] = print,
) -> RolloutEngine:
    """Start the engine and return it: Hugging Face, vLLM servers if there are URLs, or a local vLLM.

    A response ends at the tokenizer's end token, or at one that the model's configuration names. An engine in a
    different process is supervised: `say` reports when it had to be started again.
    """
    if kind == "hf":
        return HFEngine(weights.policy, tokenizer)
    weights.metadata()  # raises a UsageError now if the weights cannot be pushed
    try:  # vLLM is optional, and only this function imports it
        from drivers.engines.vllm import VLLMEngine
        from drivers.engines.vllm_server import ServerEngine
        from drivers.engines.vllm_startup import place
    except ImportError as error:
        raise UsageError(
            f"--engine vllm: vLLM cannot be imported ({error}); install the extra 'cpu' or 'gpu', or pass --engine hf"
        ) from error
    arguments = (options, weights, tokenizer.eos_token_id)
    try:
        if options.urls:
            say(f"Waiting for {', '.join(options.urls)} ...")
            return SupervisedEngine(partial(ServerEngine, *arguments), say)
        start = partial(VLLMEngine, *arguments)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch, about how vLLM uses it
            return SupervisedEngine(start, say) if place(options, weights.device).has_own_process else start()
    except UsageError:
        raise
    except Exception as error:  # an unknown architecture, a kernel that is not built, too little memory, a full disk
        remedy = "--engine hf takes any model" if options.adapter is None else "pass --lora-push merged"
        raise UsageError(f"--engine vllm: vLLM cannot start: {shorten(error, 600)}; {remedy}") from error


@contextmanager
def blame_engine(kind: Literal["vllm", "hf"], model: str) -> Iterator[None]:
    """Report any error of the first samples as a UsageError: this engine cannot run the model."""
    try:
        yield
    except GrpoError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and distributed.is_peer_failure(error):
            raise
        remedy = "--engine hf takes any model" if kind == "vllm" else "pass another model or --dtype"
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise UsageError(f"--engine {kind}: cannot sample from {model} ({reason}); {remedy}") from error
