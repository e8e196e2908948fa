"""Warm-up: run a tiny pytest session, so that pytest's lazy imports happen before the checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from pytest_microvm.guest.runner_records import report_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TESTS = """
import pytest

@pytest.fixture
def number():
    yield 1

@pytest.mark.parametrize("value", [1, 2])
def test_compare(number, value, capsys, monkeypatch):
    print("warm")
    assert {"value": number} == {"value": value}
"""
_MODULE = "test_warm_up_of_the_runner"


def warm_up() -> None:
    """Run the tiny session without installed plug-ins, and serialize its reports as a real session does."""
    run_session([_Serializer()], autoload=False)


def run_session(plugins: Sequence[object], *, autoload: bool) -> None:
    """Run the tiny session in a temporary folder, restoring the process's state except loaded modules.

    It sees no configuration, conftest or test of the user's, and prints nothing.

    Args:
        plugins: Plug-in objects to register.
        autoload: Whether installed plug-ins are loaded.
    """
    with _temporary_session(autoload=autoload) as folder:
        file = os.path.join(folder, f"{_MODULE}.py")
        with open(file, "w") as stream:
            stream.write(_TESTS)
        arguments = [file, "-c", os.devnull, "--rootdir", folder, "--basetemp", os.path.join(folder, "t")]
        arguments += ["--noconftest", "-p", "no:cacheprovider", "--import-mode=importlib"]
        pytest.main(arguments, list(plugins))


@contextlib.contextmanager
def _temporary_session(*, autoload: bool) -> Iterator[str]:
    folder = tempfile.mkdtemp()
    path, directory, environ = list(sys.path), os.getcwd(), dict(os.environ)
    out, err, bytecode = sys.stdout, sys.stderr, sys.dont_write_bytecode
    try:
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
            os.environ.pop(name, None)
        if not autoload:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        sys.dont_write_bytecode = not autoload  # plug-ins are rewritten once, for all sessions
        os.chdir(folder)
        yield folder
    finally:
        sys.stdout, sys.stderr, sys.dont_write_bytecode = out, err, bytecode
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(directory)
        sys.modules.pop(_MODULE, None)
        shutil.rmtree(folder, ignore_errors=True)


class _Serializer:
    """A plug-in that serializes reports and drops the result."""

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        report_record(self._config, report)
