"""Frames on the Unix socket between a holder and its clients, encoded as on the wire to a guest."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_microvm.wire.frames import MAX_PAYLOAD, Frame, FrameReader, Kind, encode

if TYPE_CHECKING:
    from typing_extensions import Self

SCRIPT, STDOUT, STDERR = 1, 2, 3
"""Streams of a run: the script from the client, and its output."""

_PIECE = 65536


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield an alias of a socket's path that always fits into an address (unix(7): 107 bytes)."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class FrameSocket:
    """A connected socket that carries frames; any thread may send.

    Args:
        connection: The socket, which this object then owns.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a thread that waits for frames wakes up."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def message(self, **values: Any) -> None:
        """Send a JSON object."""
        self._send(encode(Kind.MESSAGE, 0, json.dumps(values).encode()))

    def data(self, stream: int, data: bytes) -> None:
        """Send bytes of a stream, in frames of the allowed size."""
        most = MAX_PAYLOAD[Kind.DATA]
        for start in range(0, len(data), most):
            self._send(encode(Kind.DATA, stream, data[start : start + most]))

    def close_stream(self, stream: int) -> None:
        """Send the end of a stream."""
        self._send(encode(Kind.CLOSE, stream))

    def frames(self) -> Iterator[Frame]:
        """Yield received frames until the peer closes the connection.

        Raises:
            WireError: The peer sent invalid data.
        """
        reader = FrameReader()
        while data := self._receive():
            yield from reader.feed(data)

    def wait_end(self, timeout: float) -> None:
        """Wait until the peer closes the connection, or sends nothing for ``timeout`` seconds."""
        self._connection.settimeout(timeout)
        while self._receive():
            pass

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(_PIECE)
        except OSError:  # closed by this side or the peer
            return b""

    def _send(self, frame: bytes) -> None:
        with self._sending:
            self._connection.sendall(frame)


def message_of(frame: Frame) -> Mapping[str, Any]:
    """Return the JSON object of a message frame; empty for anything else."""
    if frame.kind is not Kind.MESSAGE:
        return {}
    value = json.loads(frame.payload)
    return value if isinstance(value, dict) else {}
