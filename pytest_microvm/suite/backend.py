"""The seam between a remote suite and what runs it: machines, or (in this project's tests) processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pytest_microvm.agent.link import Link
from pytest_microvm.errors import MachineError, QuotaExceeded
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.settings.configuration import DEFAULT_RETRIES
from pytest_microvm.settings.spec import DEFAULT_OUTPUT
from pytest_microvm.untrusted.redaction import Redactor

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What the command line says about machines; ``None`` and empty mean: as configured elsewhere.

    Args:
        values: The options given, by their key in ``[tool.pytest-microvm]``, as written.
        rootdir: pytest's root directory.
        written: Where the project's configuration may have files written; ``None``: nowhere.
        worker: The name of this pytest-xdist worker, empty in a run without workers or in the controller.
        workers: How many pytest-xdist workers share the run, 0 without.
    """

    values: Mapping[str, Any]
    rootdir: Path
    written: Path | None = None
    worker: str = ""
    workers: int = 0


@dataclass(frozen=True)
class TestLimits:
    """What one test may use of its machine; ``None``: what the machine may.

    Args:
        timeout: Seconds it may take.
        output: Bytes it may print.
        pids: Processes and threads it may start at the same time.
        cpu_seconds: Seconds of CPU time of its machine.
        lifetime: Seconds its machine may exist.
        network: Rules of what it may reach.
        counted: Whether the number of its processes is limited, by ``pids`` or for the machine.
    """

    __test__ = False

    timeout: float | None
    output: int
    pids: int | None = None
    cpu_seconds: float | None = None
    lifetime: float | None = None
    network: tuple[str, ...] | None = None
    counted: bool = False


@dataclass(frozen=True)
class RunOptions:
    """What the suite itself must know once the configuration is merged.

    Args:
        isolation: How often a machine is new: ``test``, ``class``, ``module`` or ``session``.
        timeout: Seconds one test may take, ``None`` for no limit.
        output: Bytes one test may print.
        counted: Whether the number of a machine's processes is limited.
        retries: How often a test whose machine never reached it is tried again.
        artifacts: The folder for what is known of machines that crashed or exceeded a quota.
        collect_timeout: Seconds the runner may take to collect.
        arguments: Arguments for the guest's pytest from the configuration.
        fail_on_denied: Whether a test fails that tried to reach what it may not.
        network: The rules of what tests may reach, as they were written.
        junit_profile: For whom the file of ``--junitxml`` is; ``None``: as pytest writes it.
    """

    isolation: str = "test"
    timeout: float | None = None
    output: int = DEFAULT_OUTPUT
    counted: bool = False
    retries: int = DEFAULT_RETRIES
    artifacts: Path | None = None
    collect_timeout: float = 600.0
    arguments: tuple[str, ...] = ()
    fail_on_denied: bool = False
    network: tuple[str, ...] = ()
    junit_profile: str | None = None


@dataclass(frozen=True)
class CollectPlan:
    """What the runner is asked to collect.

    Args:
        arguments: The guest's pytest arguments.
        directory: The invocation directory, the same path in the guest.
        rootdir: pytest's root directory.
        workspace: The top of what is copied into the guest.
        environment: Variables for the runner.
        timeout: Seconds collection may take.
    """

    arguments: tuple[str, ...]
    directory: Path
    rootdir: Path
    workspace: Path
    environment: tuple[tuple[str, str], ...] = ()
    timeout: float = 600.0


@dataclass(frozen=True)
class BackendFacts:
    """What runs the tests: ``accelerator`` and why it was chosen, the image and its digest."""

    accelerator: str
    accelerator_reason: str
    image: str
    image_digest: str


class Kept(Protocol):
    """A machine that was kept for a person to enter."""

    @property
    def id(self) -> str:
        """What to enter it by."""


class RunnerMachine(Protocol):
    """A machine with a runner that has collected; already resumed."""

    @property
    def link(self) -> Link:
        """The connection to the runner."""

    @property
    def facts(self) -> MachineFacts:
        """What it is."""

    @property
    def redactor(self) -> Redactor:
        """What takes its secrets out of what its tests report."""

    @property
    def requests(self) -> NetworkLog:
        """What it asked of the network."""

    def take_back(self) -> list[str]:
        """Copy back what its tests changed in what it was handed; return what there is to say about it."""

    def usage(self) -> Usage:
        """Return what it has used so far."""

    def exceeded(self) -> QuotaExceeded | None:
        """Return the quota that it exceeded, if it did; its console may have said so only just now."""

    def end_for(self, quota: QuotaExceeded) -> None:
        """End it because its test exceeded a quota that was counted by whoever asks."""

    def end_error(self) -> MachineError:
        """Return why it ended by itself: a quota, or a crash with what it said last (untrusted text)."""

    def tighten(self, limits: TestLimits) -> None:
        """Lower what it may use."""

    def save(self, folder: Path, error: MachineError, about: str) -> None:
        """Write what is known of it, after it ended because of ``error``, into ``folder``."""

    def keep(self, about: str) -> Kept | None:
        """Keep it for a person instead of ending it; ``None`` if that is not wanted or not possible."""

    def kill(self) -> None:
        """End it; a second call does nothing."""


class Backend(Protocol):
    """Where a suite's machines come from."""

    @property
    def facts(self) -> BackendFacts:
        """What runs the tests."""

    @property
    def options(self) -> RunOptions:
        """The merged configuration, as far as the suite needs it."""

    def collect(self, plan: CollectPlan, progress: Progress) -> bytes:
        """Return the runner's answer to ``collect`` as it was sent, from a cache where nothing changed.

        Raises:
            MicroVMError: No machine could be prepared.
        """

    def lease(self) -> RunnerMachine:
        """Return a fresh machine in which collection has happened.

        Raises:
            BootError: It never became ready.
        """

    def close(self) -> None:
        """End every machine that is left."""


@dataclass
class Lease:
    """A machine in use, what has happened in it, and how often it had asked the network before its test."""

    machine: RunnerMachine
    key: object = None
    tests: int = 0
    asked: int = 0
    ended: bool = field(default=False)
