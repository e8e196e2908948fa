"""A machine's network on this computer: nothing until the guest speaks, or somebody reaches into it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.agent.link import GuestError, reactor
from pytest_microvm.errors import MachineCrashed, MachineError
from pytest_microvm.network.proxy.log import NetworkLog, NetworkRequest

if TYPE_CHECKING:
    import asyncio

    from pytest_microvm.network.port.forwarding import Address
    from pytest_microvm.network.port.streams import NetworkPort, Served

_ANSWER = 10.0  # seconds for the guest's network process, which may have been killed
_END = 10.0  # seconds for what served connections to end


class Server(Protocol):
    """What serves a machine's connections: :class:`pytest_microvm.network.proxy.server.Proxy`."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""

    async def close(self) -> None:
        """Let go of everything."""


class MachineNetwork:
    """What a machine asks of the network, and how its servers are reached.

    Args:
        sock: The socket of the guest's port ``network``; it stays its owner's.
        proxy: Makes what serves the guest's connections; called when the guest makes its first.
        log: Takes note of what the guest tried to send past the proxy.
        on_violation: Called when the guest breaks the protocol.
    """

    def __init__(
        self,
        sock: socket.socket,
        proxy: Callable[[], Server],
        log: NetworkLog,
        on_violation: Callable[[], None],
    ) -> None:
        self.log = log
        self._sock = sock
        self._make_proxy = proxy
        self._on_violation = on_violation
        self._proxy: Server | None = None
        self._port: NetworkPort | None = None
        self._before = (0, 0)  # bytes received and sent by ports that have come to rest
        self._closed = False
        self._lock = threading.RLock()
        sock.setblocking(False)
        reactor().set(sock, selectors.EVENT_READ, self._spoke)

    @property
    def requests(self) -> list[NetworkRequest]:
        """What the machine asked for, in order: the last 1000."""
        self.settle()
        return self.log.list()

    @property
    def denied(self) -> list[NetworkRequest]:
        """Those of :attr:`requests` that were denied."""
        return [request for request in self.requests if not request.allowed]

    def settle(self) -> None:
        """Take in what the guest has said by now: what it just tried is in the log afterwards."""
        if self.silent:
            return
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        with contextlib.suppress(MachineError, TimeoutError):
            run(self._open().hear(), _ANSWER)

    @property
    def bytes_received(self) -> int:
        """What came from the guest over this port."""
        return self._before[0] + (0 if self._port is None else self._port.bytes_received)

    @property
    def bytes_sent(self) -> int:
        """What went to the guest over this port."""
        return self._before[1] + (0 if self._port is None else self._port.bytes_sent)

    @contextlib.contextmanager
    def forward(self, target: int | str, *, unix: bool = False) -> Iterator[Address]:
        """Let clients of this computer reach a TCP port or Unix socket of the guest.

        Args:
            target: A TCP port of the guest's loopback, or the path of a Unix socket.
            unix: Whether to listen on a Unix socket, which only this user can reach, instead of a TCP port.

        Raises:
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.forwarding import forwarded  # noqa: PLC0415 - asyncio, once it is needed

        with forwarded(self._open(), target, unix=unix) as address:
            yield address

    def share(self, path: str, serve: Served, *, read_only: bool) -> int:
        """Mount a directory of this computer in the guest; see :meth:`NetworkPort.share`.

        Raises:
            GuestError: The guest cannot mount it.
            TimeoutError: Its network process did not answer.
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        return run(self._open().share(path, serve, read_only=read_only), _ANSWER)

    def unshare(self, number: int) -> None:
        """Unmount what :meth:`share` has mounted.

        Raises:
            TimeoutError: The guest's network process did not answer.
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - it is there already

        run(self._open().unshare(number), _ANSWER)

    def wait_for(self, target: int | str, timeout: float) -> None:
        """Wait until somebody in the guest listens on a TCP port or Unix socket.

        Raises:
            TimeoutError: Nobody did within ``timeout`` seconds.
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        try:
            run(self._open().wait(target, timeout), timeout + _ANSWER)
        except GuestError as error:
            raise TimeoutError(f"{error.message}, for {timeout:g} s") from error
        except TimeoutError:
            raise TimeoutError(f"the machine's network process did not answer for {timeout:g} s") from None

    def rest(self, timeout: float = _ANSWER) -> None:
        """Bring the guest's end back to where it began, before the machine is frozen; if it was used at all.

        Raises:
            TimeoutError: The guest did not answer within ``timeout`` seconds.
            MachineCrashed: The machine has ended.
        """
        if self.silent:
            return
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        port = self._open()
        try:
            run(port.rest(), timeout)
        except TimeoutError:
            raise TimeoutError(f"its network process did not answer within {timeout:g} s") from None
        with self._lock:
            self._before = (self.bytes_received, self.bytes_sent)
            self._port = None
            if not self._closed:
                reactor().set(self._sock, selectors.EVENT_READ, self._spoke)

    @property
    def silent(self) -> bool:
        """Whether neither end has said anything, from the beginning or since the last rest."""
        with self._lock:
            return self._port is None and not self._closed and not self._something_came()

    def close(self) -> None:
        """Drop all connections and listeners, before the socket is closed; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            reactor().remove(self._sock)
            port, proxy = self._port, self._proxy
        if port is not None:
            from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - it is there already

            with contextlib.suppress(TimeoutError):  # the machine has ended; nobody waits for a slow server
                run(_finish(port, proxy), _END)

    def _spoke(self, _mask: int) -> None:
        """On the I/O thread: the guest said its first word, or the machine ended."""
        with self._lock:
            if self._closed:
                return
            reactor().remove(self._sock)
            if self._port is None and self._something_came():
                # What comes now takes long the first time: it must not stop the other machines' I/O.
                threading.Thread(target=self._begin, name="microvm-network-begin", daemon=True).start()

    def _begin(self) -> None:
        with contextlib.suppress(MachineError):
            self._open()

    def _something_came(self) -> bool:
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _open(self) -> NetworkPort:
        """Return the port, in use from now on."""
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed
        from pytest_microvm.network.port.streams import NetworkPort  # noqa: PLC0415

        async def begin() -> NetworkPort:
            return NetworkPort(self._sock, self._serve, self._packet, self._on_violation)

        with self._lock:
            if self._closed:
                raise MachineCrashed("the machine was ended")
            if self._port is None:
                reactor().remove(self._sock)
                self._port = run(begin())
            return self._port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._proxy is None:
            self._proxy = self._make_proxy()
        await self._proxy.serve(reader, writer)

    def _packet(self, protocol: str, address: str, port: int, name: str) -> None:
        self.log.add(
            NetworkRequest(
                at=time.time(),
                allowed=False,
                method=protocol,
                host=name or address,
                port=port,
                path="",
                rule=None,
                reason=f"sent {f'to {address} ' if name else ''}past the proxy, where nothing leads out",
                seen_by="guest",
            )
        )


async def _finish(port: NetworkPort, proxy: Server | None) -> None:
    await port.finish()
    if proxy is not None:
        await proxy.close()
