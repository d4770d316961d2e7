"""Choose and start a rollout engine."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from drivers.common.errors import UsageError
from drivers.engines.hf import HFEngine
from drivers.engines.options import EngineOptions
from drivers.engines.protocol import RolloutEngine
from drivers.engines.supervision import SupervisedEngine
from drivers.policy.weight_gatherer import WeightGatherer


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
    try:
        import drivers.engines.vllm  # noqa: F401  imports vLLM, which only this function does
    except ImportError as error:
        raise UsageError(
            f"--engine vllm: vLLM cannot be imported ({error}); install the extra 'cpu' or 'gpu', or pass --engine hf"
        ) from error
    try:
        return _start_vllm(options, weights, tokenizer.eos_token_id, say)
    except UsageError:
        raise
    except (ValueError, RuntimeError, OSError) as error:  # an unknown architecture, too little memory, a full disk
        raise UsageError(f"--engine vllm: vLLM cannot start: {' '.join(str(error).split())[:600]}") from error


def _start_vllm(
    options: EngineOptions, weights: WeightGatherer, end_token_id: int, say: Callable[[str], None]
) -> RolloutEngine:
    if options.urls:
        from drivers.engines.vllm_server import ServerEngine

        say(f"Waiting for {', '.join(options.urls)} ...")
        return SupervisedEngine(partial(ServerEngine, options, weights, end_token_id), say)
    from drivers.engines.vllm import VLLMEngine
    from drivers.engines.vllm_startup import place

    start = partial(VLLMEngine, options, weights, end_token_id)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch, about how vLLM uses it
        return SupervisedEngine(start, say) if place(options, weights.device).has_own_process else start()
