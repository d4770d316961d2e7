"""Settings of the tests of the programs."""

import pytest

from tests.drivers.helpers.forked import EngineContext


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Draw no curves.png at the end of a run, which takes longer than the run; a test marked `curves` has it drawn."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr("drivers.training.run.draw_curves", lambda _: None)


@pytest.fixture
def forked_engine(monkeypatch):
    """Fork vLLM's own process, which saves ten seconds of imports; the other tests start it as vLLM does on a CPU."""
    monkeypatch.setattr("vllm.v1.engine.utils.get_mp_context", EngineContext)
