"""A stream of a guest's port ``network`` as an asyncio transport, with backpressure both ways."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol, cast

HIGH = 64 * 1024
"""Bytes buffered for a guest above which the writer is paused."""

_LOW = HIGH // 4
_PIECE = 64 * 1024


class StreamPort(Protocol):
    """The port that carries the bytes of streams."""

    loop: asyncio.AbstractEventLoop
    full: bool

    def write(self, number: int, data: bytes) -> int:
        """Send as many bytes of a stream as the guest has granted credit for; return their number."""

    def consumed(self, number: int, size: int) -> None:
        """Grant the guest credit for bytes that the protocol has received."""

    def close_stream(self, number: int, *, end: bool) -> None:
        """Close the sending direction of a stream; with ``end``, the receiving one, too."""

    def drop(self, number: int) -> None:
        """Reset a stream on both sides."""


class StreamTransport(asyncio.Transport):
    """One connection of a guest.

    The guest may send a window of bytes; it gets more credit as the protocol receives them, so a paused
    reader stops the guest's program. Written bytes are buffered here until the guest has granted credit and
    the port has room.
    """

    _start_tls_compatible = True  # for loop.start_tls

    def __init__(self, port: StreamPort, number: int) -> None:
        super().__init__({"peername": ("guest", number)})
        self.number = number
        self._port = port
        self._protocol: asyncio.BaseProtocol = asyncio.Protocol()
        self._buffer = bytearray()
        self._held = bytearray()  # received while reading was paused
        self._ended = False  # the guest sends no more
        self._paused = True  # until a protocol is set
        self._writer_paused = False
        self._eof = False
        self._closing = False
        self._lost = False
        self._high, self._low = HIGH, _LOW

    # asyncio.Transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Set the protocol that receives the guest's bytes."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Return True if the transport is closed or closes once its buffer is written."""
        return self._closing

    def is_reading(self) -> bool:
        """Return True if the protocol receives data."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Pass no more data to the protocol and grant the guest no more credit."""
        self._paused = True

    def resume_reading(self) -> None:
        """Pass data to the protocol again."""
        if self._paused:
            self._paused = False
            self._port.loop.call_soon(self._hand_over)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue ``data`` and send it as the guest grants credit."""
        if self._lost or self._closing:
            return
        if self._eof:
            raise RuntimeError("cannot write after write_eof()")
        self._buffer += data
        self.pump()
        if len(self._buffer) > self._high and not self._writer_paused:
            self._writer_paused = True
            self._protocol.pause_writing()

    def write_eof(self) -> None:
        """Close the sending direction after the buffered data is sent."""
        self._eof = True
        self.pump()

    def can_write_eof(self) -> bool:
        """Return True: :meth:`write_eof` is supported."""
        return True

    def close(self) -> None:
        """Stop reading, and close the transport once the buffered data is sent."""
        if not self._closing:
            self._closing = self._eof = True
            self._held.clear()
            self.pump()

    def abort(self) -> None:
        """Drop the connection immediately, also on the guest's side."""
        self._force_close(None)

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes in the write buffer."""
        return len(self._buffer)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return (low, high): the buffer sizes at which writers are resumed and paused."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the buffer sizes at which writers are paused and resumed."""
        self._high = HIGH if high is None else high
        self._low = self._high // 4 if low is None else low

    def _force_close(self, error: Exception | None) -> None:
        """Drop the connection; asyncio's TLS calls this method by this name."""
        if not self._lost:
            self._port.drop(self.number)
            self.lose(error)

    # Called by the port

    def pump(self) -> None:
        """Send as many buffered bytes as the credit and the port's room allow."""
        if self._lost:
            return
        while self._buffer and not self._port.full:
            sent = self._port.write(self.number, bytes(self._buffer[:_PIECE]))
            if not sent:
                break
            del self._buffer[:sent]
        if self._writer_paused and len(self._buffer) <= self._low:
            self._writer_paused = False
            self._protocol.resume_writing()
        if self._eof and not self._buffer and not self._lost:
            self._port.close_stream(self.number, end=self._closing)
            if self._closing:
                self.lose(None)

    @property
    def waits(self) -> bool:
        """True if bytes are waiting to be sent."""
        return bool(self._buffer)

    def came(self, data: bytes) -> None:
        """Accept bytes from the guest."""
        if self._closing:
            return
        self._held += data
        self._hand_over()

    def end(self) -> None:
        """Handle the guest's end of data."""
        self._ended = True
        self._hand_over()

    def lose(self, error: Exception | None) -> None:
        """Notify the protocol that the connection is lost."""
        if not self._lost:
            self._lost = self._closing = True
            self._buffer.clear()
            self._held.clear()
            self._port.loop.call_soon(self._protocol.connection_lost, error)

    def _hand_over(self) -> None:
        while self._held and not self._paused and not self._closing:
            data = bytes(self._held)
            self._held.clear()
            self._tell(data)
            self._port.consumed(self.number, len(data))
        if self._ended and not self._paused and not self._closing:
            self._ended = False  # notify the protocol once
            if not cast("Any", self._protocol).eof_received():
                self.close()

    def _tell(self, data: bytes) -> None:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            cast("asyncio.Protocol", protocol).data_received(data)
            return
        view = memoryview(data)
        while view:
            buffer = memoryview(cast("Any", protocol.get_buffer(len(view))))
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            protocol.buffer_updated(size)
            view = view[size:]


def connect_streams(
    stream: StreamTransport, loop: asyncio.AbstractEventLoop, limit: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a reader and a writer for ``stream``, like :func:`asyncio.open_connection`.

    Args:
        stream: A new stream.
        loop: The stream's loop.
        limit: The reader buffers twice as many bytes before the guest's program is paused.
    """
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    stream.set_protocol(protocol)
    protocol.connection_made(stream)
    stream.resume_reading()
    return reader, asyncio.StreamWriter(stream, protocol, reader, loop)
