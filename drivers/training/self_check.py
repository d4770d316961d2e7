"""Check that the engine samples from the policy's weights, at start-up and after the first update."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError
from drivers.common.wrapping import print_line
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.policy import fsdp
from drivers.policy.checksums import check_arrived, checksums
from drivers.policy.lora import scaled_adapter
from drivers.policy.weights import PolicyWeights
from drivers.settings.evaluate import EvaluateConfig
from drivers.settings.grpo import GrpoConfig
from drivers.settings.sampling import Sampling
from drivers.training.batch import make_rollout_batch
from drivers.training.forward import forward

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.01}
"""Largest mean difference in nats. Measured: 6e-6 in float32, 0.02-0.05 in bfloat16, 0.002-0.004 in float16 (other
rounding)."""


@dataclass(frozen=True)
class Agreement:
    """Absolute differences of the log-probs of engine and policy over the sampled tokens, in nats."""

    mean: float
    largest: float
    n_tokens: int
    n_weights: int = 0
    """Tensors that reached each worker with the policy's checksum; 0 if none are transferred."""

    def __str__(self) -> str:
        arrived = f"; {self.n_weights} tensors arrived intact" if self.n_weights else ""
        return f"mean |difference| {self.mean:.2g}, max {self.largest:.2g} nats over {self.n_tokens} tokens{arrived}"


def self_check_sampling(config: GrpoConfig) -> Sampling:
    """Return the sampling of the self-check: about 64 compared tokens per response, truncated only if replayed.

    Without replay, a truncated sampler's log-probs belong to another distribution, even if the weights agree.
    """
    # The engine has room for a response of an evaluation, because the prompts are held-out questions.
    longest = min(config.sampling_max_tokens, config.eval_sampling.max_tokens)
    sampling = config.sampling if config.sampling.replays else config.sampling.untruncated()
    max_tokens = min(longest, config.sampling_min_tokens + 64)
    return replace(sampling, n=min(8, config.group_size), max_tokens=max_tokens)


def check_evaluation_engine(
    config: EvaluateConfig, engine: RolloutEngine, policy: nn.Module, prompts: Sequence[Sequence[int]]
) -> None:
    """Check the engine of an evaluation on a short response to each prompt, and print how well both agree.

    It samples at temperature 1 if the evaluation is greedy: the log-probs of a greedy sampler say nothing.
    """
    sampling = config.sampling.untruncated(
        n=1,
        temperature=config.sampling_temperature or 1.0,
        min_tokens=0,
        max_tokens=min(64, config.sampling_max_tokens),
    )
    tolerance = config.self_check_tolerance
    if tolerance is None:
        tolerance = DEFAULT_TOLERANCE[fsdp.computing_dtype(policy)]
    agreement = check_engine(engine, policy, prompts, sampling, version=0, tolerance=tolerance, seed=config.seed)
    print_line(f"self-check: {agreement}; {tolerance:g} mean allowed")


@torch.no_grad()
def check_engine(
    engine: RolloutEngine,
    policy: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    version: int,
    tolerance: float,
    seed: int,
    merges_lora: bool = True,
) -> Agreement:
    """Compare both sides' log-probs of the engine's samples; raise a TrainingAbortedError beyond `tolerance`.

    The first `min_tokens` tokens of a response are compared only if the sampling is replayed: otherwise only the
    sampler hides the end token there. The samples must come from weight version `version`.
    """
    n_weights = check_weights(engine, policy, version, merges_lora=merges_lora)
    completions = run_with_engine(engine, lambda: engine.generate(prompts, sampling, seed=seed))
    rollouts = make_rollout_batch(completions, torch.zeros(len(completions))).to(next(policy.parameters()).device)
    is_compared = rollouts.response_mask.clone()
    if not sampling.replays:
        is_compared[:, : sampling.min_tokens] = False
    log_probs = forward(policy, rollouts, sampling.temperature)["log_probs"]
    difference = (log_probs - rollouts.sampler_log_probs).abs()[is_compared]
    if difference.numel() == 0:
        raise TrainingAbortedError(
            f"self-check: no token to compare, because no response is longer than --sampling-min-tokens "
            f"{sampling.min_tokens}; lower it"
        )
    agreement = Agreement(difference.mean().item(), difference.max().item(), difference.numel(), n_weights)
    versions = {completion.weight_version for completion in completions} - {None}
    if versions - {version}:
        raise TrainingAbortedError(
            f"self-check: the engine has weight version {', '.join(sorted(map(str, versions)))}, expected {version}: "
            f"a weight push did not arrive ({agreement})"
        )
    if not agreement.mean <= tolerance:
        raise TrainingAbortedError(
            f"self-check: engine and policy disagree on the log-probs of the engine's samples: {agreement}; "
            f"{tolerance} mean allowed. Either the weights did not arrive, or the two compute differently. Compare "
            "with --dtype float32; raise --self-check-tolerance only if you know why they differ"
        )
    return agreement


def check_weights(engine: RolloutEngine, policy: nn.Module, version: int, *, merges_lora: bool = True) -> int:
    """Return how many tensors each worker received; raise a TrainingAbortedError unless they equal the policy's."""
    received = run_with_engine(engine, engine.received)
    if not received:
        return 0
    dtype = fsdp.computing_dtype(policy)
    expected = PolicyWeights(policy, dtype, merges_lora=merges_lora).checksums()
    if not merges_lora:
        expected |= checksums(scaled_adapter(policy, dtype).items())
    distributed.run_on_rank_zero(lambda: check_arrived(expected, received, version))
    return len(received[0])
