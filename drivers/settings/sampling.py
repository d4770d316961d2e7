"""Sampling parameters."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    n: int = 1
    temperature: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ("</answer>",)
    top_p: float = 1.0
    """Below 1 the log-probs are of another distribution than the policy's: renormalized over what was kept."""

    def alone(self) -> "Sampling":
        """The same, one completion for each prompt."""
        return replace(self, n=1)

    def greedy(self) -> "Sampling":
        """The likeliest token each time, once for each prompt."""
        return replace(self, n=1, temperature=0.0, top_p=1.0)


def stop_strings(reward: str) -> tuple[str, ...]:
    """Return the texts that end a response under this reward."""
    return ("</answer>",) if reward in ("r1_zero", "countdown", "gym") else ()
