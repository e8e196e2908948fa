"""A machine's network on this computer, started when the guest sends data or the host connects into it."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from pytest_microvm.agent.link import GuestError
from pytest_microvm.agent.reactor import reactor
from pytest_microvm.errors import MachineCrashed, MachineError
from pytest_microvm.network.proxy.log import NetworkLog, NetworkRequest

if TYPE_CHECKING:
    import asyncio

    from pytest_microvm.network.port.forwarding import Address
    from pytest_microvm.network.port.streams import NetworkPort, Served

_ANSWER = 10.0  # seconds for the guest's network process to reply; it may have been killed
_END = 10.0  # seconds for served connections to end


class ConnectionServer(Protocol):
    """The server of a machine's connections: :class:`pytest_microvm.network.proxy.server.Proxy`."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""

    async def close(self) -> None:
        """End all connections and release resources."""


class MachineNetwork:
    """A machine's network: its logged requests, and access to servers in the guest.

    Args:
        sock: The socket of the guest's port ``network``, owned by the caller.
        proxy: Creates the server of the guest's connections; called at the guest's first connection.
        log: Records packets that the guest tried to send past the proxy.
        on_violation: Called when the guest violates the protocol.
    """

    def __init__(
        self,
        sock: socket.socket,
        proxy: Callable[[], ConnectionServer],
        log: NetworkLog,
        on_violation: Callable[[], None],
    ) -> None:
        self.log = log
        self._sock = sock
        self._make_proxy = proxy
        self._on_violation = on_violation
        self._proxy: ConnectionServer | None = None
        self._port: NetworkPort | None = None
        self._before = (0, 0)  # bytes received and sent by ports before the last rest()
        self._closed = False
        self._lock = threading.RLock()
        sock.setblocking(False)
        reactor().set(sock, selectors.EVENT_READ, self._spoke)

    @property
    def requests(self) -> list[NetworkRequest]:
        """The machine's last requests in order, up to 1000 allowed and 1000 denied ones."""
        self.settle()
        return self.log.list()

    @property
    def denied(self) -> list[NetworkRequest]:
        """The denied ones among :attr:`requests`."""
        return [request for request in self.requests if not request.allowed]

    def settle(self) -> None:
        """Process all data that the guest has sent so far, so that the log includes its latest attempts."""
        if self.silent:
            return
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        with contextlib.suppress(MachineError, TimeoutError):
            run(self._open().hear(), _ANSWER)

    @property
    def bytes_received(self) -> int:
        """Bytes received from the guest over this port."""
        return self._before[0] + (0 if self._port is None else self._port.bytes_received)

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to the guest over this port."""
        return self._before[1] + (0 if self._port is None else self._port.bytes_sent)

    @contextlib.contextmanager
    def forward(self, target: int | str, *, unix: bool = False, at: int = 0) -> Iterator[Address]:
        """Forward clients of this computer to a TCP port or Unix socket of the guest.

        Args:
            target: A TCP port of the guest's loopback, or the path of a Unix socket.
            unix: Whether to listen on a Unix socket, which only this user can reach, instead of a TCP port.
            at: The TCP port on this computer; 0: any free one.

        Raises:
            MachineCrashed: The machine has ended.
            OSError: Another program listens there.
        """
        from pytest_microvm.network.port.forwarding import forwarded  # noqa: PLC0415 - asyncio, once it is needed

        with forwarded(self._open(), target, unix=unix, at=at) as address:
            yield address

    @contextlib.contextmanager
    def forward_ports(self, targets: Iterable[int]) -> Iterator[str]:
        """Forward TCP ports of the guest under their own numbers; see :func:`forwarded_ports`.

        Raises:
            MachineCrashed: The machine has ended.
            OSError: Other programs listen there.
        """
        from pytest_microvm.network.port.forwarding import forwarded_ports  # noqa: PLC0415 - asyncio, once needed

        with forwarded_ports(self._open(), targets) as host:
            yield host

    def share(self, path: str, serve: Served, *, read_only: bool) -> int:
        """Mount a directory of this computer in the guest; see :meth:`NetworkPort.share`.

        Raises:
            GuestError: The guest cannot mount the directory.
            TimeoutError: The guest's network process did not reply.
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - asyncio, once it is needed

        return run(self._open().share(path, serve, read_only=read_only), _ANSWER)

    def unshare(self, number: int) -> None:
        """Unmount a directory mounted by :meth:`share`.

        Raises:
            TimeoutError: The guest's network process did not reply.
            MachineCrashed: The machine has ended.
        """
        from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - already loaded

        run(self._open().unshare(number), _ANSWER)

    def wait_for(self, target: int | str, timeout: float) -> None:
        """Wait until a server in the guest listens on a TCP port or Unix socket.

        Raises:
            TimeoutError: No server listened within ``timeout`` seconds.
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
        """Reset the guest's end to its initial state, if it was used, before the machine is frozen.

        Raises:
            TimeoutError: The guest did not reply within ``timeout`` seconds.
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
        """True if neither end has sent anything since the start or the last :meth:`rest`."""
        with self._lock:
            return self._port is None and not self._closed and not self._something_came()

    def close(self) -> None:
        """Drop all connections and listeners; call this before closing the socket. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            reactor().remove(self._sock)
            port, proxy = self._port, self._proxy
        if port is not None:
            from pytest_microvm.network.port.loop import run  # noqa: PLC0415 - already loaded

            with contextlib.suppress(TimeoutError):  # the machine has ended: do not wait for a slow server
                run(_finish(port, proxy), _END)

    def _spoke(self, _mask: int) -> None:
        """Handle the guest's first data or the machine's end, on the I/O thread."""
        with self._lock:
            if self._closed:
                return
            reactor().remove(self._sock)
            if self._port is None and self._something_came():
                # The first start takes long, so it must not block the I/O of other machines.
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
        """Return the port; create it if necessary."""
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


async def _finish(port: NetworkPort, proxy: ConnectionServer | None) -> None:
    await port.finish()
    if proxy is not None:
        await proxy.close()
