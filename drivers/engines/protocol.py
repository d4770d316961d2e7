"""The interface of everything that samples completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, Protocol

import torch

from drivers.common.errors import EngineDiedError
from drivers.engines.kept_tokens import KeptTokens
from drivers.policy.checksums import Checksum
from drivers.settings.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """A sampled response.

    A response of two tokens and an end token to a prompt of three tokens:

    >>> completion = Completion(
    ...     "42", prompt_token_ids=(7, 8, 9), token_ids=(4, 2, 0), log_probs=(-0.5, -0.25, -0.1), finish_reason="stop"
    ... )
    >>> len(completion.token_ids) == len(completion.log_probs)
    True
    """

    text: str
    """Decoded response, including the stop string that ended it."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled tokens, including the end token: training uses these. In a conversation, also the inserted tokens."""
    log_probs: tuple[float, ...]
    """Log-prob of each sampled token under the distribution that it was drawn from, in nats; 0 for an inserted one."""
    finish_reason: Literal["stop", "length"]
    """`length`: truncated at the token limit."""
    weight_version: int | None = None
    """Number of the push that brought the sampling weights; None if the engine does not report it."""
    kept: KeptTokens | None = None
    """The tokens that each token was drawn from, if the sampler truncates and its sets are replayed."""
    excluded: tuple[tuple[int, ...], ...] = ()
    """The tokens that the sampler hid from each of the first tokens, if they are replayed and not part of `kept`."""
    sampled: tuple[bool, ...] = ()
    """For each token of a conversation, True if sampled and False if inserted. Empty: all were sampled."""

    @property
    def is_sampled(self) -> tuple[bool, ...]:
        """Return whether each token was sampled."""
        return self.sampled or (True,) * len(self.token_ids)

    @property
    def n_sampled(self) -> int:
        """Return the number of sampled tokens."""
        return sum(self.sampled) if self.sampled else len(self.token_ids)


def end_token_ids(policy: Any, end_token_id: int | None) -> list[int]:
    """Return the tokens that end a response: those of the model's configuration, and `end_token_id`."""
    configured = policy.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, end_token_id] if i is not None})


def exclude_end(sampling: Sampling, end_ids: Sequence[int], length: int) -> tuple[tuple[int, ...], ...]:
    """Return `Completion.excluded` of a response: the end tokens, for each token below the minimum length."""
    if not sampling.replays or sampling.truncates:  # a truncated sampler's sets lack them
        return ()
    return (tuple(end_ids),) * min(sampling.min_tokens, length)


def check_weight_version(version: int | None, engine: str, completions: list[Completion]) -> list[Completion]:
    """Return `completions`; raise EngineDiedError if one was not sampled from the weights of the last push."""
    for other in {completion.weight_version for completion in completions} - {version}:
        raise EngineDiedError(
            f"{engine} has weight version {other}, expected {version}: it was restarted, or another trainer is "
            "updating it"
        )
    return completions


class RolloutEngine(Protocol):
    """Samples from the policy as of the last `load_weights`."""

    def load_weights(self, version: int) -> None:
        """Take the policy's current weights as `version`."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        """Sample `sampling.n` completions of each prompt, in the order of the prompts."""

    def sleep(self) -> None:
        """Give the memory of a shared GPU to the trainer until the next `load_weights`."""

    def received(self) -> list[dict[str, Checksum]]:
        """Return each worker's checksums of the last push; an engine that shares the weights has none."""

    def close(self) -> None:
        """Shut the engine down; an engine in this process first waits for a `generate` in another thread."""


def describe_completions(completions: Sequence[Completion]) -> dict[str, float]:
    """Return lengths, the share of truncated responses, and the entropy that the sampler's log-probs estimate."""
    lengths = torch.tensor([completion.n_sampled for completion in completions], dtype=torch.float64)
    log_probs = torch.tensor(
        [value for completion in completions for value in compress(completion.log_probs, completion.is_sampled)],
        dtype=torch.float64,
    )
    n_inserted = sum(completion.sampled.count(False) for completion in completions)
    inserted = {"inserted_tokens": n_inserted / len(completions)}
    return {
        **(inserted if any(completion.sampled for completion in completions) else {}),
        "response_tokens": lengths.mean().item(),
        "response_tokens_max": lengths.max().item(),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        "rollout_entropy": -log_probs.mean().item(),
    }
