"""Open a launch's files as descriptors: QEMU inherits them and needs neither paths nor rights to folders."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pytest_microvm.hypervisors.containment import grant
from pytest_microvm.hypervisors.qemu.overlay import write_overlay

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_microvm.hypervisors import Launch
    from pytest_microvm.hypervisors.containment import Identity

_SLACK = 16 * 1024**2  # bytes for an overlay's tables and QEMU's stderr


def open_files(
    launch: Launch, identity: Identity | None, *, readonly_ram: bool, stack: ExitStack
) -> dict[str, int]:
    """Open the files that QEMU needs, keyed as :func:`qemu_command` expects them.

    Args:
        launch: The VM to start.
        identity: The user that QEMU runs as; it must be able to reopen kernel, initramfs and RAM.
        readonly_ram: Whether a copy's RAM file need only be readable.
        stack: Closes the descriptors.

    Raises:
        OSError: A file cannot be opened.
        HostError: QEMU's user cannot be given a file.
    """

    def opened(path: Path, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, descriptor)
        return descriptor

    writes_ram = launch.share or launch.state is None or not readonly_ram
    fds = {}
    for name, path in (("kernel", launch.kernel), ("initramfs", launch.initramfs)):
        fds[name] = opened(path, os.O_RDONLY)
        grant(fds[name], identity, write=False)
    boots = launch.state is None
    fds["ram"] = opened(launch.ram, (os.O_RDWR if writes_ram else os.O_RDONLY) | (os.O_CREAT if boots else 0))
    if boots:
        os.ftruncate(fds["ram"], launch.memory)
    grant(fds["ram"], identity, write=writes_ram)
    for number, disk in enumerate(launch.disks):
        reads = disk.readonly or disk.ephemeral
        fds[f"disk{number}"] = opened(disk.path, os.O_RDONLY if reads else os.O_RDWR)
        if disk.ephemeral:
            overlay = stack.enter_context(tempfile.TemporaryFile(dir=_overlays()))  # noqa: SIM115 - the stack does
            write_overlay(overlay, os.fstat(fds[f"disk{number}"]).st_size)
            fds[f"overlay{number}"] = overlay.fileno()
    return fds


class WrittenFile:
    """The file that receives a machine's disk writes, for measuring how much it grows.

    It holds no lock on the file and grants no access to it.

    Args:
        launch: The VM to start.
        fds: Its files, as :func:`open_files` returned them.
    """

    def __init__(self, launch: Launch, fds: dict[str, int]) -> None:
        self._descriptor: int | None = None
        self._before = self._growth = 0
        for number, disk in enumerate(launch.disks):
            if not disk.readonly and self._descriptor is None:
                name = f"overlay{number}" if disk.ephemeral else f"disk{number}"
                self._descriptor = os.open(f"/proc/self/fd/{fds[name]}", os.O_PATH | os.O_CLOEXEC)
                self._before = _allocated(self._descriptor)

    def growth(self) -> int:
        """Return the bytes that the file has grown by; once it is closed, the last figure."""
        if self._descriptor is not None:
            self._growth = max(0, _allocated(self._descriptor) - self._before)
        return self._growth

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        if self._descriptor is not None:
            self.growth()
            os.close(self._descriptor)
            self._descriptor = None


def largest_file(launch: Launch) -> int:
    """Return the size in bytes of the largest file that QEMU may write: a disk or its overlay.

    RAM is mapped, not written; an overlay's tables take one part in 8,000 (docs/interop/qcow2 of QEMU).
    """
    sizes = [disk.path.stat().st_size for disk in launch.disks if not disk.readonly]
    largest = max(sizes, default=0)
    return largest + largest // 1024 + _SLACK


def _allocated(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def _overlays() -> str:
    """Return the folder for overlays: on a disk, which /tmp often is not."""
    folder = tempfile.gettempdir()
    return "/var/tmp" if folder == "/tmp" and os.access("/var/tmp", os.W_OK) else folder  # noqa: S108
