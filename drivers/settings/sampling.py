"""Sampling parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Parameters of one call of the sampler; the defaults are those of a plain sample."""

    n: int = 1
    temperature: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ("</answer>",)
    top_p: float = 1.0
    """Below 1, the log-probs are renormalized over the tokens that were kept, so they differ from the policy's."""


def stop_strings(reward: str) -> tuple[str, ...]:
    """Return the texts that end a response under this reward."""
    return ("</answer>",) if reward in ("r1_zero", "countdown", "gym") else ()
