"""Fields of a guest's answers: the right type and range, or the machine is ended."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_microvm.agent.answers import Answer
from pytest_microvm.errors import ProtocolViolation
from support.collected import JSON

KINDS = frozenset(["file", "directory"])
READERS = {
    "whole": lambda answer: answer.whole("field"),
    "number": lambda answer: answer.number("field"),
    "choice": lambda answer: answer.choice("field", KINDS),
    "path": lambda answer: answer.path("field"),
    "names": lambda answer: answer.names("field"),
}


class Ended:
    """A link, as far as an answer knows it."""

    violation = None

    def end_for(self, violation):
        self.violation = violation


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        ("whole", 0),
        ("whole", 2**40),
        ("number", -1.5),
        ("number", 7),
        ("choice", "file"),
        ("path", "../x"),
        ("names", ["a", ".b", "c\udcff", "..."]),
        ("names", []),
    ],
)
def test_good(reader, value):
    assert READERS[reader](Answer(Ended(), {"field": value})) == value


@pytest.mark.parametrize(
    ("reader", "value"),
    [
        *[("whole", value) for value in (True, None, "1", 1.0, -1, 10**30, [1])],
        *[("number", value) for value in (math.nan, math.inf, -math.inf, True, "1", 10**400)],
        *[("choice", value) for value in ("socket", None, ["file"], {})],
        *[("path", value) for value in ("", "a\0b", None, 3, "x" * 5000)],
        *[("names", value) for value in (["a/b"], [".."], ["."], [""], ["/etc"], [1], "ab", {"a": 1}, None)],
    ],
)
def test_bad(reader, value):
    link = Ended()
    with pytest.raises(ProtocolViolation, match="answered with a 'field'"):
        READERS[reader](Answer(link, {"field": value}))
    assert isinstance(link.violation, ProtocolViolation)


@given(reader=st.sampled_from(sorted(READERS)), value=JSON)
def test_any(reader, value):
    link = Ended()
    try:
        found = READERS[reader](Answer(link, {"field": value}))
    except ProtocolViolation:
        assert link.violation
    else:
        assert found == value
