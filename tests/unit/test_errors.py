"""Errors: the tree its docstring draws, and what a user reads."""

import inspect
import re

import pytest

from pytest_microvm import errors
from pytest_microvm.errors import MicroVMError, QuotaExceeded, UsageError


def classes():
    return {name: thing for name, thing in vars(errors).items() if inspect.isclass(thing)}


def test_the_tree_is_as_drawn():
    drawn = {}
    parents = []
    for line in errors.__doc__.splitlines()[2:]:
        match = re.match(r"([│├└─ ]*)(\w+)", line)
        depth = len(match[1]) // 4
        parents[depth:] = [match[2]]
        drawn[match[2]] = parents[depth - 1] if depth else "Exception"
    assert drawn == {name: thing.__base__.__name__ for name, thing in classes().items()}


def test_what_why_and_what_next():
    error = UsageError("it broke", details="because\nof this", resolution="mend it")
    assert str(error) == "it broke\n  because\n  of this\nnext step: mend it"
    assert str(MicroVMError("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("error", "brief"),
    [
        (QuotaExceeded("timeout", 1.5, 2.0), "timeout: limit 1.5 s, observed 2 s"),
        (QuotaExceeded("output", 1000, 1025), "output: limit 1000 bytes, observed 1.001 KiB"),
        (QuotaExceeded("memory", 2**28, 2**30), "memory: limit 256 MiB, observed 1 GiB"),
        (QuotaExceeded("pids", 64, 65), "pids: limit 64, observed 65"),
    ],
)
def test_a_quota_names_limit_and_observation(error, brief):
    assert error.brief == brief
    assert error.quota in error.resolution


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_error_has_a_docstring(name):
    assert classes()[name].__doc__
