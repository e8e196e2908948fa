"""Byte streams as the proxy uses them (plain, counted, with TLS ended here), and what carries their bytes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from pytest_microvm.network.proxy.meter import CHUNK, Meter

_Result = TypeVar("_Result")

_FLUSH = 30.0  # seconds a guest may take to read the last of what it was sent
_LINGER = 5.0  # seconds for what a guest still sends after it was refused
_LINGER_BYTES = 1024 * 1024


class GuestGone(Exception):
    """A guest's connection is broken, or what comes on it is not what was agreed on."""


class Stream(Protocol):
    """A byte stream both ways."""

    async def read(self) -> bytes:
        """Return some bytes; none at the end."""

    def unread(self, data: bytes) -> None:
        """Put bytes back; they are read next."""

    async def write(self, data: bytes) -> None:
        """Send bytes, as fast as the other side takes them."""

    async def end(self) -> bool:
        """Send the end; return whether the other side can still send."""


class Guest(Stream, Protocol):
    """A guest's end of a byte stream."""

    async def linger(self) -> None:
        """Send the end, and drop what still comes for a while: the guest must get to read its answer."""


class GuestStream:
    """A guest's connection.

    Args:
        reader: What it sends.
        writer: What it gets.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ahead = b""
        self._ended = False
        self.touched = 0.0  # when bytes last moved, on the loop's clock

    async def read(self) -> bytes:
        """Return some bytes; none at the end."""
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
        """Put bytes back; they are read next."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, as fast as the guest takes them.

        Raises:
            GuestGone: It broke, or the end was sent before.
        """
        if self._ended:
            raise GuestGone
        self._writer.write(data)  # before anything is awaited: what GuestTls relies on
        try:
            await self._writer.drain()
        except OSError as error:
            raise GuestGone from error
        self.touched = asyncio.get_running_loop().time()

    async def end(self) -> bool:
        """Send the end; the guest can still send."""
        self._ended = True
        if self._writer.can_write_eof():
            self._writer.write_eof()
            return True
        return False

    async def linger(self) -> None:
        """Send the end, and drop what still comes for a while: the guest must get to read its answer."""

        async def drop() -> None:
            dropped = 0
            while dropped < _LINGER_BYTES and (data := await self.read()):
                dropped += len(data)

        if await self.end():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(drop(), _LINGER)

    async def close(self) -> None:
        """Close it when the guest has read everything, or does not for too long."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), _FLUSH)
        except (OSError, asyncio.TimeoutError):
            self.cut()

    def cut(self) -> None:
        """Close it at once, so that what was sent is not taken for whole; nothing happens if it is closed."""
        _abort(self._writer)


class ServerStream:
    """A connection to a server; what it moves is counted.

    Args:
        reader: What the server sends.
        writer: What it gets.
        meter: Counts it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: Meter) -> None:
        self._reader = reader
        self._writer = writer
        self._meter = meter
        self._ahead = b""
        self.sent_bytes = 0
        self.received_bytes = 0

    async def read(self) -> bytes:
        """Return some bytes; none at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        data = await self._reader.read(self._meter.chunk)
        self.received_bytes += len(data)
        await self._meter.move(len(data))
        return data

    def unread(self, data: bytes) -> None:
        """Put bytes back; they are read next."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, as fast as the server takes them and the bandwidth allows."""
        for start in range(0, len(data), self._meter.chunk):
            piece = data[start : start + self._meter.chunk]
            await self._meter.move(len(piece))
            self._writer.write(piece)
            self.sent_bytes += len(piece)
            await self._writer.drain()

    async def end(self) -> bool:
        """Send the end; with TLS the server cannot send any more then."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
            return True
        return False

    async def is_quiet(self) -> bool:
        """Tell whether the server has neither closed it nor sent what nobody asked for; else drop it."""
        if self._ahead or self._writer.is_closing():
            return False
        reading = asyncio.ensure_future(self._reader.read(1))
        try:
            await asyncio.sleep(0)  # what has come is read at once, the end too; nothing else is waited for
            return not reading.done()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def close(self) -> None:
        """Close it at once."""
        _abort(self._writer)


class GuestTls:
    """TLS with a guest, ended at the proxy: its plain text.

    Args:
        below: The guest's connection.
        context: The certificate to show.
    """

    def __init__(self, below: Guest, context: ssl.SSLContext) -> None:
        self._below = below
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ahead = b""

    async def handshake(self) -> None:
        """Agree on a key.

        Raises:
            GuestGone: The guest does not trust the certificate, or speaks no TLS.
        """
        await self._until_done(self._tls.do_handshake)

    async def read(self) -> bytes:
        """Return some bytes; none at the end."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            return await self._until_done(lambda: self._tls.read(CHUNK))
        except ssl.SSLZeroReturnError:
            return b""

    def unread(self, data: bytes) -> None:
        """Put bytes back; they are read next."""
        self._ahead = data + self._ahead

    async def write(self, data: bytes) -> None:
        """Send bytes, as fast as the guest takes them."""
        if data:
            self._tls.write(data)
            await self._flush()

    async def end(self) -> bool:
        """Send the end; nothing more can be read then."""
        with contextlib.suppress(ssl.SSLError):  # it wants the guest's end, too, which we do not wait for
            self._tls.unwrap()
        await self._flush()
        return False

    async def linger(self) -> None:
        """Send the end, and drop what still comes for a while: the guest must get to read its answer."""
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
        # Reading and writing may both be here; what is taken out first is also handed on first, because
        # the stream below takes it before it waits.
        if data := self._outgoing.read():
            await self._below.write(data)


def _abort(writer: asyncio.StreamWriter) -> None:
    # One that has sent the last of its buffer after close() must not be aborted: CPython's fails then.
    if not writer.is_closing() or writer.transport.get_write_buffer_size():
        writer.transport.abort()


async def copy(source: Stream, sink: Stream, change: Callable[[bytes], bytes] | None = None) -> None:
    """Carry bytes one way, to the end.

    Args:
        source: Where they come from.
        sink: Where they go.
        change: Applied to each piece, and at last to none, for what it held back.
    """
    while data := await source.read():
        await sink.write(change(data) if change else data)
    if change:
        await sink.write(change(b""))
    if not await sink.end():
        raise EOFError


async def relay(one: Stream, other: Stream, back: Callable[[bytes], bytes] | None = None) -> None:
    """Carry bytes both ways until both sides have ended, or one that cannot do so alone.

    Args:
        one: A stream.
        other: Another one.
        back: Applied to what goes from the other to the one.
    """
    with contextlib.suppress(EOFError):
        await together(copy(one, other), copy(other, one, back))


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """Do things at the same time; when one fails, so do all."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
