"""The guest's end of a virtio-serial port: a file descriptor and a channel."""

from __future__ import annotations

import fcntl
import os
from os import read, readv, write  # bound here: a test in the runner's process may replace them in os
from select import POLLIN, POLLOUT, poll
from typing import TYPE_CHECKING

from pytest_microvm.wire.channel import Channel
from pytest_microvm.wire.frames import HEADER, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.wire.channel import Event

PORTS = "/sys/class/virtio-ports"

# Linux returns at most one page of a virtio-serial port's data per read (fill_readbuf in
# drivers/char/virtio_console.c). readv(2) on a non-blocking port returns all available pages at once.
_PAGE = 4096
_PAGES = 16
_HIGH_FD = 900  # above the range that a test closes when it closes "all" descriptors, below the usual limit


def open_port(name: str) -> int:
    """Return a descriptor of the virtio-serial port called ``name``.

    Raises:
        FileNotFoundError: The machine has no such port.
    """
    for device in os.listdir(PORTS):
        with open(f"{PORTS}/{device}/name") as file:
            if file.read().strip() == name:
                return os.open(f"/dev/{device}", os.O_RDWR | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio-serial port is called {name!r}")


def out_of_the_way(fd: int) -> int:
    """Move ``fd`` above the numbers that tests close or reuse; no child process inherits it."""
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:  # the descriptor limit is lower than usual
        os.set_inheritable(fd, False)
        return fd
    os.close(fd)
    return high


class PortReader:
    """A reader for a non-blocking port that returns all available data at once.

    Args:
        fd: The port's descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pieces = [bytearray(_PAGE) for _ in range(_PAGES)]

    def read(self) -> bytes:
        """Return the available data; b"" once the host has closed the port.

        Raises:
            BlockingIOError: No data is available.
        """
        data = read(self._fd, _PAGE)
        return data if len(data) < _PAGE else data + self._more()

    def _more(self) -> bytes:
        """Return the rest of the available data; not called for a copy's first, short message."""
        try:
            size = readv(self._fd, self._pieces)
        except BlockingIOError:
            return b""
        return b"".join(self._pieces)[:size]  # only the last may be short


class Port:
    """A channel on a descriptor; :meth:`receive` and :meth:`flush` block.

    A clone's host end is new while this end is as old as its template, so a hello from the host
    restarts the channel. Templates are only made while no stream is open; what the template's host has sent
    last, such as the end of a stream, may still be in transit, and is dropped.
    """

    def __init__(self, fd: int, role: str) -> None:
        self.fd = fd
        self._role = role
        self.channel = Channel(role)
        self.generation = 0
        self._reader = PortReader(fd)
        os.set_blocking(fd, False)

    def receive(self) -> Iterator[Event]:
        """Wait for bytes and return the events in them (as :meth:`Channel.receive` does).

        Raises:
            EOFError: The host has closed the port.
            WireError: The host broke the protocol.
        """
        data = self._read()
        if not data:
            raise EOFError("the host closed the port")
        if self.channel.peer is not None and not self.channel.pending:
            hello = _last_hello(data)
            if hello is not None:
                self.channel = Channel(self._role)
                self.generation += 1
                data = data[hello:]
        return self.channel.receive(data)

    def move(self, fd: int) -> None:
        """Continue on ``fd``, the socket of a process that forwards this end's frames."""
        self.fd = fd
        self._reader = PortReader(fd)
        os.set_blocking(fd, False)

    def write_frame(self, frame: bytes) -> None:
        """Write a frame that is not the channel's, after the channel's outgoing data."""
        self.flush()
        while frame:
            try:
                frame = frame[write(self.fd, frame) :]
            except BlockingIOError:
                self._wait(POLLOUT)

    def flush(self) -> None:
        """Write the channel's outgoing data."""
        while not self.channel.flush(lambda data: write(self.fd, data)):
            self._wait(POLLOUT)

    def _read(self) -> bytes:
        while True:
            try:
                return self._reader.read()
            except BlockingIOError:
                self._wait(POLLIN)

    def _wait(self, events: int) -> None:
        waiting = poll()
        waiting.register(self.fd, events)
        waiting.poll()


def _last_hello(frames: bytes) -> int | None:
    """Return where the last hello among ``frames`` begins; ``None`` if there is none."""
    found, position = None, 0
    while position + HEADER.size <= len(frames):
        kind, _stream, length = HEADER.unpack_from(frames, position)
        if kind == Kind.HELLO:
            found = position
        position += HEADER.size + length
    return found
