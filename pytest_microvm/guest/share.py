"""A host directory mounted in this machine: joins the kernel's FUSE device to a stream of the port.

The kernel's requests and the host's answers are forwarded without being parsed. Sources: fuse(4),
Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING

from pytest_microvm.guest.event_loop import READ

if TYPE_CHECKING:
    from pytest_microvm.guest.connections import Carrier

_MAX_REQUEST = 128 * 1024 + 4096  # the kernel rejects smaller buffers; see mounts/live/messages.py
_LENGTH = 4  # bytes, at the beginning of requests and answers
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MNT_DETACH = 1, 2, 4, 2  # include/uapi/linux/mount.h
_OPTIONS = "rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"


class Share:
    """A mounted host directory; the network process handles it like any other connection.

    Requests wait in the kernel until the stream has credit for the one before.

    Args:
        network: The process that carries connections.
        path: The mount point: an empty directory.
        stream: The stream that carries requests and answers.
        read_only: Whether the kernel refuses changes itself; the host refuses them anyway.

    Raises:
        OSError: The kernel does not support FUSE, or there is no such directory.
    """

    def __init__(self, network: Carrier, path: str, stream: int, *, read_only: bool) -> None:
        self._network = network
        self._path = path
        self._stream = stream
        self._request = b""
        self._answers = bytearray()
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _mount(path, self._device, _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0))
        except OSError:
            os.close(self._device)
            raise

    def update(self) -> None:
        """Forward the kernel's requests as far as the stream's credit allows."""
        self._send()
        if self._device >= 0:
            self._network.loop.watch(self._device, 0 if self._request else READ, self._ready)

    def came(self, data: bytes) -> None:
        """Buffer bytes of answers from the host; write each complete answer to the kernel."""
        self._network.channel.consumed(self._stream, len(data))
        self._answers += data
        while len(self._answers) >= _LENGTH:
            size = int.from_bytes(self._answers[:_LENGTH], "little")
            if len(self._answers) < size:
                return
            with contextlib.suppress(OSError):  # the caller no longer waits for it
                os.write(self._device, self._answers[:size])
            del self._answers[:size]

    def host_closed(self) -> None:
        """Unmount the directory: the host answers no more."""
        self.reset()

    def end(self) -> None:
        """Unmount the directory: the host reads no more."""
        self.reset()

    def reset(self) -> None:
        """Unmount the directory even if it is in use; pending calls fail."""
        if self._device < 0:
            return
        self._network.loop.watch(self._device, 0, self._ready)
        os.close(self._device)  # first: otherwise the kernel might send a request that is never answered
        self._device = -1
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(self._path), _MNT_DETACH)
        self._network.channel.close(self._stream)
        self._network.forget(self._stream, self)

    def holds(self, path: str) -> bool:
        """Return True if a path, as written, is in the directory: this process would wait for itself."""
        return path == self._path or path.startswith(self._path + "/")

    def _ready(self, _mask: int) -> None:
        try:
            self._request = os.read(self._device, _MAX_REQUEST)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # ENODEV: unmounted
                self.reset()
            return
        self.update()

    def _send(self) -> None:
        while self._request:
            sent = self._network.channel.write(self._stream, self._request)
            if not sent:
                return
            self._request = self._request[sent:]


def _mount(path: str, device: int, flags: int) -> None:
    data = f"fd={device},{_OPTIONS}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"microvm", os.fsencode(path), b"fuse", ctypes.c_ulong(flags), data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
