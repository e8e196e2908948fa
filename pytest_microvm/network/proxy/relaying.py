"""The proxy's byte streams (plain, metered, TLS terminated here), and functions that relay between them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from pytest_microvm.network.proxy.meter import CHUNK, Meter

_Result = TypeVar("_Result")

_FLUSH = 30.0  # seconds for a guest to read the last bytes sent to it
_LINGER = 5.0  # seconds to drain the rest of a refused guest's data
_LINGER_BYTES = 1024 * 1024


class GuestGone(Exception):
    """A guest's connection failed, or its data violates the protocol."""


class ByteStream(Protocol):
    """A bidirectional byte stream."""

    async def read(self) -> bytes:
        """Return some bytes; b"" at the end."""

    def unread(self, data: bytes) -> None:
        """Put bytes back; the next read returns them."""

    async def write(self, data: bytes) -> None:
        """Send bytes, at the speed at which the other side reads them."""

    async def end(self) -> bool:
        """Close the sending direction; return True if the other side can still send."""


class Guest(ByteStream, Protocol):
    """A guest's end of a byte stream."""

    async def linger(self) -> None:
        """Close the sending direction and drain input for a while, so that the guest reads its response."""


class GuestStream:
    """A guest's connection.

    Args:
        reader: Reads the guest's data.
        writer: Writes data to the guest.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ahead = b""
        self._ended = False
        self.touched = 0.0  # time of the last transfer, on the loop's clock

    async def read(self) -> bytes:
        """Return some bytes; b"" at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            data = await self._reader.read(CHUNK)
        except OSError as error:
            raise GuestGone from error
        self.touched = asyncio.get_running_loop().time()
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back; the next read returns them."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, at the speed at which the guest reads them.

        Raises:
            GuestGone: The connection failed, or :meth:`end` was called before.
        """
        if self._ended:
            raise GuestGone
        self._writer.write(data)  # before any await: GuestTls relies on that
        try:
            await self._writer.drain()
        except OSError as error:
            raise GuestGone from error
        self.touched = asyncio.get_running_loop().time()

    async def end(self) -> bool:
        """Close the sending direction; return True if the guest can still send."""
        self._ended = True
        if self._writer.can_write_eof():
            self._writer.write_eof()
            return True
        return False

    async def linger(self) -> None:
        """Close the sending direction and drain input for a while, so that the guest reads its response."""

        async def drop() -> None:
            dropped = 0
            while dropped < _LINGER_BYTES and (data := await self.read()):
                dropped += len(data)

        if await self.end():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(drop(), _LINGER)

    async def close(self) -> None:
        """Close the connection when the guest has read all data, or cut it after a timeout."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), _FLUSH)
        except (OSError, asyncio.TimeoutError):
            self.cut()

    def cut(self) -> None:
        """Reset the connection, so that truncated data is not taken for complete; may be called twice."""
        _abort(self._writer)


class ServerStream:
    """A metered connection to a server.

    Args:
        reader: Reads the server's data.
        writer: Writes data to the server.
        meter: Counts the bytes and limits the bandwidth.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: Meter) -> None:
        self._reader = reader
        self._writer = writer
        self._meter = meter
        self._ahead = b""
        self.sent_bytes = 0
        self.received_bytes = 0

    async def read(self) -> bytes:
        """Return some bytes; b"" at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        data = await self._reader.read(self._meter.chunk)
        self.received_bytes += len(data)
        await self._meter.move(len(data))
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back; the next read returns them."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, as fast as the server reads them and the bandwidth allows."""
        for start in range(0, len(data), self._meter.chunk):
            piece = data[start : start + self._meter.chunk]
            await self._meter.move(len(piece))
            self._writer.write(piece)
            self.sent_bytes += len(piece)
            await self._writer.drain()

    async def end(self) -> bool:
        """Close the sending direction if possible; return False with TLS, which cannot end one direction."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
            return True
        return False

    async def is_quiet(self) -> bool:
        """Return True if the idle connection is reusable: still open, and without unsolicited data."""
        if self._ahead or self._writer.is_closing():
            return False
        reading = asyncio.ensure_future(self._reader.read(1))
        try:
            await asyncio.sleep(0)  # lets the read finish if data or the end has already arrived
            return not reading.done()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def close(self) -> None:
        """Close the connection immediately."""
        _abort(self._writer)


class GuestTls:
    """Plain text of a TLS connection with a guest, terminated at the proxy.

    Args:
        below: The guest's connection.
        context: The TLS context with the certificate to present.
    """

    def __init__(self, below: Guest, context: ssl.SSLContext) -> None:
        self._below = below
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ahead = b""

    async def handshake(self) -> None:
        """Perform the TLS handshake.

        Raises:
            GuestGone: The guest does not trust the certificate, or does not use TLS.
        """
        await self._until_done(self._tls.do_handshake)

    async def read(self) -> bytes:
        """Return some bytes; b"" at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            return await self._until_done(lambda: self._tls.read(CHUNK))
        except ssl.SSLZeroReturnError:
            return b""

    def unread(self, data: bytes) -> None:
        """Put bytes back; the next read returns them."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, at the speed at which the guest reads them."""
        if data:
            self._tls.write(data)
            await self._flush()

    async def end(self) -> bool:
        """Close the TLS connection; return False, as nothing more can be read."""
        with contextlib.suppress(ssl.SSLError):  # it expects the guest's end, which we do not wait for
            self._tls.unwrap()
        await self._flush()
        return False

    async def linger(self) -> None:
        """Close the sending direction and drain input for a while, so that the guest reads its response."""
        await self.end()
        await self._below.linger()

    async def _until_done(self, step: Callable[[], _Result]) -> _Result:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                if data := await self._below.read():
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLZeroReturnError:
                raise
            except ssl.SSLError as error:
                await self._flush()  # the alert
                raise GuestGone(error.reason or "TLS failed") from error
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        # Reader and writer may run this concurrently; bytes keep their order because the stream below
        # accepts them before its first await.
        if data := self._outgoing.read():
            await self._below.write(data)


def _abort(writer: asyncio.StreamWriter) -> None:
    # Do not abort a writer that has sent all its data after close(): CPython's abort() fails then.
    if not writer.is_closing() or writer.transport.get_write_buffer_size():
        writer.transport.abort()


async def copy(source: ByteStream, sink: ByteStream, change: Callable[[bytes], bytes] | None = None) -> None:
    """Copy bytes in one direction up to the end.

    Args:
        source: The stream to read.
        sink: The stream to write.
        change: Applied to each piece, and finally to b"", which returns bytes that it held back.

    Raises:
        EOFError: The sink cannot close one direction only, so the other must end, too.
    """
    while data := await source.read():
        await sink.write(change(data) if change else data)
    if change:
        await sink.write(change(b""))
    if not await sink.end():
        raise EOFError


async def relay(one: ByteStream, other: ByteStream, back: Callable[[bytes], bytes] | None = None) -> None:
    """Copy bytes in both directions until both have ended, or one ends that cannot end alone.

    Args:
        one: A stream.
        other: Another stream.
        back: Applied to the bytes from ``other`` to ``one``.
    """
    with contextlib.suppress(EOFError):
        await together(copy(one, other), copy(other, one, back))


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """Run coroutines concurrently; when one fails, cancel the others."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
