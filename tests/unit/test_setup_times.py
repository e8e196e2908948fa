"""Times of wide fixtures: what a guest says is checked, and only slow fixtures are remembered."""

import pytest

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.suite.forking import SLOW
from pytest_microvm.suite.setup_times import SetUpTimes


def test_only_slow_fixtures_are_remembered():
    times = SetUpTimes(["quick", "slow", "unknown"], {})
    times.add([[0, SLOW - 0.01], [1, SLOW]])
    assert times.slow(SLOW) == {"slow": SLOW}
    assert times.of(2) == 0.0


def test_times_of_earlier_runs_are_known_by_name():
    times = SetUpTimes(["a", "b"], {"b": 2.0, "c": 3.0})
    assert (times.of(0), times.of(1)) == (0.0, 2.0)


@pytest.mark.parametrize("measured", [3, [[0]], [[1, 1.0]], [[-1, 1.0]], [["0", 1.0]], [[0, 1.0, 2.0]]])
def test_what_is_no_list_of_times_is_refused(measured):
    with pytest.raises(ProtocolViolation):
        SetUpTimes(["a"], {}).add(measured)
