"""Second plug-in of this package: ends a run with ``--microvm`` if the first plug-in is blocked.

Without it a conftest.py could define ``--microvm``, and pytest would run the tests on the host. A project
that blocks both plug-ins can still do so; `pytest-microvm test` prevents that.
"""

from __future__ import annotations

import os
import shlex
import sys

import pytest

_PLUGIN = "pytest_microvm.plugin"
_OPTION = "--microvm"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Raise a usage error if ``--microvm`` is given but its plug-in is blocked; conftest files load later."""
    plugin = sys.modules.get(_PLUGIN)
    there = plugin is not None and early_config.pluginmanager.is_registered(plugin)
    if there or _OPTION not in _words(early_config):
        return
    raise pytest.UsageError(
        f"{_OPTION}: the plug-in that runs tests in machines is switched off, as by `-p no:microvm`; no test "
        "was run\nnext step: look at addopts in the project's configuration; for a project that you did not "
        "write there is `pytest-microvm test`"
    )


def _words(config: pytest.Config) -> list[str]:
    return [
        *shlex.split(os.environ.get("PYTEST_ADDOPTS", "")),
        *config.getini("addopts"),
        *config.invocation_params.args,
    ]
