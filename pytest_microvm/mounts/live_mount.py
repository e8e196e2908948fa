"""Live mounts: serve a directory of the host to a machine, which works in it directly."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.transfer import TIMEOUT
from pytest_microvm.agent.users import GuestUser
from pytest_microvm.errors import MachineCrashed, TransferError, UsageError
from pytest_microvm.mounts.copying import resolved
from pytest_microvm.mounts.live.folder import Folder, Growth
from pytest_microvm.mounts.live.lock import lock_file
from pytest_microvm.mounts.live.messages import BadRequest, Owner
from pytest_microvm.mounts.live.server import Server
from pytest_microvm.mounts.live.serving import serve
from pytest_microvm.settings.mounts import Changes, Mount
from pytest_microvm.untrusted.nofollow import open_folder

if TYPE_CHECKING:
    from pytest_microvm.mounts.machine import Machine

_log = logging.getLogger("pytest_microvm")


class LiveMount:
    """A live mount: the machine sees the host's directory as it is and changes it immediately.

    Args:
        machine: The machine.
        mount: Source, target and access of the mount; the source is a directory.

    Raises:
        UsageError: The source is missing or is no directory.
    """

    single = False

    def __init__(self, machine: Machine, mount: Mount) -> None:
        self._machine = machine
        self._mount = mount
        self._number = 0
        self._source = resolved(mount)
        if not self._source.is_dir():
            raise UsageError(
                f"{mount.source} is a file: a live mount is a directory",
                resolution="mount the directory it is in, or mount it as copy",
            )

    def hand_over(self, owner: GuestUser | None) -> None:
        """Mount the directory in the machine.

        Args:
            owner: To whom everything in it belongs there; ``None``: root.

        Raises:
            TransferError: The machine cannot mount the directory.
        """
        path = self._machine.path(self._mount.target)
        path.mkdir(parents=True, exist_ok=True)
        writable = self._mount.access == "rw"
        whose = Owner() if owner is None else Owner(owner.uid, owner.gid)
        server = Server(self._open(writable=writable), whose)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer, server)
            except BadRequest as error:
                self._machine.client.record("mount", f"{self._mount.target} ended: {error}")
                _log.warning("%s: the machine's kernel broke the protocol: %s", self._mount.target, error)

        try:
            self._number = self._machine.network.share(str(path), answer, read_only=not writable)
        except GuestError as error:
            server.close()
            raise TransferError(
                f"{self._mount.target} cannot be mounted live: {error.message}",
                resolution="mount it as copy, and call copy_back() whenever its changes are wanted",
            ) from error
        except TimeoutError as error:
            raise TransferError(
                f"{self._mount.target} cannot be mounted live: {error}",
                resolution="was the machine's process microvm-network ended?",
            ) from error

    def _open(self, *, writable: bool) -> Folder:
        growth = Growth(self._machine.facts.limits.disk)
        folder = Folder(open_folder(self._source), growth, writable=writable)
        if writable:
            try:
                with folder.lock:
                    pass
            except OSError as error:
                folder.close()
                raise TransferError(
                    f"{self._mount.target} cannot be mounted live: its lock cannot be used: {error}",
                    resolution=f"have {lock_file().parent} removed, mount it as copy, or read-only",
                ) from error
        return folder

    def bring_back(self) -> Changes:
        """Have the machine flush memory-mapped files (mmap(2)); all other changes are on the host already."""
        self._machine.client.link().call("path", timeout=TIMEOUT, do="sync", path=str(self._mount.target))
        return Changes()

    def take_away(self) -> None:
        """Unmount the directory and remove the empty mount point; the directory's content is kept."""
        try:
            self._machine.network.unshare(self._number)
            self._machine.path(self._mount.target).rmdir()
        except (MachineCrashed, TimeoutError, OSError) as error:
            _log.debug("%s was not taken away: %s", self._mount.target, error)
