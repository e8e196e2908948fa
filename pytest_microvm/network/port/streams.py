"""The host's end of a guest's port ``network``: streams to the proxy, and to servers in the guest.

All code here runs on the thread of :mod:`pytest_microvm.network.port.loop`. The guest is not trusted:
connections, bytes and messages are limited, and a protocol violation ends the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.port_socket import receive, send_queued
from pytest_microvm.errors import MachineCrashed, MachineError
from pytest_microvm.network.port.requests import NetworkRequests
from pytest_microvm.network.port.stream import StreamTransport, connect_streams
from pytest_microvm.wire.channel import MAX_STREAMS, Channel, Closed, Credit, Data, Message
from pytest_microvm.wire.fields import is_whole, number_field
from pytest_microvm.wire.frames import WireError
from pytest_microvm.wire.network import CONNECTIONS, WINDOW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_HIGH = 512 * 1024  # bytes buffered for the socket above which streams and reading pause
_LOW = 128 * 1024
_HEARD_AT_ONCE = 64  # reads per hear(); a guest may keep the socket full
_READER = 32 * 1024
_MAX_PACKETS = 10_000  # reports of packets; a well-behaved guest sends a tenth
_MAX_ADDRESS = 64
_MAX_NAME = 1100  # 255 bytes, each written as \ddd at most
Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Coroutine function that serves one stream until it ends."""

_PROTOCOL = re.compile(r"TCP|UDP|ICMP|DNS|IP/[0-9]{1,3}")


class Forwarding(Protocol):
    """A listener on this computer that forwards its clients through a port."""

    def stop(self) -> None:
        """Stop accepting clients and drop the connected ones."""

    async def close(self) -> None:
        """Stop, and wait until all client connections have ended."""


class NetworkPort:
    """The connections of one guest.

    Args:
        sock: The port's socket, owned by the caller.
        serve: Serves a connection of the guest until it ends.
        packet: Called for each packet that tried to bypass the proxy, with protocol, address, port and name
            (untrusted).
        on_violation: Called when the guest violates the protocol.
    """

    def __init__(
        self,
        sock: socket.socket,
        serve: Served,
        packet: Callable[[str, str, int, str], None],
        on_violation: Callable[[], None],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.full = False
        self.bytes_received = 0
        self.bytes_sent = 0
        self.failure: MachineError | None = None
        self._sock = sock
        self._serve = serve
        self._packet = packet
        self._on_violation = on_violation
        self._channel = Channel("host", WINDOW)
        self._flushes = False  # whether a flush is scheduled
        self._resting = False
        self._streams: dict[int, StreamTransport] = {}
        self._of_guest: set[int] = set()  # streams to the proxy, until both ends have closed
        self._requests = NetworkRequests(self._send)
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reaching = asyncio.Semaphore(CONNECTIONS)
        self._packets = 0
        self.forwardings: set[Forwarding] = set()
        self.loop.add_reader(sock, self._readable)

    # Operations on the guest

    @contextlib.asynccontextmanager
    async def connect(
        self, target: int | str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect to a TCP port or Unix socket path in the guest; yield a reader and a writer.

        Raises:
            GuestError: No server listens there.
            MachineError: The machine has ended.
        """
        async with self._reaching:
            stream = await self._reach(op="connect", **_target(target))
            reader, writer = connect_streams(stream, self.loop, _READER)
            try:
                yield reader, writer
            except BaseException:
                writer.transport.abort()
                raise
            finally:
                writer.close()

    async def share(self, path: str, serve: Served, *, read_only: bool) -> int:
        """Mount a directory of this computer in the guest, until the machine ends or :meth:`unshare`.

        Args:
            path: The mount point: an empty directory of the guest.
            serve: Serves the requests of the guest's kernel until the stream ends.
            read_only: Whether the guest's kernel rejects changes by itself.

        Returns:
            The number to pass to :meth:`unshare`.

        Raises:
            GuestError: The guest cannot mount the directory there.
            MachineError: The machine has ended.
        """
        stream = await self._reach(op="share", path=path, read_only=read_only)
        self._serve_stream(stream, serve)
        return stream.number

    async def unshare(self, number: int) -> None:
        """Unmount a directory mounted by :meth:`share`.

        Raises:
            MachineError: The machine has ended.
        """
        await self._ask(op="unshare", stream=number)

    async def wait(self, target: int | str, timeout: float) -> None:
        """Wait until a server in the guest listens on a TCP port or Unix socket.

        Raises:
            GuestError: No server listened within ``timeout`` seconds.
            MachineError: The machine has ended.
        """
        await self._ask(op="wait", timeout=timeout, **_target(target))

    async def hear(self) -> None:
        """Process the data that the guest has sent so far."""
        for _ in range(_HEARD_AT_ONCE):
            before = self.bytes_received
            if self.failure is None and not self.full:
                self._readable()
            if self.bytes_received == before:
                return
            await asyncio.sleep(0)

    async def rest(self) -> None:
        """Reset the guest's end to its initial state, and close this end.

        Raises:
            MachineError: The machine has ended.
        """
        self._resting = True
        await self._end_tasks()
        for stream in list(self._streams.values()):
            self.drop(stream.number)
            stream.lose(ConnectionResetError("the machine is being frozen"))
        self._requests.fail(MachineError("the machine is being frozen"))
        await self._ask(op="rest")
        self.close(MachineCrashed("the machine is at rest"))

    async def finish(self) -> None:
        """Drop all connections, and wait until their servers have ended."""
        self.close(MachineCrashed("the machine was ended"))
        await self._end_tasks()
        for forwarding in list(self.forwardings):
            await forwarding.close()

    def close(self, failure: MachineError) -> None:
        """Stop reading and writing and drop all connections; the socket stays open."""
        if self.failure is not None:
            return
        self.failure = failure
        self.loop.remove_reader(self._sock)
        self.loop.remove_writer(self._sock)
        self._channel.take()
        for stream in list(self._streams.values()):
            stream.lose(ConnectionResetError(str(failure)))
        self._streams.clear()
        self._requests.fail(failure)
        for forwarding in list(self.forwardings):
            forwarding.stop()

    # Called by streams

    def write(self, number: int, data: bytes) -> int:
        """Queue as much of ``data`` as the guest's credit allows; return the number of bytes."""
        room = self._channel.room(number)
        sent = self._channel.write(number, data) if room else 0
        self._flush_soon()
        return sent

    def consumed(self, number: int, size: int) -> None:
        """Grant the guest credit for consumed bytes."""
        self._channel.consumed(number, size)
        self._flush_soon()

    def close_stream(self, number: int, *, end: bool) -> None:
        """Close the sending direction of a stream; with ``end``, the receiving one, too."""
        self._channel.close(number)
        if end:
            if self._channel.is_open(number):
                self._channel.send({"op": "end", "stream": number})
            self._streams.pop(number, None)
        self._retire(number)
        self._flush_soon()

    def drop(self, number: int) -> None:
        """Reset a stream on both sides."""
        if self._channel.is_open(number):  # sent first: after CLOSE the program would see a regular end
            self._channel.send({"op": "reset", "stream": number})
        self._channel.close(number)
        self._streams.pop(number, None)
        self._retire(number)
        self._flush_soon()

    # The socket

    def _readable(self) -> None:
        try:
            data = receive(self._sock)
            self.bytes_received += len(data)
            for event in self._channel.receive(data):
                self._handle(event)
        except MachineCrashed as failure:
            self.close(failure)
            return
        except WireError:
            self.close(MachineCrashed("the machine was ended: its network process broke the protocol"))
            self._on_violation()
            return
        self._flush()

    def _flush_soon(self) -> None:
        if not self._flushes and self.failure is None:
            self._flushes = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushes = False
        if self.failure is not None:
            return
        self.bytes_sent += send_queued(self._sock, self._channel)
        if self._channel.queued:
            self.loop.add_writer(self._sock, self._flush)
        else:
            self.loop.remove_writer(self._sock)
        full = self._channel.queued > (_LOW if self.full else _HIGH)
        if full != self.full:
            self.full = full
            if full:
                self.loop.remove_reader(self._sock)
            else:
                self.loop.add_reader(self._sock, self._readable)
                for stream in list(self._streams.values()):
                    if stream.waits:
                        stream.pump()

    # Incoming events

    def _handle(self, event: object) -> None:
        if isinstance(event, Message):
            self._message(event.body)
            return
        stream = self._streams.get(getattr(event, "stream", 0))
        if isinstance(event, Closed):
            self._retire(event.stream)
        if stream is None:  # dropped here, which the guest does not know yet
            return
        if isinstance(event, Data):
            stream.came(event.data)
        elif isinstance(event, Credit):
            stream.pump()
        elif isinstance(event, Closed):
            stream.end()

    def _message(self, body: dict[str, Any]) -> None:
        kind = body.get("event")
        if kind == "connect":
            self._take(number_field(body, "connection"))
        elif kind == "packet":
            self._report(body)
        elif kind == "reset":
            stream = self._streams.get(number_field(body, "stream"))
            if stream is not None:
                self.drop(stream.number)
                stream.lose(ConnectionResetError("the guest's program dropped the connection"))
        elif kind is None:
            self._requests.answered(body)
        else:
            raise WireError("an event of an unknown kind")

    def _take(self, connection: int) -> None:
        if self._resting:  # the guest drops the connection
            return
        if len(self._of_guest) >= CONNECTIONS or self._channel.open_streams >= MAX_STREAMS:
            self._channel.send({"op": "refuse", "connection": connection})
            return
        stream = self._open()
        self._of_guest.add(stream.number)
        self._channel.send({"op": "accept", "connection": connection, "stream": stream.number})
        self._serve_stream(stream, self._serve)

    def _serve_stream(self, stream: StreamTransport, serve: Served) -> None:
        task = self.loop.create_task(_serve_until_end(serve, *connect_streams(stream, self.loop, _READER)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _report(self, body: dict[str, Any]) -> None:
        self._packets += 1
        if self._packets > _MAX_PACKETS:
            raise WireError("too many reports of packets")
        protocol, address, port, name = (body.get(key) for key in ("protocol", "address", "port", "name"))
        if not (
            isinstance(protocol, str) and _PROTOCOL.fullmatch(protocol)
            and isinstance(address, str) and len(address) <= _MAX_ADDRESS
            and is_whole(port, 0, 65535)
            and isinstance(name, str) and len(name) <= _MAX_NAME
        ):  # fmt: skip
            raise WireError("a report of a packet that makes no sense")
        self._packet(protocol, address, port, name)

    # Bookkeeping

    async def _reach(self, **body: Any) -> StreamTransport:
        """Open a stream and request the guest to connect it as ``body`` says; return the stream."""
        stream = self._open()
        asked = self.loop.create_task(self._ask(stream=stream.number, **body))
        try:
            await asyncio.shield(asked)
        except asyncio.CancelledError:  # the guest may still accept
            asked.add_done_callback(lambda done: self._reached_too_late(stream, done))
            raise
        except GuestError:
            self._unopened(stream)
            raise
        return stream

    def _open(self) -> StreamTransport:
        if self._channel.open_streams >= MAX_STREAMS:
            raise MachineError(f"{MAX_STREAMS} connections are open; the guest may not have closed its ends")
        number = next(self._numbers)
        self._channel.open(number)
        stream = self._streams[number] = StreamTransport(self, number)
        return stream

    def _unopened(self, stream: StreamTransport) -> None:
        """Drop a stream that the guest never accepted."""
        self._streams.pop(stream.number, None)
        self._channel.forget(stream.number)

    def _reached_too_late(self, stream: StreamTransport, asked: asyncio.Task[None]) -> None:
        if asked.cancelled() or asked.exception() is not None:
            self._unopened(stream)
        else:
            stream.abort()

    async def _ask(self, **body: Any) -> None:
        if self.failure is not None:
            raise self.failure
        await self._requests.ask(**body)

    def _send(self, body: dict[str, Any]) -> None:
        self._channel.send(body)
        self._flush_soon()

    def _retire(self, number: int) -> None:
        if not self._channel.is_open(number):
            self._of_guest.discard(number)

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_until_end(serve: Served, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await serve(reader, writer)
    finally:
        writer.close()


def _target(target: int | str) -> dict[str, Any]:
    return {"port": target} if isinstance(target, int) else {"path": target}
