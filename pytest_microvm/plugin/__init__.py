"""Registration with pytest: options, and the plug-ins that they enable. Expensive imports are lazy.

PYTEST_DONT_REWRITE: `pytest-microvm test` imports this module before pytest does.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm.plugin import hookspecs
from pytest_microvm.settings.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_microvm.suite.plugin import RemoteSuite

pytest_plugins = ["pytest_microvm.plugin.fixtures"]

_SUITE: pytest.StashKey[RemoteSuite] = pytest.StashKey()


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add this plug-in's hooks."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options; with ``--microvm``, register the remote suite before pytest reads the project."""
    group = parser.getgroup("microvm", "throwaway microVMs (pytest-microvm)")
    group.addoption("--microvm", action="store_true", help="run every test in a fresh microVM")
    for option in OPTIONS:
        known = option.arguments()
        if option.kind == "words":
            known["type"] = _words
        if option.default != "none":
            known["help"] += f" (default: {option.default})"
        group.addoption(f"--microvm-{option.word}", dest=f"microvm_{option.name}", **known)
    group.addoption("--microvm-launched", help=argparse.SUPPRESS)  # by `pytest-microvm test`
    config: Any = pluginmanager.get_plugin("pytestconfig")
    if "--microvm" in _written(config):
        _suite(config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    """With ``--microvm``, split the arguments between host and guest; no conftest.py is loaded."""
    if early_config.known_args_namespace.microvm:
        _suite(early_config).divide(parser, args)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """End a run with ``--microvm`` whose remote suite is not registered: tests would run on the host."""
    config = session.config
    suite = config.stash.get(_SUITE, None)
    if config.option.microvm and (suite is None or not config.pluginmanager.is_registered(suite)):
        raise pytest.UsageError(
            "--microvm: something has taken the plug-in away that runs tests in machines; none was run\n"
            "next step: run `pytest-microvm test`, which lets no project do this"
        )


def _written(config: Any) -> list[str]:
    """Return pytest's arguments, as far as they are known while plug-ins are being loaded."""
    words = [*config.invocation_params.args, *os.environ.get("PYTEST_ADDOPTS", "").split()]
    if "addopts" in config._parser._inidict:  # noqa: SLF001 - not before the configuration file is read
        words += config.getini("addopts")
    return words


def _suite(config: pytest.Config) -> RemoteSuite:
    """Return the plug-in that runs this run's tests in machines, created on first use."""
    suite = config.stash.get(_SUITE, None)
    if suite is None:
        from pytest_microvm.suite.plugin import RemoteSuite  # noqa: PLC0415 - other runs need not load it

        config.stash[_SUITE] = suite = RemoteSuite(config)
        config.pluginmanager.register(suite)  # without a name, which `-p no:NAME` could block
    return suite


def _words(text: str) -> list[str]:
    """Split an option's value as a shell does."""
    import shlex  # noqa: PLC0415 - only when the option is used

    return shlex.split(text)
