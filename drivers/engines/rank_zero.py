"""An engine that is used by several ranks and lives on rank 0."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from drivers.engines.protocol import Completion, RolloutEngine
from drivers.policy.checksums import Checksum
from drivers.policy.weights import WeightGatherer
from drivers.settings.sampling import Sampling

T = TypeVar("T")


class EngineOnRankZero:
    """The engine of a run with several ranks: rank 0 holds it, and the other ranks only help to gather weights."""

    def __init__(self, engine: RolloutEngine | None, gatherer: WeightGatherer) -> None:
        self._engine, self.gatherer = engine, gatherer

    def load_weights(self, version: int) -> None:
        self._on_this_rank().load_weights(version)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Completion]:
        return self._on_this_rank().generate(prompts, sampling, seed=seed)

    def received(self) -> list[dict[str, Checksum]]:
        return self._on_this_rank().received()

    def sleep(self) -> None:
        if self._engine is not None:
            self._engine.sleep()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _on_this_rank(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("only rank 0 has an engine: call it inside run_with_engine")
        return self._engine


def run_with_engine(engine: RolloutEngine, call: Callable[[], T]) -> T:
    """Return the result of `call()`, which uses `engine` on rank 0, on every rank.

    The other ranks help to gather weights during the call: for a push, or for an engine that died and was restarted.
    """
    return engine.gatherer.run_on_rank_zero(call) if isinstance(engine, EngineOnRankZero) else call()
