"""Registration with pytest: options, and what they switch on. Nothing heavy is imported here.

PYTEST_DONT_REWRITE: `pytest-microvm test` has imported it before pytest does.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import pytest

from pytest_microvm import hookspecs

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_microvm.remote.suite import RemoteSuite

pytest_plugins = ["pytest_microvm.fixtures"]

_SUITE: pytest.StashKey[RemoteSuite] = pytest.StashKey()


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add our hooks."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add our options; with ``--microvm``, begin before pytest looks at the project."""
    group = parser.getgroup("microvm", "throwaway microVMs (pytest-microvm)")
    group.addoption("--microvm", action="store_true", help="run every test in a fresh microVM")
    group.addoption(
        "--microvm-isolation",
        choices=("test", "class", "module", "session"),
        help="how often a machine is new (default: test)",
    )
    group.addoption(
        "--microvm-args",
        action="append",
        type=_words,
        metavar="ARGS",
        help="arguments for pytest inside the machine",
    )
    group.addoption(
        "--microvm-image", metavar="KIT", help="the image: a kit's name or path (default: python)"
    )
    group.addoption("--microvm-cpus", metavar="N", help="CPUs of a machine; 0.5 is one vCPU, throttled")
    group.addoption("--microvm-memory", metavar="SIZE", help="memory of a machine, such as 512M")
    group.addoption("--microvm-disk", metavar="SIZE", help="what a machine may write to its disk, such as 2G")
    group.addoption("--microvm-pids", metavar="N", help="processes and threads in a machine at the same time")
    group.addoption("--microvm-timeout", metavar="SECONDS", help="how long one test or command may take")
    group.addoption("--microvm-cpu-seconds", metavar="SECONDS", help="CPU time a machine may use in total")
    group.addoption(
        "--microvm-output", metavar="SIZE", help="what one test or command may print, such as 10M"
    )
    group.addoption("--microvm-lifetime", metavar="SECONDS", help="how long a machine may exist")
    group.addoption(
        "--microvm-network",
        action="append",
        metavar="RULE",
        help="what a machine may reach: a host, *.host, host:port, an address range, https://host/path/*, "
        "pip, npm, apt, git or all; deny: in front forbids; may be repeated (default: nothing)",
    )
    group.addoption(
        "--microvm-host",
        dest="microvm_hosts",
        action="append",
        metavar="NAME=ADDRESS[:PORT]",
        help="where a name leads for the machine's requests, such as api.example.com=127.0.0.1:8443",
    )
    group.addoption(
        "--microvm-network-bytes", metavar="SIZE", help="what a machine may send and receive, such as 100M"
    )
    group.addoption("--microvm-connections", metavar="N", help="how many connections a machine may make")
    group.addoption("--microvm-bandwidth", metavar="SIZE", help="bytes a second for a machine, such as 1M")
    group.addoption(
        "--microvm-fail-on-denied",
        action="store_true",
        default=None,
        help="fail a test that tried to reach what it may not",
    )
    group.addoption(
        "--microvm-credential",
        dest="microvm_credentials",
        action="append",
        metavar="SPEC",
        help="what is added to requests on the way out, such as host=api.example.com,env=TOKEN",
    )
    group.addoption(
        "--microvm-secret",
        dest="microvm_secrets",
        action="append",
        metavar="NAME=SOURCE",
        help="a value for the machine, such as TOKEN=env:TOKEN (or file:, command:, keyring:)",
    )
    group.addoption(
        "--microvm-mount",
        dest="microvm_mounts",
        action="append",
        metavar="SOURCE:/TARGET[:ro]",
        help="a directory of the host to copy in, and back unless it is :ro",
    )
    group.addoption(
        "--microvm-retries",
        metavar="N",
        help="how often a test whose machine never reached it is tried in a fresh one (default: 2)",
    )
    group.addoption(
        "--microvm-artifacts",
        metavar="DIR",
        help="save console, commands, usage and events of machines that crash or exceed a quota",
    )
    group.addoption(
        "--microvm-junit-profile",
        choices=("generic", "github", "gitlab", "jenkins", "buildkite"),
        help="for whom the file of --junitxml is: what each reads, and nothing it misreads",
    )
    group.addoption("--microvm-pool", metavar="N", help="how many machines are kept ready ahead of the tests")
    group.addoption(
        "--microvm-require-accel",
        choices=("kvm", "hvf", "whpx", "tcg"),
        help="fail unless machines run with this accelerator",
    )
    group.addoption(
        "--microvm-keep",
        choices=("never", "failed"),
        help="keep the machine of a failed test and print how to enter it (default: never)",
    )
    group.addoption("--microvm-launched", help=argparse.SUPPRESS)  # by `pytest-microvm test`
    config: Any = pluginmanager.get_plugin("pytestconfig")
    if "--microvm" in _written(config):
        _suite(config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    """With ``--microvm``, divide the arguments between host and guest; no conftest.py is loaded."""
    if early_config.known_args_namespace.microvm:
        _suite(early_config).divide(parser, args)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """End a run in which something else would collect, and run the tests on the host."""
    config = session.config
    suite = config.stash.get(_SUITE, None)
    if config.option.microvm and (suite is None or not config.pluginmanager.is_registered(suite)):
        raise pytest.UsageError(
            "--microvm: something has taken the plug-in away that runs tests in machines; none was run\n"
            "next step: run `pytest-microvm test`, which lets no project do this"
        )


def _written(config: Any) -> list[str]:
    """Return the words pytest was given, as far as they are known while plug-ins are being loaded."""
    words = [*config.invocation_params.args, *os.environ.get("PYTEST_ADDOPTS", "").split()]
    if "addopts" in config._parser._inidict:  # noqa: SLF001 - not before the configuration file is read
        words += config.getini("addopts")
    return words


def _suite(config: pytest.Config) -> RemoteSuite:
    """Return the plug-in that runs this run's tests in machines, made at first use."""
    suite = config.stash.get(_SUITE, None)
    if suite is None:
        from pytest_microvm.remote.suite import RemoteSuite  # noqa: PLC0415 - other runs need not load it

        config.stash[_SUITE] = suite = RemoteSuite(config)
        config.pluginmanager.register(suite)  # without a name, which `-p no:NAME` could block
    return suite


def _words(text: str) -> list[str]:
    """Split an option's value as a shell does."""
    import shlex  # noqa: PLC0415 - only when the option is used

    return shlex.split(text)
