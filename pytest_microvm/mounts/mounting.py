"""Mounts of a machine: handed over, brought back, taken away."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.agent.transfer import TIMEOUT
from pytest_microvm.errors import MachineError, MountConflict, TransferError, UsageError
from pytest_microvm.mounts.copying import Copy
from pytest_microvm.mounts.git_clone import Clone
from pytest_microvm.mounts.live_mount import Share
from pytest_microvm.settings.mounts import Changes, Mount
from pytest_microvm.untrusted.text import sanitize_line

if TYPE_CHECKING:
    from typing_extensions import Self

    from pytest_microvm.agent.path import GuestPath
    from pytest_microvm.mounts.machine import Machine

_MAX_SAID = 2000  # characters of what a machine said
_log = logging.getLogger("pytest_microvm")


class _Handed(Protocol):
    """What was handed over: a :class:`Copy`, a :class:`Clone` or a :class:`Share`."""

    single: bool

    def hand_over(self) -> None:
        """Put it into the machine."""

    def bring_back(self) -> Changes:
        """Take over what the machine made of it."""


class Mounted:
    """A directory of the host that was handed to a machine.

    As a context manager it copies what changed back at the end of the ``with`` block, and takes it out of the
    machine.

    Attributes:
        mount: What is where.
        closed: Whether it has been taken out of the machine.
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
            _log.warning("%s", error)  # what ended the block is more to the point

    def copy_back(self) -> Changes:
        """Take what the machine changed over into the host's directory.

        What changed on both sides since it was handed over (or copied back before) is left alone on the
        host; the machine's version is put beside it, with the machine's id behind its name. Of a repository
        the commits come back, as a branch. Of a live mount everything is there already, but for what programs
        wrote through memory maps.

        Returns:
            What was taken over; nothing if the mount is ``ro``.

        Raises:
            MountConflict: Some was not; everything else was.
            TransferError: What the machine has there now cannot come back. Nothing was taken over.
            MachineCrashed: The machine ended. Nothing was taken over.
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
        """Take it out of the machine without copying anything back; a second call does nothing.

        Raises:
            TransferError: The machine did not let go of it.
            MachineCrashed: The machine ended.
        """
        if self.closed:
            return
        self.closed = True
        if self in self._machine.mounts:
            self._machine.mounts.remove(self)
        if isinstance(self._handed, Share):
            self._handed.take_away()
            return
        with self._machine.client.explained(), _as_transfer_error(self.mount.target):
            path = self._machine.path(self.mount.target)
            if self.mount.access == "ro":
                self._machine.client.link().call("path", timeout=TIMEOUT, do="thaw", path=str(path))
            _remove(path, single=self._handed.single)


_KINDS: dict[str, Callable[[Machine, Mount], _Handed]] = {"copy": Copy, "git": Clone, "live": Share}


def mount(machine: Machine, what: Mount) -> Mounted:
    """Hand a directory or a file of the host to a machine.

    Raises:
        UsageError: There is no such directory, or the machine has something else at that place.
        TransferError: The machine could not take it.
    """
    handed: _Handed = _KINDS[what.kind](machine, what)
    _check_place(machine, what, single=handed.single)
    with machine.client.operation(f"mount {what.target}"):
        try:
            with _as_transfer_error(what.source):
                handed.hand_over()
        except MachineError:
            if what.kind != "live" and machine.alive:
                with contextlib.suppress(OSError, MachineError):  # what failed is more to the point
                    _remove(machine.path(what.target), single=handed.single)
            raise
        if what.access == "ro" and what.kind != "live":
            machine.client.link().call("path", timeout=TIMEOUT, do="freeze", path=str(what.target))
    return Mounted(machine, what, handed)


def copy_all_back(mounted: Sequence[Mounted]) -> list[Changes]:
    """Copy back what changed in each, all of them even if one fails.

    Raises:
        MountConflict: Some was not taken over.
        MachineError: One of them failed.
    """
    done: list[Changes] = []
    failed: list[MachineError] = []
    for one in mounted:
        try:
            changes = one.copy_back()
            if one.mount.kind != "live":  # of which there is nothing to tell
                done.append(changes)
        except MachineError as error:
            failed.append(error)
    for other in failed[1:]:
        _log.warning("%s", other)
    if failed:
        raise failed[0]
    return done


def _remove(path: GuestPath, *, single: bool) -> None:
    """Remove what was handed over."""
    if single:
        path.unlink(missing_ok=True)
    elif path.exists():
        path.rmtree()


@contextlib.contextmanager
def _as_transfer_error(what: object) -> Iterator[None]:
    """Turn an OSError, the host's or one that the machine claims, into what users of mounts wait for."""
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{what} cannot be copied: {sanitize_line(str(error), _MAX_SAID)}",
            resolution="check rights and free space on both sides, then try again",
        ) from error


def _check_place(machine: Machine, what: Mount, *, single: bool) -> None:
    """Refuse a place where the machine has something: it would come back as if it had been made there."""
    place = machine.path(what.target)
    try:
        free = not place.exists() or (not single and place.is_dir() and not any(place.iterdir()))
    except (OSError, TransferError):  # too much to be listed
        free = False
    if place.is_symlink() or not free:
        raise UsageError(
            f"the machine has something at {what.target} already",
            resolution="mount it at a place that is empty or missing there",
        )
