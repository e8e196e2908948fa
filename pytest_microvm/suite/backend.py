"""The seam between a remote suite and its backend: machines, or (in this project's tests) processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pytest_microvm.agent.link import Link
from pytest_microvm.errors import MachineError, QuotaExceeded
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.settings.configuration import DEFAULT_RETRIES
from pytest_microvm.settings.spec import DEFAULT_OUTPUT
from pytest_microvm.suite.collected import WideFixture
from pytest_microvm.untrusted.extraction import ExtractionLimits
from pytest_microvm.untrusted.redaction import Redactor

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RemoteSettings:
    """Command-line settings for machines; omitted options fall back to the configuration.

    Args:
        values: The options given, by their key in ``[tool.pytest-microvm]``, as written.
        rootdir: pytest's root directory.
        written: The folder in which the project's configuration may have files written; ``None``: none.
        worker: The name of this pytest-xdist worker, empty in a run without workers or in the controller.
        workers: Number of pytest-xdist workers that share the run, 0 without.
    """

    values: Mapping[str, Any]
    rootdir: Path
    written: Path | None = None
    worker: str = ""
    workers: int = 0


@dataclass(frozen=True)
class TestLimits:
    """Limits of one test in its machine; ``None``: the machine's own limit applies.

    Args:
        timeout: Seconds it may take.
        output: Bytes it may print.
        pids: Processes and threads it may start at the same time.
        cpu_seconds: Seconds of CPU time of its machine.
        lifetime: Seconds its machine may exist.
        network: Rules for the network it may reach.
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
    """The part of the merged configuration that the suite itself uses.

    Args:
        isolation: The scope that shares one machine: ``test``, ``class``, ``module`` or ``session``.
        timeout: Seconds one test may take, ``None`` for no limit.
        output: Bytes one test may print.
        counted: Whether the number of a machine's processes is limited.
        retries: Times that a test is retried if its machine failed before the test started.
        artifacts: The folder for records of machines that crashed or exceeded a quota.
        collect_timeout: Seconds the runner may take to collect.
        arguments: Arguments for the guest's pytest from the configuration.
        fail_on_denied: Whether a test fails if one of its network requests was denied.
        network: Rules for the network that tests may reach, as written.
        junit_profile: The consumer of the ``--junitxml`` file; ``None``: as pytest writes it.
        fixtures: Where wide fixtures are set up: ``auto``, ``fork`` (once) or ``repeat`` (for each test).
        pure_fixtures: Names of session fixtures that stand in machines that are kept for later runs.
        debug_port: A port on which debuggers listen in machines; ``None``: there are none.
        repeat: How often each test runs; ``None``: once.
        write_back: Patterns, as in a .gitignore file, of workspace files that come back from machines.
        keep_tmp: Whether the temporary folders of failed tests come back from machines.
        mounted: Targets of mounts.
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
    write_back: tuple[str, ...] = ()
    keep_tmp: bool = False
    mounted: tuple[PurePosixPath, ...] = ()
    fixtures: str = "auto"
    pure_fixtures: tuple[str, ...] = ()
    repeat: int | None = None
    debug_port: int | None = None


@dataclass(frozen=True)
class CollectPlan:
    """A request to the runner to collect tests.

    Args:
        arguments: The guest's pytest arguments.
        directory: The invocation directory, the same path in the guest.
        rootdir: pytest's root directory.
        workspace: The top of the tree that is copied into the guest.
        environment: Variables for the runner.
        timeout: Seconds collection may take.
        whole: Whether one machine runs the whole session, so that plug-ins see it as natively.
        debug: How pytest writes to this computer's terminal, which debuggers get; ``None``: they do not.
        coverage: The settings with which the machines measure, as JSON; ``None``: they do not.
        folders: Folders that the user's options need to exist.
        outside: Paths outside the workspace whose changes are told, each with whether it is a folder.
    """

    arguments: tuple[str, ...]
    directory: Path
    rootdir: Path
    workspace: Path
    environment: tuple[tuple[str, str], ...] = ()
    timeout: float = 600.0
    whole: bool = False
    debug: Mapping[str, bool] | None = None
    coverage: Mapping[str, Any] | None = None
    folders: tuple[Path, ...] = ()
    outside: tuple[tuple[Path, bool], ...] = ()


@dataclass(frozen=True)
class PureSetUp:
    """The set-up of session fixtures that depends only on the machine in which it begins.

    Args:
        item: The position of the test for which it is done.
        fixtures: The first wide fixtures of that test, in the order of their set-up.
    """

    item: int
    fixtures: tuple[WideFixture, ...]


@dataclass(frozen=True)
class BackendFacts:
    """A backend's accelerator with the reason for its choice, and its image with the digest.

    ``python`` describes the environment of this computer that the machines mirror; empty: the image's Python.
    """

    accelerator: str
    accelerator_reason: str
    image: str
    image_digest: str
    python: str = ""


class Kept(Protocol):
    """A machine that was kept for a user to enter."""

    @property
    def id(self) -> str:
        """The id to enter it by."""


class MachineCheckpoint(Protocol):
    """The state of a machine at one time, from which forks start."""

    def close(self) -> None:
        """Remove it, unless it is kept for later runs; its forks run on."""


@dataclass(frozen=True)
class StandingFixtures:
    """A state of machines in which pure fixtures stand.

    Args:
        checkpoint: The state.
        answer: The guest's answer to the last set-up, as it was sent.
        earlier: Whether an earlier run has set them up.
    """

    checkpoint: MachineCheckpoint
    answer: bytes
    earlier: bool


class RunnerMachine(Protocol):
    """A machine with a runner that has collected; already resumed."""

    @property
    def link(self) -> Link:
        """The connection to the runner."""

    @property
    def facts(self) -> MachineFacts:
        """Facts about the machine, fixed when it starts."""

    @property
    def usable(self) -> bool:
        """True while the machine runs."""

    @property
    def given_up(self) -> bool:
        """True if this computer has ended the machine, because another one needed its room."""

    @property
    def redactor(self) -> Redactor:
        """The redactor that removes its secrets from test reports."""

    @property
    def requests(self) -> NetworkLog:
        """The log of its network requests."""

    def take_back(self) -> list[str]:
        """Copy changes in its mounts back; return messages about the result, for users."""

    def usage(self) -> Usage:
        """Return the machine's usage so far."""

    def exceeded(self) -> QuotaExceeded | None:
        """Return the quota that it exceeded, if any, reading unread console output first."""

    def end_for(self, quota: QuotaExceeded) -> None:
        """End the machine because its test exceeded a quota that the caller measured."""

    def end_error(self) -> MachineError:
        """Return the error that ended it: a quota, or a crash with its last output (untrusted text)."""

    def tighten(self, limits: TestLimits) -> None:
        """Lower the machine's limits."""

    def pull(self, source: PurePosixPath, target: Path) -> None:
        """Copy a file from the machine to ``target``, with its permissions.

        Raises:
            FileNotFoundError: The machine has no such file.
            TransferError: It is not a file, or too large.
            MachineError: The machine failed.
        """

    def pull_folder(self, source: PurePosixPath, target: Path, limits: ExtractionLimits) -> None:
        """Copy what a folder of the machine holds into a folder of this computer, as ``limits`` allow.

        Raises:
            OSError: The machine has no such folder.
            TransferError: What it sent was refused, or cannot be written.
            MachineError: The machine failed.
        """

    def push(self, source: Path, target: PurePosixPath) -> None:
        """Copy a file into the machine, with the folders above it.

        Raises:
            OSError: The source cannot be read.
            MachineError: It cannot be transferred.
        """

    def remove(self, target: PurePosixPath) -> None:
        """Remove a file of the machine, if it has it.

        Raises:
            MachineError: It cannot.
        """

    def debug(self, socket: str) -> None:
        """Lend this process's terminal to the debugger that waits at a socket in the machine, until it ends.

        Raises:
            MachineError: The machine failed.
        """

    def forward(self, port: int) -> AbstractContextManager[object]:
        """Return a context in which clients of a port of this computer's loopback reach that of the machine.

        Raises:
            OSError: Another program listens there.
            MachineError: The machine failed.
        """

    def checkpoint(self, forks: int) -> MachineCheckpoint:
        """Return a checkpoint of the machine, which runs on; only for a machine of :meth:`Backend.keeper`.

        Args:
            forks: About how many forks will be started from it.

        Raises:
            MachineError: Its state cannot be saved.
        """

    def save(self, folder: Path, error: MachineError, about: str) -> None:
        """Save the machine's records, after it ended because of ``error``, in ``folder``."""

    def keep(self, about: str) -> Kept | None:
        """Keep the machine for a user instead of ending it; ``None`` if not requested or not possible."""

    def kill(self) -> None:
        """End the machine; a second call does nothing."""


class Backend(Protocol):
    """The source of a suite's machines."""

    @property
    def facts(self) -> BackendFacts:
        """The accelerator and image that run the tests."""

    @property
    def options(self) -> RunOptions:
        """The part of the merged configuration that the suite uses."""

    def collect(self, plan: CollectPlan, progress: Progress) -> bytes:
        """Return the runner's answer to ``collect`` as it was sent, from a cache if nothing changed.

        Raises:
            MicroVMError: No machine could be prepared.
        """

    def lease(self) -> RunnerMachine:
        """Return a fresh machine whose runner has collected the tests.

        Raises:
            BootError: It never became ready.
        """

    def keeper(self, begin: MachineCheckpoint | None) -> RunnerMachine | None:
        """Return a machine that checkpoints can be taken of, like :meth:`lease` or :meth:`fork`.

        ``None``: its memory must not be on a disk, it shares directories with this computer, or there is no
        room for it now. It may be ended when there is no room for another machine.

        Args:
            begin: The state that it begins in; ``None``: it has collected.

        Raises:
            BootError: It never became ready.
        """

    def standing(
        self, set_ups: Sequence[PureSetUp], limits: TestLimits, forks: int
    ) -> StandingFixtures | None:
        """Return the state after set-ups that were done one after another, from a cache if nothing changed.

        ``None``: as for :meth:`keeper`, except for want of room.

        Args:
            set_ups: The set-ups.
            limits: Limits for each of them.
            forks: About how many forks will be started from the state.

        Raises:
            MicroVMError: One failed, or used more than its machine: then nothing is kept of it.
        """

    def fork(self, checkpoint: MachineCheckpoint) -> RunnerMachine:
        """Return a fresh machine in the state of a checkpoint, with an identity of its own.

        Raises:
            BootError: It never became ready.
        """

    def close(self) -> None:
        """End all remaining machines."""


@dataclass
class Lease:
    """A machine in use, with its sharing key, test count, and count of network requests before its test.

    ``again``: whether another test follows in it. ``finished``: what its plug-ins output has been taken.
    ``nodeid``: the last test that began in it.
    """

    machine: RunnerMachine
    key: object = None
    tests: int = 0
    asked: int = 0
    again: bool = False
    ended: bool = field(default=False)
    finished: bool = field(default=False)
    nodeid: str = ""
