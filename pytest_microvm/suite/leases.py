"""Which machine a test gets: a fresh one, or the one that tests of its class, module or run share."""

from __future__ import annotations

import contextlib
from typing import Protocol

import pytest

from pytest_microvm.errors import MachineError
from pytest_microvm.machine.instance import MachineFacts, Usage
from pytest_microvm.suite.backend import Backend, Kept, Lease
from pytest_microvm.suite.session import RunnerSession


def sharing_key(item: pytest.Item, isolation: str) -> object:
    """Return what ``item`` has in common with the tests that may share its machine.

    A test outside any class has a machine of its own under ``class``.
    """
    if isolation == "session":
        return "session"
    if isolation == "module":
        return item.id.path if hasattr(item, "id") else item.nodeid.partition("::")[0]
    if isolation == "class":
        inside = [node for node in item.listchain() if not isinstance(node, (pytest.Directory, pytest.File))]
        return inside[1].nodeid if len(inside) > 2 else item  # noqa: PLR2004 - session, class, test
    return item


class Watcher(Protocol):
    """Who is told of machines that come and go."""

    def started(self, facts: MachineFacts, nodeid: str) -> None:
        """A machine answers and is about to be used for the test ``nodeid``."""

    def stopped(self, facts: MachineFacts, usage: Usage) -> None:
        """A machine has been ended."""

    def retried(self, nodeid: str, error: MachineError, retry: int, most: int) -> None:
        """A machine never reached the test ``nodeid``, which is tried again in a fresh one."""

    def told(self, nodeid: str, line: str) -> None:
        """There is something to say about what the machine of the test ``nodeid`` gave back."""


class Leases:
    """Hand out machines, one at a time, and take them back.

    Args:
        backend: Where they come from.
        isolation: How often one is new.
        watcher: Told of each.
    """

    def __init__(self, backend: Backend, isolation: str, watcher: Watcher) -> None:
        self._backend = backend
        self._isolation = isolation
        self._watcher = watcher
        self._current: Lease | None = None

    def take(self, item: pytest.Item) -> Lease:
        """Return the machine for ``item``.

        Raises:
            BootError: It did not come up.
        """
        key = sharing_key(item, self._isolation)
        lease = self._current
        if lease is not None and lease.key == key and not lease.ended:
            return lease
        self.release()
        lease = self._current = Lease(self._backend.lease(), key)
        self._watcher.started(lease.machine.facts, item.nodeid)
        return lease

    def next_in_same(self, lease: Lease, nextitem: pytest.Item | None) -> bool:
        """Whether ``nextitem`` will run in ``lease``'s machine as well."""
        return nextitem is not None and sharing_key(nextitem, self._isolation) == lease.key

    def discard(self, lease: Lease) -> None:
        """End a machine that failed, or whose only test is done, without a word to its runner."""
        if not lease.ended:
            lease.ended = True
            usage = lease.machine.usage()
            lease.machine.kill()
            self._watcher.stopped(lease.machine.facts, usage)

    def keep(self, lease: Lease, about: str) -> Kept | None:
        """Keep a machine for a person, if that was asked for; it is not used again."""
        usage = lease.machine.usage()
        kept = lease.machine.keep(about)
        if kept is not None:
            lease.ended = True
            self._watcher.stopped(lease.machine.facts, usage)
        return kept

    def release(self) -> None:
        """End the machine in use; a shared one ends its pytest session first."""
        lease, self._current = self._current, None
        if lease is None or lease.ended:
            return
        if self._isolation != "test":
            with contextlib.suppress(MachineError, TimeoutError):
                RunnerSession(lease.machine.link).finish()
        self.discard(lease)
