"""The suite itself."""

import pytest


def test_those_of_a_group_run_one_after_the_other(request):
    """Two engines at once have neither the memory nor the time that their tests were given.

    pytest-xdist puts the group behind a test's name, and goes by that. Under pytest 9.2 its 3.8 does so without
    effect.
    """
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process runs all tests, or groups are not asked for")
    grouped = [item for item in request.session.items if item.get_closest_marker("xdist_group")]
    assert not [item.nodeid for item in grouped if "@" not in item.nodeid.rpartition("]")[2]]
