"""Forward a port or Unix socket of a guest: a listener on this computer, one guest connection per client."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pytest_microvm.errors import MachineError
from pytest_microvm.network.port.loop import run

if TYPE_CHECKING:
    from pytest_microvm.network.port.streams import NetworkPort

LOOPBACK = "127.0.0.1"
_BACKLOG = 512
_PIECE = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # struct linger
_ADDRESS_TRIES = 4
_PATIENCE = 10.0  # seconds for cancelled tasks to end


@dataclass(frozen=True)
class Address:
    """The address of a forwarded port on this computer.

    Args:
        host: An address of the loopback; empty for a Unix socket.
        port: The TCP port; 0 for a Unix socket.
        path: The Unix socket; ``None`` for a TCP port.
    """

    host: str
    port: int
    path: Path | None = None

    @property
    def url(self) -> str:
        """``http://HOST:PORT``, or ``http+unix://PATH`` for a Unix socket, as in requests-unixsocket."""
        if self.path is not None:
            return f"http+unix://{quote(str(self.path), safe='')}"
        return f"http://{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}" if self.path is None else str(self.path)


@contextlib.contextmanager
def forwarded(
    port: NetworkPort, target: int | str, *, unix: bool, at: int = 0, host: str = LOOPBACK
) -> Iterator[Address]:
    """Forward clients of this computer to ``target`` in the guest until the block or the machine ends.

    Args:
        port: The guest's port.
        target: A TCP port of the guest's loopback, or the path of a Unix socket.
        unix: Whether to listen on a Unix socket that only this user can reach, instead of a TCP port.
        at: The TCP port on this computer; 0: any free one.
        host: The address to listen at, of this computer's loopback.

    Raises:
        OSError: Another program listens there.
    """
    with contextlib.ExitStack() as stack:
        if unix:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="microvm-"))  # mode 0700
            address = Address("", 0, Path(folder) / "socket")
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(address.path))
        else:
            listener = stack.enter_context(socket.create_server((host, at)))
            address = Address(host, listener.getsockname()[1])
        listener.listen(_BACKLOG)
        forwarding = run(_forward(port, target, listener))
        stack.callback(lambda: run(forwarding.close(), _PATIENCE))
        yield address


@contextlib.contextmanager
def forwarded_ports(port: NetworkPort, targets: Iterable[int]) -> Iterator[str]:
    """Forward clients to several TCP ports of the guest, each under its own number.

    They listen at one address of this computer's loopback (127.0.0.0/8), at which all these ports are free.

    Args:
        port: The guest's port.
        targets: TCP ports of the guest's loopback.

    Raises:
        OSError: Other programs listen on one of the ports, at all addresses.
    """
    ports = sorted(set(targets))
    with contextlib.ExitStack() as stack:
        for tries_left in reversed(range(_ADDRESS_TRIES)):
            host = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"
            try:
                with contextlib.ExitStack() as listening:
                    for one in ports:
                        listening.enter_context(forwarded(port, one, unix=False, at=one, host=host))
                    stack.push(listening.pop_all())
                    break
            except OSError:
                if not tries_left:
                    raise
        yield host


async def _forward(port: NetworkPort, target: int | str, listener: socket.socket) -> Listener:
    forwarding = Listener(port, target)
    await forwarding.listen(listener)
    return forwarding


class Listener:
    """A listener and its client connections; runs on the network loop."""

    def __init__(self, port: NetworkPort, target: int | str) -> None:
        self._port = port
        self._target = target
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket) -> None:
        """Start to accept clients on ``listener``, which this object now owns."""
        if self._port.failure is not None:
            raise self._port.failure
        self._port.forwardings.add(self)
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        self._server = await start(self._serve, sock=listener, backlog=_BACKLOG)

    def stop(self) -> None:
        """Stop accepting clients and drop the connected ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Stop, and wait until all client connections have ended."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._port.forwardings.discard(self)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with self._port.connect(self._target) as (guest_reader, guest_writer):
                await _carry((reader, guest_writer), (guest_reader, writer))
        except (MachineError, OSError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Drop a client with RST, so that it does not take a truncated response for a complete one."""
    with contextlib.suppress(OSError):  # the client has already disconnected
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


async def _carry(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Copy bytes in both directions until both have ended; if one fails, cancel the other."""
    tasks = [asyncio.ensure_future(_copy(reader, writer)) for reader, writer in ways]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
