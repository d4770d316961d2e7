"""Does the engine sample from the policy's weights? Asked at start-up and after the first update."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from drivers.common import distributed
from drivers.common.errors import TrainingAbortedError
from drivers.engines.protocol import RolloutEngine
from drivers.engines.rank_zero import run_with_engine
from drivers.policy import fsdp
from drivers.policy.weights import PolicyWeights, check_arrived
from drivers.settings.sampling import Sampling
from drivers.training.batch import make_rollout_batch
from drivers.training.scoring import score

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.08}
"""Largest mean |difference| in nats. Measured: 6e-6 in float32; 0.02-0.05 in bfloat16, where kernels round apart."""


@dataclass(frozen=True)
class Agreement:
    """|log-prob of the engine - log-prob of the policy| over the sampled tokens, in nats."""

    mean: float
    largest: float
    n_tokens: int
    n_weights: int = 0
    """Tensors that arrived with the policy's checksums, in each worker; 0 where none travel."""

    def __str__(self) -> str:
        arrived = f"; {self.n_weights} tensors arrived whole" if self.n_weights else ""
        return f"mean |difference| {self.mean:.2g}, max {self.largest:.2g} nats over {self.n_tokens} tokens{arrived}"


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
) -> Agreement:
    """Compare both sides on the engine's own samples; beyond `tolerance`, or from another push than `version`, stop.

    The first `min_tokens` tokens of a response are left out: there only the sampler hides the end token.
    """
    n_weights = check_weights(engine, policy, version)
    completions = run_with_engine(engine, lambda: engine.generate(prompts, sampling, seed=seed))
    rollouts = make_rollout_batch(completions, torch.zeros(len(completions))).to(next(policy.parameters()).device)
    compared = rollouts.response_mask.clone()
    compared[:, : sampling.min_tokens] = False
    difference = (score(policy, rollouts, sampling.temperature)["log_probs"] - rollouts.sampler_log_probs).abs()[
        compared
    ]
    if difference.numel() == 0:
        raise TrainingAbortedError(
            f"self-check: no token to compare, for every response is at most min_tokens={sampling.min_tokens} long: "
            "lower --sampling-min-tokens"
        )
    agreement = Agreement(difference.mean().item(), difference.max().item(), difference.numel(), n_weights)
    versions = {completion.weight_version for completion in completions} - {None}
    if versions - {version}:
        raise TrainingAbortedError(
            f"self-check: the engine samples from the weights of push {sorted(map(str, versions))}, the policy is at "
            f"{version}: a weight push did not arrive ({agreement})"
        )
    if not agreement.mean <= tolerance:
        raise TrainingAbortedError(
            f"self-check: engine and policy disagree on the log-probs of the engine's own samples: {agreement}; "
            f"{tolerance} is allowed. Either the weights did not arrive, or the two compute differently: compare with "
            "--dtype float32, and raise --self-check-tolerance only if you know why they differ"
        )
    return agreement


def check_weights(engine: RolloutEngine, policy: nn.Module, version: int) -> int:
    """How many tensors each worker of the engine received; an error if any is not the policy's, bit for bit."""
    received = run_with_engine(engine, engine.received)
    if not received:
        return 0
    expected = PolicyWeights(policy, fsdp.computing_dtype(policy)).checksums()
    distributed.run_on_rank_zero(lambda: check_arrived(expected, received, version))
    return len(received[0])
