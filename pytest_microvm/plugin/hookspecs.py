"""Hooks that other plug-ins can implement (pluggy): change what a machine is made of, follow what happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_microvm.machine.instance import MachineFacts, Usage
    from pytest_microvm.settings.spec import MachineSpec
    from pytest_microvm.suite.backend import Backend, Progress
    from pytest_microvm.suite.backend import Settings as RemoteSettings


@pytest.hookspec(firstresult=True)
def pytest_microvm_spec(config: pytest.Config, spec: MachineSpec, nodeid: str) -> MachineSpec | None:
    """Return a changed spec for a machine that is about to be started; ``None`` leaves it.

    Args:
        config: pytest's configuration.
        spec: What configuration, command line and marker say.
        nodeid: The test (or class, module) it is for; empty for the machines of ``--microvm``.
    """


@pytest.hookspec
def pytest_microvm_started(config: pytest.Config, facts: MachineFacts, nodeid: str) -> None:
    """A machine answers and is about to be used."""


@pytest.hookspec
def pytest_microvm_stopped(config: pytest.Config, facts: MachineFacts, usage: Usage) -> None:
    """A machine has been ended; ``usage`` is what the host saw it use."""


@pytest.hookspec
def pytest_microvm_outcome(config: pytest.Config, facts: MachineFacts, nodeid: str, outcome: str) -> None:
    """A test in a machine has ended: ``passed``, ``failed``, ``skipped``, ``crashed``, ``quota``..."""


@pytest.hookspec(firstresult=True)
def pytest_microvm_backend(
    config: pytest.Config, settings: RemoteSettings, progress: Progress
) -> Backend | None:
    """Return what runs the tests of ``pytest --microvm``; ``None`` leaves it to others."""
