"""The interface of everything that samples completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from drivers.common.errors import EngineDiedError
from drivers.policy.weights import Checksum
from drivers.settings.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """One sampled response, as the engine sampled it."""

    text: str
    """Ends with the stop string, if that ended it."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """As sampled, the end token included: what training uses."""
    log_probs: tuple[float, ...]
    """Of each sampled token under the distribution it was drawn from, in nats."""
    finish_reason: Literal["stop", "length"]
    """`length`: cut off at the token limit."""
    weight_version: int | None = None
    """The push that the sampling weights came from; None where the engine cannot tell."""


def check_weight_version(version: int | None, engine: str, completions: list[Completion]) -> list[Completion]:
    """`completions`, if all are from the weights that this engine was pushed last: samples of others are not taken."""
    for other in {completion.weight_version for completion in completions} - {version}:
        raise EngineDiedError(
            f"{engine} samples from the weights of push {other}, {version} was the last one: it has been started "
            "again, or somebody else pushes"
        )
    return completions


class RolloutEngine(Protocol):
    """Samples from the policy as of the last `load_weights`."""

    def load_weights(self, version: int) -> None:
        """Take over the policy's weights as they are now, and call them `version`."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """`sampling.n` completions of each prompt, in the order of the prompts, those of one prompt together."""
        ...

    def sleep(self) -> None:
        """Hand shared device memory to the trainer until the next `load_weights`."""
        ...

    def received(self) -> list[dict[str, Checksum]]:
        """Checksums of the last push, taken where it arrived, once for each worker; none where nothing travels."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used again. Waits for a `generate` that runs in another thread."""
        ...


def describe_completions(completions: Sequence[Completion]) -> dict[str, float]:
    """Lengths, cut-offs, and the entropy estimate that the sampler's own log-probs give."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    log_probs = torch.tensor(
        [value for completion in completions for value in completion.log_probs], dtype=torch.float64
    )
    return {
        "response_tokens": lengths.mean().item(),
        "response_tokens_max": lengths.max().item(),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        "rollout_entropy": -log_probs.mean().item(),
    }
