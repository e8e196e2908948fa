"""Hooks for other plug-ins (pluggy): change a machine's spec, and follow events of machines and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_microvm.machine.instance import MachineFacts, Usage
    from pytest_microvm.settings.spec import MachineSpec
    from pytest_microvm.suite.backend import Backend, Progress, RemoteSettings


@pytest.hookspec(firstresult=True)
def pytest_microvm_spec(config: pytest.Config, spec: MachineSpec, nodeid: str) -> MachineSpec | None:
    """Return a changed spec for a machine that is about to be started; ``None`` leaves it unchanged.

    Args:
        config: pytest's configuration.
        spec: The spec from configuration, command line and marker.
        nodeid: The test (or class, module) that uses it; empty for the machines of ``--microvm``.
    """


@pytest.hookspec
def pytest_microvm_started(config: pytest.Config, facts: MachineFacts, nodeid: str) -> None:
    """Handle the start of a machine, which responds and is about to be used."""


@pytest.hookspec
def pytest_microvm_stopped(config: pytest.Config, facts: MachineFacts, usage: Usage) -> None:
    """Handle the end of a machine; ``usage`` is its resource usage as measured by the host."""


@pytest.hookspec
def pytest_microvm_outcome(config: pytest.Config, facts: MachineFacts, nodeid: str, outcome: str) -> None:
    """Handle a test's end in a machine: ``passed``, ``failed``, ``skipped``, ``crashed``, ``quota``..."""


@pytest.hookspec(firstresult=True)
def pytest_microvm_backend(
    config: pytest.Config, settings: RemoteSettings, progress: Progress
) -> Backend | None:
    """Return the back end that runs the tests of ``pytest --microvm``; ``None`` leaves it to others."""
