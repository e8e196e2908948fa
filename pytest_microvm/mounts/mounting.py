"""Mount directories and files of the host in a machine, copy changes back, and unmount them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.agent.transfer import TIMEOUT
from pytest_microvm.agent.users import ROOT, GuestUser, give, guest_user
from pytest_microvm.errors import MachineError, MountConflict, TransferError, UsageError
from pytest_microvm.mounts.copying import Copy
from pytest_microvm.mounts.git_clone import Clone
from pytest_microvm.mounts.live_mount import LiveMount
from pytest_microvm.settings.mounts import Changes, Mount
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_microvm.agent.path import GuestPath
    from pytest_microvm.mounts.machine import Machine

_MAX_SAID = 2000  # characters of a machine's error message
_log = logging.getLogger("pytest_microvm")


class _Handed(Protocol):
    """The interface of the kinds of mount: :class:`Copy`, :class:`Clone` and :class:`LiveMount`."""

    single: bool

    def hand_over(self, owner: GuestUser | None) -> None:
        """Transfer the source into the machine, where it belongs to ``owner``, else to root."""

    def bring_back(self) -> Changes:
        """Apply the machine's changes to the host."""


class Mounted:
    """A directory or file of the host that is mounted in a machine.

    As a context manager it copies changes back at the end of the ``with`` block and removes the mount from
    the machine.

    Attributes:
        mount: Source, target, kind and access.
        closed: Whether the mount has been removed from the machine.
    """

    def __init__(self, machine: Machine, mount: Mount, handed: _Handed) -> None:
        self.mount = mount
        self.closed = False
        self._machine = machine
        self._handed = handed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        if self.closed or self._machine.closed or (kind and not self._machine.alive):
            return
        try:
            try:
                self.copy_back()
            finally:
                if self._machine.alive:
                    self.close()
        except MachineError as error:
            if kind is None:
                raise
            _log.warning("%s", error)  # the block's own exception is more relevant

    def copy_back(self) -> Changes:
        """Apply the machine's changes to the host's directory.

        A file that both sides changed since it was mounted (or last copied back) is left alone on the host;
        the machine's version is stored beside it, with the machine's id appended to its name. For a git
        repository the machine's commits come back as a branch. For a live mount only data that programs
        wrote through memory maps is still missing on the host, and is written now.

        Returns:
            The changes applied; none if the mount is ``ro``.

        Raises:
            MountConflict: Some changes were not applied; all others were.
            TransferError: The machine's current content cannot be copied back. Nothing was applied.
            MachineCrashed: The machine ended. Nothing was applied.
        """
        if self.mount.access == "ro":
            return Changes()
        if self.mount.kind == "live":
            what = f"write {self.mount.target} out"
            with self._machine.client.operation(what), _as_transfer_error(self.mount.target):
                return self._handed.bring_back()
        machine, target = self._machine, self.mount.target
        try:
            with machine.client.operation(f"copy {target} back"), _as_transfer_error(target):
                changes = self._handed.bring_back()
        except MountConflict as error:
            machine.client.record("copy_back", error.brief)
            raise
        machine.client.record("copy_back", f"{target}: {changes}")
        if changes.left or changes.uncommitted:
            _log.warning("%s: %s", target, changes)
        return changes

    def close(self) -> None:
        """Remove the mount from the machine without copying anything back; a second call does nothing.

        Raises:
            TransferError: The machine could not remove the mount.
            MachineCrashed: The machine ended.
        """
        if self.closed:
            return
        self.closed = True
        if self in self._machine.mounts:
            self._machine.mounts.remove(self)
        if isinstance(self._handed, LiveMount):
            self._handed.take_away()
            return
        with self._machine.client.explained(), _as_transfer_error(self.mount.target):
            path = self._machine.path(self.mount.target)
            if self.mount.access == "ro":
                self._machine.client.link().call("path", timeout=TIMEOUT, do="thaw", path=str(path))
            _remove(path, single=self._handed.single)


_KINDS: dict[str, Callable[[Machine, Mount], _Handed]] = {"copy": Copy, "git": Clone, "live": LiveMount}


def mount(machine: Machine, what: Mount) -> Mounted:
    """Mount a directory or file of the host in a machine.

    Raises:
        UsageError: The source is unusable, the machine already has something at the target, or has no such
            owner.
        TransferError: The machine could not store or mount the source.
    """
    handed: _Handed = _KINDS[what.kind](machine, what)
    owner = None if what.owner is None else guest_user(machine.client, what.owner)
    _check_place(machine, what, single=handed.single)
    with machine.client.operation(f"mount {what.target}"):
        try:
            with _as_transfer_error(what.source):
                if owner is not None and what.kind != "live" and not handed.single:
                    _take(machine, what)
                handed.hand_over(owner)
        except MachineError:
            if what.kind != "live" and machine.alive:
                with contextlib.suppress(OSError, MachineError):  # the first error is more relevant
                    _remove(machine.path(what.target), single=handed.single)
            raise
        if what.access == "ro" and what.kind != "live":
            machine.client.link().call("path", timeout=TIMEOUT, do="freeze", path=str(what.target))
    return Mounted(machine, what, handed)


def copy_all_back(mounted: Sequence[Mounted]) -> list[Changes]:
    """Copy back the changes of every mount, even if some of them fail; return those of the copied mounts.

    Raises:
        MountConflict: Some changes were not applied.
        MachineError: A mount could not be copied back; the first error is raised, the others are logged.
    """
    done: list[Changes] = []
    failed: list[MachineError] = []
    for one in mounted:
        try:
            changes = one.copy_back()
            if one.mount.kind != "live":  # a live mount has no changes to report
                done.append(changes)
        except MachineError as error:
            failed.append(error)
    for other in failed[1:]:
        _log.warning("%s", other)
    if failed:
        raise failed[0]
    return done


def _take(machine: Machine, what: Mount) -> None:
    """Let an empty target belong to root until all is in it: its user must not work beside root there."""
    machine.path(what.target).mkdir(parents=True, exist_ok=True)
    give(machine.client, what.target, ROOT)


def _remove(path: GuestPath, *, single: bool) -> None:
    """Remove a mounted file or directory from the machine."""
    if single:
        path.unlink(missing_ok=True)
    elif path.exists():
        path.rmtree()


@contextlib.contextmanager
def _as_transfer_error(what: object) -> Iterator[None]:
    """Convert an OSError, raised by the host or reported by the machine, to a TransferError."""
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{what} cannot be copied: {sanitize_line(str(error), _MAX_SAID)}",
            resolution="check rights and free space on both sides, then try again",
        ) from error


def _check_place(machine: Machine, what: Mount, *, single: bool) -> None:
    """Reject a target that is not free: its content would be copied back as if newly created."""
    place = machine.path(what.target)
    try:
        free = not place.exists() or (not single and place.is_dir() and not any(place.iterdir()))
    except (OSError, TransferError):  # too many entries to list
        free = False
    if place.is_symlink() or not free:
        raise UsageError(
            f"the machine has something at {what.target} already",
            resolution="mount it at a place that is empty or missing there",
        )
