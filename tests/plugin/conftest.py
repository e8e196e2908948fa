"""Run a small project natively and with ``--microvm``; the same tests run over every backend."""

import os
from pathlib import Path

import pytest

from support.comparison import BACKEND, CACHE, Project

TESTS = Path(__file__).parents[1]


@pytest.fixture
def backend():
    """Arguments and variables that choose what runs the tests."""
    if BACKEND == "machines":
        return [], {"PYTEST_MICROVM_CACHE": os.fspath(CACHE)}
    return ["-p", "support.local.backend"], {"PYTHONPATH": os.fspath(TESTS)}


@pytest.fixture
def project(pytester, monkeypatch, backend):
    return Project(pytester, monkeypatch, backend)
