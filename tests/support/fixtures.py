"""Fixtures for tests of a small project that is run natively and with machines."""

import os

import pytest

from support.comparison import BACKEND, CACHE, ENTRIES, TESTS, Project


@pytest.fixture
def backend():
    """Arguments and variables that choose what runs the tests."""
    if BACKEND == "machines":
        return [], {"PYTEST_MICROVM_CACHE": os.fspath(CACHE)}
    return ["-p", "support.local.backend"], {"PYTHONPATH": os.fspath(TESTS)}


@pytest.fixture
def entry():
    """How machines come in; a module whose tests are true of both entries says so with :data:`ENTRIES`."""
    return ENTRIES[0]


@pytest.fixture
def project(pytester, monkeypatch, backend, entry):
    """A project in a folder of its own, which is the current one."""
    return Project(pytester, monkeypatch, backend, entry)
