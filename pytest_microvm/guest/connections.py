"""Connections of the guest's network process: each joins a socket in the guest to a channel stream."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any, Protocol

from pytest_microvm.guest.event_loop import READ, WRITE, EventLoop
from pytest_microvm.wire.fields import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_microvm.wire.channel import Channel

_READ_SIZE = 65536
_LINGER = 2.0  # seconds for a client to read the last bytes before its connection is reset
_RETRY = 0.1  # seconds between two tries to reach a server
_LONGEST = 30 * 24 * 3600.0
_PATIENCE = 10.0  # seconds for a listening server to accept the connection
_RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close(2) sends RST


class Carrier(Protocol):
    """The process that carries connections: its channel, event loop and pending connection attempts."""

    channel: Channel
    loop: EventLoop
    reaching: set[Reaching]

    def forget(self, stream: int, connection: Any) -> None:
        """Drop a connection that has ended in the guest."""

    def linger(self, stream: int, connection: Any) -> None:
        """Keep a connection whose stream is closed until its pending bytes are written."""


class Connection:
    """A socket and the stream that carries its bytes.

    Each side's bytes wait in one place only: the host's in ``_pending`` (a window at most), the socket's in
    the kernel, until the stream has credit and the port has room.
    """

    def __init__(self, network: Carrier, sock: socket.socket, stream: int) -> None:
        self._network = network
        self._sock = sock
        self._stream = stream
        self._pending = bytearray()
        self._reading = True  # the socket has not reached its end
        self._host_done = False  # the host sends no more
        self._shut = False  # our sending side of the socket is shut down
        self._ended = False  # the host reads no more
        self.update()

    def update(self) -> None:
        """Watch the socket for the events that can be handled now."""
        reads = self._reading and (self._ended or self._network.channel.room(self._stream))
        events = (READ if reads else 0) | (WRITE if self._pending else 0)
        self._network.loop.watch(self._sock, events, self._ready)

    def came(self, data: bytes) -> None:
        """Queue bytes from the host and write them to the socket."""
        self._pending += data
        self._write()

    def host_closed(self) -> None:
        """Record that the host sends no more."""
        self._host_done = True
        self._write()

    def end(self) -> None:
        """Write pending bytes to the socket, then close it: the host reads no more."""
        self._ended = True
        self._network.channel.close(self._stream)
        self._network.linger(self._stream, self)
        self._write()

    def reset(self) -> None:
        """Reset the connection at once."""
        if not self._ended:  # otherwise the number may belong to another stream by now
            self._network.channel.close(self._stream)
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self._write()
        if mask & READ and self._sock.fileno() >= 0:
            self._read()

    def _read(self) -> None:
        channel = self._network.channel
        size = _READ_SIZE if self._ended else min(_READ_SIZE, channel.room(self._stream) or 0)
        if not size:
            return
        try:
            data = self._sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self._fail()
            return
        if not data:
            self._reading = False
            if not self._ended:
                channel.close(self._stream)
        elif not self._ended:
            channel.write(self._stream, data)
        self._go_on()

    def _write(self) -> None:
        if self._pending:
            try:
                sent = self._sock.send(self._pending)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._fail()
                return
            del self._pending[:sent]
            if not self._ended:
                self._network.channel.consumed(self._stream, sent)
        if not self._pending and (self._host_done or self._ended) and not self._shut:
            self._shut = True
            with contextlib.suppress(OSError):  # already disconnected
                self._sock.shutdown(socket.SHUT_WR)
            if self._ended and self._reading:
                self._network.loop.later(_LINGER, self._close)
        self._go_on()

    def _go_on(self) -> None:
        if self._shut and not self._reading:
            self._close()
        else:
            self.update()

    def _fail(self) -> None:
        """Report the socket's failure to the host, and reset the connection."""
        if not self._ended:
            self._network.channel.send({"event": "reset", "stream": self._stream})
        self.reset()

    def _close(self) -> None:
        self._network.loop.watch(self._sock, 0, self._ready)
        self._sock.close()
        self._network.forget(self._stream, self)


def whole_number(request: dict[str, Any], key: str, limit: int) -> int:
    """Return a validated number of a request.

    Raises:
        ValueError: It is not an integer from 1 to ``limit``.
    """
    value = request[key]
    if not is_whole(value, 1, limit):
        raise ValueError(f"{key} is not a number from 1 to {limit}")
    return value


class Reaching:
    """An attempt to connect to a server in the guest.

    Args:
        network: The process that carries connections.
        request: With ``port`` (on 127.0.0.1, then ::1) or ``path`` (of a Unix socket), and ``timeout``.
        done: Called once with the connected socket, or with the error.
        again: Whether to retry until the timeout while no server listens.
    """

    def __init__(
        self,
        network: Carrier,
        request: dict[str, Any],
        done: Callable[[socket.socket | None, OSError | None], None],
        *,
        again: bool,
    ) -> None:
        self._network = network
        self._again = again
        self._done = done
        self._targets = _targets(request)
        self._next = 0
        self._sock: socket.socket | None = None
        self._failure: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        self._retry: list[Any] | None = None
        self._deadline = network.loop.later(_seconds(request.get("timeout", _PATIENCE)), self._time_over)
        network.reaching.add(self)
        self._try()

    def cancel(self) -> None:
        """Give up without calling ``done``."""
        self._drop()
        self._network.loop.never(self._deadline)
        self._network.loop.never(self._retry)
        self._network.reaching.discard(self)

    def _try(self) -> None:
        family, address = self._targets[self._next]
        try:
            sock = self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                self._network.loop.watch(sock, WRITE, self._ready)
                return
        except OSError as error:  # a path that is too long, a family that the kernel lacks
            code = error.errno or errno.EINVAL
        self._judge(code)

    def _ready(self, _mask: int) -> None:
        assert self._sock is not None
        self._judge(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _judge(self, code: int) -> None:
        sock = self._sock
        if code == 0 and sock is not None:
            self._network.loop.watch(sock, 0, self._ready)
            self._sock = None
            self._finish(sock, None)
            return
        self._drop()
        self._failure = OSError(code, os.strerror(code))
        full = code == errno.EAGAIN  # the backlog of a Unix server
        if not full:
            self._next = (self._next + 1) % len(self._targets)
        if self._next and not full:
            self._try()
        elif self._again or full:
            self._retry = self._network.loop.later(_RETRY, self._try)
        else:
            self._finish(None, self._failure)

    def _time_over(self) -> None:
        self._finish(None, self._failure)

    def _drop(self) -> None:
        if self._sock is not None:
            self._network.loop.watch(self._sock, 0, self._ready)
            self._sock.close()
            self._sock = None

    def _finish(self, sock: socket.socket | None, error: OSError | None) -> None:
        self.cancel()
        self._done(sock, error)


def _targets(request: dict[str, Any]) -> list[tuple[int, Any]]:
    if "path" in request:
        return [(socket.AF_UNIX, os.fsencode(request["path"]))]
    port = whole_number(request, "port", 65535)
    return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]


def _seconds(value: Any) -> float:
    if not 0 <= value <= _LONGEST:
        raise ValueError("timeout is not a number of seconds")
    return float(value)
