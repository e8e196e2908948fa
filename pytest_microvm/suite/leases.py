"""Assignment of machines to tests: a fresh one, or one shared by the tests of a class, module or run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from pytest_microvm.errors import MachineError
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.suite import checks
from pytest_microvm.suite.backend import Backend, Kept, Lease, RunnerMachine
from pytest_microvm.suite.kept_folders import GuestFolders
from pytest_microvm.suite.session import RunnerSession


def sharing_key(item: pytest.Item, isolation: str) -> object:
    """Return a key that is equal for all tests that share one machine with ``item``.

    With isolation ``class``, a test outside any class has its own machine.
    """
    if isolation == "session":
        return "session"
    if isolation == "module":
        return item.id.path if hasattr(item, "id") else item.nodeid.partition("::")[0]
    if isolation == "class":
        inside = [node for node in item.listchain() if not isinstance(node, (pytest.Directory, pytest.File))]
        return inside[1].nodeid if len(inside) > 2 else item  # noqa: PLR2004 - session, class, test
    return item


@dataclass(frozen=True)
class MachineEnd:
    """What machines do when their tests have ended.

    Args:
        outputs: Whether each sends what its plug-ins output.
        finishing: Whether each finishes its pytest session, because plug-ins may write files then.
        whole: Whether one machine runs the whole session, its end included.
    """

    outputs: bool = False
    finishing: bool = False
    whole: bool = False


class LeaseObserver(Protocol):
    """An observer of machines that start and end."""

    def started(self, machine: RunnerMachine, nodeid: str) -> None:
        """Handle a machine that answers and is about to be used for the test ``nodeid``."""

    def stopped(self, facts: MachineFacts, usage: Usage) -> None:
        """Handle a machine that has been ended."""

    def retried(self, nodeid: str, error: MachineError, retry: int, most: int) -> None:
        """Handle a machine that failed before the test ``nodeid`` started; a fresh one is tried next."""

    def told(self, nodeid: str, line: str) -> None:
        """Handle a message about changes copied back from the machine of the test ``nodeid``."""

    def debugging(self, machine: RunnerMachine, socket: str) -> None:
        """Lend the terminal to a debugger in a machine.

        Args:
            machine: The machine.
            socket: The path in it at which the debugger waits.
        """

    def executed(self, record: dict[str, Any]) -> None:
        """Take what a machine has executed, for the coverage of this process, as the guest sent it.

        Raises:
            ProtocolViolation: It is malformed, or nobody asked for it.
        """

    def wrote(self, machine: RunnerMachine, nodeid: str, paths: Sequence[str]) -> None:
        """Notice files of the workspace that changed in a machine, which still runs."""

    def failed(self, machine: RunnerMachine, nodeid: str, folders: GuestFolders | None) -> list[str]:
        """Bring the temporary folders of a failed test back from a machine, which still runs.

        Returns:
            Their places on this computer, safe to show; none unless that was asked for.
        """

    def finished(self, facts: MachineFacts, output: dict[str, Any] | None) -> None:
        """Handle the record of what a machine's plug-ins output; ``None``: it ended without."""


class Leases:
    """Leases of machines to tests, at most one at a time.

    Args:
        backend: The source of machines.
        isolation: The scope that shares one machine.
        watcher: Notified of each machine.
        end: What its machines do at their end.
    """

    def __init__(self, backend: Backend, isolation: str, watcher: LeaseObserver, end: MachineEnd) -> None:
        self._backend = backend
        self._machines = 0
        self._end = end
        self._isolation = isolation
        self._watcher = watcher
        self._current: Lease | None = None

    def take(self, item: pytest.Item, start: Callable[[], RunnerMachine]) -> Lease:
        """Return the lease for ``item``: the current machine if shared, or a new one.

        Args:
            item: A test.
            start: Returns a new machine.

        Raises:
            BootError: The machine did not start.
        """
        key = sharing_key(item, self._isolation)
        lease = self._current
        if lease is not None and lease.key == key and not lease.ended:
            return lease
        self.release()
        lease = self._current = Lease(start(), key)
        lease.nodeid = item.nodeid
        self._machines += 1
        self._watcher.started(lease.machine, item.nodeid)
        return lease

    def next_in_same(self, lease: Lease, nextitem: pytest.Item | None) -> bool:
        """Return True if ``nextitem`` will also run in the machine of ``lease``."""
        if self._isolation == "test":
            return False
        return nextitem is not None and sharing_key(nextitem, self._isolation) == lease.key

    def discard(self, lease: Lease) -> None:
        """End a machine that failed, or whose only test is done, without notifying its runner."""
        if not lease.ended:
            lease.ended = True
            if self._end.outputs and not lease.finished:
                self._watcher.finished(lease.machine.facts, None)
            usage = lease.machine.usage()
            lease.machine.kill()
            self._watcher.stopped(lease.machine.facts, usage)

    def keep(self, lease: Lease, about: str) -> Kept | None:
        """Keep a machine for a user to enter, if that was requested; it is not used again."""
        usage = lease.machine.usage()
        kept = lease.machine.keep(about)
        if kept is not None:
            lease.ended = True
            self._watcher.stopped(lease.machine.facts, usage)
        return kept

    def release(self) -> None:
        """End the machine in use; if its plug-ins output something, it finishes its pytest session first."""
        lease, self._current = self._current, None
        if lease is not None and not lease.ended:
            self.end(lease)

    def end(self, lease: Lease) -> None:
        """End a machine; if its plug-ins output something, it finishes its pytest session first."""
        if self._end.finishing or (self._end.outputs and not lease.finished):
            try:
                self._finish(lease)
            except (MachineError, TimeoutError) as error:
                if self._end.finishing:
                    why = f"files that plug-ins write at the end did not come back: {error}"
                    self._watcher.told(lease.nodeid, why)
        self.discard(lease)

    def _finish(self, lease: Lease) -> None:
        data = RunnerSession(lease.machine.link).finish(session=self._end.finishing)
        record = checks.Records().read(data.strip())
        if self._end.outputs and not lease.finished:
            self.finished(lease, record)
        self._watcher.wrote(lease.machine, lease.nodeid, checks.paths(record.get("written", [])))

    @contextlib.contextmanager
    def last(self) -> Iterator[RunnerMachine]:
        """Return the machine in which the run ends, as a context manager that ends it.

        Raises:
            BootError: It did not start.
            MachineError: The machine that ran the whole session has ended too early.
        """
        lease = self._current
        if self._end.whole and self._machines > 1:
            self.release()
            raise MachineError(
                "the machine of the session ended early, and with it what plug-ins knew of its tests",
                resolution="see the test that ended it: it crashed, or exceeded a quota",
            )
        if self._end.whole and lease is not None and not lease.ended:
            self._current = None
            try:
                yield lease.machine
            finally:
                self.discard(lease)
            return
        self.release()
        machine = self._backend.lease()
        try:
            yield machine
        finally:
            machine.kill()

    def finished(self, lease: Lease, output: dict[str, Any]) -> None:
        """Take the last record of a machine."""
        lease.finished = True
        self._watcher.finished(lease.machine.facts, output)
