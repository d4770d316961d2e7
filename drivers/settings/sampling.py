"""Sampling parameters, and their flags."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from drivers.common.errors import UsageError
from drivers.common.own_functions import SPELLING, is_own
from drivers.settings.base import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, Settings, Share


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
    top_k: int = 0
    """Keep this many tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the probability of the likeliest one."""
    replays: bool = False
    """Completions carry the set that each token was drawn from."""
    limits: tuple[int, ...] = ()
    """Maximum length of the completions of each prompt, none above `max_tokens`. Empty: all have `max_tokens`."""

    @property
    def truncates(self) -> bool:
        """Return whether tokens are drawn from a part of the vocabulary that depends on the distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def for_prompt(self, index: int) -> "Sampling":
        """Return the parameters of one prompt of the call."""
        return replace(self, max_tokens=self.limits[index], limits=()) if self.limits else self

    def untruncated(self, **changes: Any) -> "Sampling":
        """Return the same sampling of the whole vocabulary, with `changes`."""
        return replace(self, **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "replays": False} | changes)


def stop_strings(reward: str) -> tuple[str, ...]:
    """Return the texts that end a response under this reward."""
    return ("</answer>",) if reward in ("r1_zero", "think_answer", "countdown", "gym") else ()


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """The distribution that responses are drawn from."""

    heading: ClassVar[str] = "sampling"

    sampling_temperature: PositiveFloat = 1.0
    """Temperature of rollouts and evaluations. Log-probs in the loss use the same temperature."""
    sampling_min_tokens: NonNegativeInt = 4
    """Minimum length of a response in tokens. The sampler alone hides the end token until then, so its log-probs
    differ from the policy's there; the self-check skips those tokens unless they are replayed."""
    sampling_max_tokens: PositiveInt = 1024
    """Maximum length of a response in tokens; longer responses are truncated."""
    sampling_stop: tuple[str, ...] | None = None
    """Texts that end a response. Default: </answer> for r1_zero, think_answer, countdown and gym, none for others."""
    seed: Annotated[int, Bounds(at_least=-1e18, at_most=1e18)] = 0
    """Seed of sampling, and in training of the order of questions and of shuffling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling_min_tokens > self.sampling_max_tokens:
            raise UsageError(
                f"{self.flag('sampling_min_tokens')}: must not exceed {self.flag('sampling_max_tokens')}; pass "
                f"at most {self.sampling_max_tokens}"
            )
        if self.sampling_stop is not None and "" in self.sampling_stop:
            raise UsageError(
                "--sampling-stop '': an empty text would end every response before its first token; pass "
                "--sampling-stop without a text if nothing is to end a response"
            )


@dataclass(frozen=True, kw_only=True)
class NucleusSettings(SamplingSettings):
    """Sampling that can leave out the tail of the distribution."""

    sampling_top_p: Share = 1.0
    """Sample only from the most probable tokens that together have this probability. Below 1 the sampler's log-probs
    differ from the policy's, so settings that use their ratio need --sampling-replay."""
    sampling_top_k: NonNegativeInt = 0
    """Sample only from this many most probable tokens. Above 0, like --sampling-top-p below 1. 0 samples from all."""
    sampling_min_p: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.0
    """Sample only from tokens with at least this share of the probability of the most probable one. Above 0, like
    --sampling-top-p below 1. 0 samples from all."""


@dataclass(frozen=True, kw_only=True)
class ConversationSettings(Settings):
    """Responses that a function of the user's own composes."""

    heading: ClassVar[str] = "sampling"

    rollout: str | None = None
    """Your own `async` function as my_module:function or path/to/file.py:function, which composes a response of what
    the policy samples and of other tokens, such as the results of a tool (docs/tutorials/conversation.md). Default:
    a response is one completion."""
    rollout_deadline_s: PositiveFloat = 60.0
    """Longest wait for the --rollout function between two samples, in seconds; after it the program ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout is not None and not is_own(self.rollout):
            raise UsageError(f"--rollout {self.rollout}: must be {SPELLING}")
        if self.rollout is None and self.is_changed("rollout_deadline_s"):
            raise UsageError(f"{self.flag('rollout_deadline_s')}: has no effect without --rollout; omit it")


def make_sampling(settings: NucleusSettings, reward: str, n: int) -> Sampling:
    """Return the parameters that draw `n` responses to each prompt."""
    return Sampling(
        n=n,
        temperature=settings.sampling_temperature,
        top_p=settings.sampling_top_p,
        top_k=settings.sampling_top_k,
        min_p=settings.sampling_min_p,
        min_tokens=settings.sampling_min_tokens,
        max_tokens=settings.sampling_max_tokens,
        stop=stop_strings(reward) if settings.sampling_stop is None else settings.sampling_stop,
    )
