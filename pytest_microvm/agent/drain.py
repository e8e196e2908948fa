"""Continuous reading of a machine's console, whose last bytes are kept."""

from __future__ import annotations

import selectors
import threading
from typing import TYPE_CHECKING

from pytest_microvm.agent.reactor import reactor

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_TAIL_SIZE = 256 * 1024  # bytes per read: more than a socket buffers, so one read reaches the end


class Drain:
    """Continuous reader of a socket that keeps its last ``size`` bytes (a machine's console).

    Args:
        sock: A connected stream socket, which this object now owns.
        heard: Called with the received bytes, in order, by the thread that read them.
        size: Number of bytes to keep.
    """

    def __init__(
        self, sock: socket.socket, heard: Callable[[bytes], None] = lambda _data: None, size: int = 64 * 1024
    ) -> None:
        self.received = 0
        self._sock = sock
        self._heard = heard
        self._size = size
        self._tail = bytearray()
        self._closed = False
        self._lock = threading.Lock()
        sock.setblocking(False)
        reactor().set(sock, selectors.EVENT_READ, self._ready)

    def tail(self) -> bytes:
        """Return the last ``size`` bytes received, after reading those still in the socket."""
        self._read()
        with self._lock:
            return bytes(self._tail[-self._size :])

    def close(self) -> None:
        """Stop reading and close the socket; the tail remains available."""
        with self._lock:
            self._closed = True
        reactor().remove(self._sock)
        self._sock.close()

    def _ready(self, _mask: int) -> None:
        if not self._read():
            reactor().remove(self._sock)

    def _read(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            try:
                data = self._sock.recv(_TAIL_SIZE)
            except BlockingIOError:
                return True
            except OSError:
                return False
            self.received += len(data)
            self._tail += data
            del self._tail[: -self._size]
            self._heard(data)
            return bool(data)
