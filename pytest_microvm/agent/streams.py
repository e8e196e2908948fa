"""Byte streams between host and guest, with blocking reads and writes for any thread."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.errors import MachineError, ProtocolViolation

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from pytest_microvm.agent.reactor import Reactor
    from pytest_microvm.wire.channel import Channel


class StreamLink(Protocol):
    """The link that carries streams; ``changed`` guards it and its streams."""

    changed: threading.Condition
    channel: Channel
    failure: MachineError | None
    reactor: Reactor

    def flush(self) -> None:
        """Send queued bytes."""

    def end_for(self, violation: ProtocolViolation) -> None:
        """Drop the connection because the guest violated the protocol."""


class Stream:
    """A byte stream between host and guest; requests refer to it by its ``number``."""

    def __init__(self, link: StreamLink, number: int) -> None:
        self._link = link
        self.number = number
        self._received = bytearray()
        self._ended = False
        self._discarding = False

    @property
    def link(self) -> StreamLink:
        """The link that carries the stream."""
        return self._link

    @property
    def ready(self) -> bool:
        """True if :meth:`read` would return immediately."""
        return bool(self._received) or self._ended

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        """Return between 1 and ``size`` bytes as soon as any are available, b"" at the end.

        Raises:
            TimeoutError: No bytes arrived within ``timeout`` seconds.
            MachineCrashed: The machine ended before the stream did.
        """
        link = self._link
        with link.changed:
            ready = link.changed.wait_for(lambda: self._received or self._ended or link.failure, timeout)
            if not ready:
                raise TimeoutError(f"nothing came within {timeout:g} s")
            data = bytes(self._received[:size])
            del self._received[:size]
            if not data and not self._ended and link.failure:
                raise link.failure
            link.channel.consumed(self.number, len(data))
        link.flush()
        return data

    def read_all(self, limit: int, timeout: float | None = None) -> bytes:
        """Return all bytes up to the stream's end.

        Raises:
            TimeoutError: The stream did not end within ``timeout`` seconds.
            ProtocolViolation: More than ``limit`` bytes arrived; the machine has been ended.
            MachineCrashed: The machine ended before the stream did.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        received = io.BytesIO()  # its getvalue() does not copy
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            data = self.read(timeout=left)
            if not data:
                return received.getvalue()
            received.write(data)
            if received.tell() > limit:
                violation = ProtocolViolation(f"the guest sent more than the {limit} bytes allowed here")
                self._link.end_for(violation)
                raise violation

    def write(self, data: bytes, timeout: float | None = None) -> None:
        """Send all of ``data``, waiting for the guest to consume earlier bytes where needed.

        Raises:
            TimeoutError: The guest did not accept all bytes within ``timeout`` seconds.
            BrokenPipeError: The guest has closed its end.
            ValueError: This end of the stream is closed.
            MachineCrashed: The machine ended.
        """
        link, channel = self._link, self._link.channel
        deadline = None if timeout is None else time.monotonic() + timeout
        view = memoryview(data)
        while view:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            with link.changed:
                if not link.changed.wait_for(lambda: channel.room(self.number) != 0 or link.failure, left):
                    raise TimeoutError(f"the guest did not take everything within {timeout:g} s")
                if link.failure:
                    raise link.failure
                if not channel.is_open(self.number):
                    raise BrokenPipeError(f"stream {self.number} is closed")
                sent = channel.write(self.number, bytes(view[:65536]))
            view = view[sent:]
            link.flush()

    def close(self) -> None:
        """Close the sending direction: the guest sees the stream's end."""
        with self._link.changed:
            self._link.channel.close(self.number)
            self._link.changed.notify_all()  # another thread may be waiting in write()
        self._link.flush()

    def close_soon(self) -> None:
        """Schedule :meth:`close` on the I/O thread; unlike ``close``, a finalizer may call this."""
        self._link.reactor.soon(self.close)

    def discard(self) -> None:
        """Close this end and drop all bytes that still arrive."""
        with self._link.changed:
            self._discarding = True
            self._link.channel.consumed(self.number, len(self._received))
            self._received.clear()
            self._link.channel.close(self.number)
            self._link.changed.notify_all()
        self._link.flush()

    def came(self, data: bytes) -> None:
        """Buffer bytes from the guest."""
        if self._discarding:
            self._link.channel.consumed(self.number, len(data))
        else:
            self._received += data

    def end(self) -> None:
        """Record that the guest has closed its side."""
        self._ended = True
        self._link.channel.close(self.number)  # the guest's CLOSE ends the sending direction too


def read_any(streams: Sequence[Stream], timeout: float | None) -> list[tuple[Stream, bytes]]:
    """Wait until any of a link's ``streams`` is ready; return the bytes of each ready one, b"" at its end.

    Raises:
        TimeoutError: No stream was ready within ``timeout`` seconds.
        MachineCrashed: The machine ended.
    """
    link = streams[0].link
    with link.changed:
        if not link.changed.wait_for(lambda: link.failure or any(s.ready for s in streams), timeout):
            raise TimeoutError(f"nothing came within {timeout:g} s")
        ready = [stream for stream in streams if stream.ready]
        if not ready and link.failure:
            raise link.failure
    return [(stream, stream.read()) for stream in ready]
