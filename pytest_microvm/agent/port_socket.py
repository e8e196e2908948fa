"""Sending and receiving on the non-blocking socket of a guest's port."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_microvm.errors import MachineCrashed

if TYPE_CHECKING:
    import socket

    from pytest_microvm.wire.channel import Channel

_READ_SIZE = 64 * 1024  # bytes: no guest occupies the I/O thread for long


def send_queued(sock: socket.socket, channel: Channel) -> int:
    """Send a channel's queued bytes until the socket would block; return the number of bytes sent.

    A closed connection empties the queue: :func:`receive` reports it.
    """
    queued = channel.queued
    try:
        channel.flush(sock.send)
    except OSError:
        return queued - len(channel.take())
    return queued - channel.queued


def receive(sock: socket.socket) -> bytes:
    """Return the bytes that have arrived, b"" if there are none.

    Raises:
        MachineCrashed: The guest's end is closed.
    """
    try:
        data = sock.recv(_READ_SIZE)
    except BlockingIOError:
        return b""
    except OSError:
        data = b""
    if not data:
        raise MachineCrashed("the machine ended")
    return data
