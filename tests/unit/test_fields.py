"""Whole numbers in JSON messages of a peer."""

import pytest

from pytest_microvm.wire.fields import is_whole, number_field
from pytest_microvm.wire.frames import WireError


@pytest.mark.parametrize("value", [1, 7])
def test_number_within_its_limits(value):
    assert is_whole(value, 1, 7)


@pytest.mark.parametrize("value", [0, 8, -1, True, 1.0, "1", None, [1], 10**30])
def test_value_that_is_no_number_within_its_limits(value):
    assert not is_whole(value, 1, 7)


def test_number_of_a_message():
    assert number_field({"id": 5}, "id") == 5


@pytest.mark.parametrize("message", [{}, {"id": None}, {"id": 0}, {"id": True}, {"id": "1"}, {"id": 2**53}])
def test_message_without_a_number(message):
    with pytest.raises(WireError, match="'id'"):
        number_field(message, "id")
