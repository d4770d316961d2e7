"""Settings of the tests of the programs."""

import pytest


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Draw no curves.png at the end of a run, which takes longer than the run; a test marked `curves` has it drawn."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr("drivers.training.run.draw_curves", lambda _: None)
