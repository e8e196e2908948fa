"""A directory of the host in this machine: the kernel's FUSE device here, a stream of the port there.

What the kernel asks is passed on as it is, and so are the answers; nothing here knows what they say. Sources:
fuse(4), Documentation/filesystems/fuse.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_microvm.guest.connections import Carrier

_MAX_REQUEST = 128 * 1024 + 4096  # the kernel reads nothing into less; see mounts/live/messages.py
_LENGTH = 4  # bytes, at the beginning of requests and answers
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MNT_DETACH = 1, 2, 4, 2  # include/uapi/linux/mount.h
_OPTIONS = "rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"


class Share:
    """One such directory; for the network process it is a connection like any other.

    The kernel's requests wait in the kernel until the stream has credit for the one before.

    Args:
        network: Whose it is.
        path: Where it is mounted: an empty directory.
        stream: What it is served through.
        read_only: Whether the kernel shall refuse changes by itself; the host refuses them anyway.

    Raises:
        OSError: The kernel does not know such file systems, or there is no such directory.
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
        """Pass on what the kernel asks, as far as the host lets it."""
        self._send()
        if self._device >= 0:
            self._network.watch(self._device, 0 if self._request else selectors.EVENT_READ, self._ready)

    def came(self, data: bytes) -> None:
        """Take bytes of answers; the kernel gets each whole."""
        self._network.channel.consumed(self._stream, len(data))
        self._answers += data
        while len(self._answers) >= _LENGTH:
            size = int.from_bytes(self._answers[:_LENGTH], "little")
            if len(self._answers) < size:
                return
            with contextlib.suppress(OSError):  # nobody waits for it any more
                os.write(self._device, self._answers[:size])
            del self._answers[:size]

    def host_closed(self) -> None:
        """Unmount it: the host answers no more."""
        self.reset()

    def end(self) -> None:
        """Unmount it: the host reads no more."""
        self.reset()

    def reset(self) -> None:
        """Unmount it, whoever uses it; their calls fail."""
        if self._device < 0:
            return
        self._network.watch(self._device, 0, self._ready)
        os.close(self._device)  # first: else the kernel might ask again, and nobody would answer
        self._device = -1
        ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(self._path), _MNT_DETACH)
        self._network.channel.close(self._stream)
        self._network.forget(self._stream, self)

    def holds(self, path: str) -> bool:
        """Whether a path is in it, as it is written: to use it would be to wait for oneself."""
        return path == self._path or path.startswith(self._path + "/")

    def _ready(self, _mask: int) -> None:
        try:
            self._request = os.read(self._device, _MAX_REQUEST)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT):  # ENODEV: somebody unmounted it
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
