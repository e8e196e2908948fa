"""The network process of a machine: carries connections over the port ``network``, the only way out.

It is forked from the agent when the machine boots, so each template contains it asleep, and it costs a copy
nothing until first use. The guest's programs use it as their HTTP proxy on 127.0.0.1:3128; packets that
bypass it arrive at the device ``nowhere`` (see ``tun``). If it ends, the machine continues without a network.
``pytest_microvm.wire.network`` describes the messages.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest.connections import Connection, Reaching, whole_number
from pytest_microvm.guest.event_loop import READ, WRITE, EventLoop
from pytest_microvm.guest.packets import judge
from pytest_microvm.guest.port import PortReader
from pytest_microvm.guest.replies import reply, reply_error
from pytest_microvm.guest.share import Share
from pytest_microvm.wire.channel import Channel, Closed, Credit, Data, Message
from pytest_microvm.wire.frames import MAX_STREAM, WireError
from pytest_microvm.wire.network import CONNECTIONS, WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_SIZE = 65536
_HIGH = 256 * 1024  # bytes queued for the port above which sockets are no longer read
_LOW = 64 * 1024
_PACKETS = 32  # handled at a time, so that a flood of packets does not block connections
_MAX_TOLD = 1000  # distinct attempts, each reported once
_QUIET = 1.0  # seconds of silence after a rest, in which the machine is frozen


class NetworkProcess:
    """The network process: its connections and its port.

    Args:
        port: A descriptor of the port; made non-blocking.
        listener: The listening socket of the proxy.
        device: The device ``nowhere``, if there is one.
    """

    def __init__(self, port: int, listener: socket.socket, device: int | None = None) -> None:
        self.reaching: set[Reaching] = set()
        self.loop = EventLoop()
        self._port = port
        self._reader = PortReader(port)
        self._listener = listener
        self._device = device
        self._port_alone = selectors.PollSelector()
        self._quiet = False  # silent after a rest
        self._numbers = itertools.count(1)
        os.set_blocking(port, False)
        listener.setblocking(False)
        self._begin()
        self.loop.watch(port, READ, self._port_ready)
        self._port_alone.register(port, READ | WRITE)
        self._listen()

    def _begin(self) -> None:
        """Reset the channel and all connections to the initial state."""
        self.channel = Channel("network", WINDOW)
        self._full = False  # whether the port's queue is above its high-water mark
        self._spoke = False  # until the first message the hello stays in the channel
        self._resting = False  # whether the reply to a rest is still being sent
        self._waiting: dict[int, socket.socket] = {}
        self._connections: dict[int, Connection | Share] = {}
        self._lingering: set[Connection | Share] = set()
        self._told: set[Any] = set()

    def serve(self) -> None:
        """Carry connections until the host closes the port.

        Raises:
            EOFError: The host has closed it.
            WireError: The host broke the protocol.
        """
        while True:
            if self._full:  # first the port has to accept some of the queue
                self._port_alone.select(self.loop.timeout())
                self._receive()
            else:
                for ready, mask in self.loop.ready():
                    if not self._full:
                        ready(mask)
                        self._flush()
            self.loop.run_timers()
            self._flush()

    # For connections

    def forget(self, stream: int, connection: Connection | Share) -> None:
        """Drop a connection that has ended in the guest."""
        self._lingering.discard(connection)
        if self._connections.get(stream) is connection:
            del self._connections[stream]
            self._listen()

    def linger(self, stream: int, connection: Connection) -> None:
        """Keep a connection whose stream is closed until its pending bytes are written."""
        self.forget(stream, connection)
        self._lingering.add(connection)

    # The guest's programs

    def _listen(self) -> None:
        """Accept connections while there is room for them; others wait in the kernel."""
        room = len(self._waiting) + len(self._connections) < CONNECTIONS
        self.loop.watch(self._listener, READ if room and not self._quiet else 0, self._accept)
        if self._device is not None:
            self.loop.watch(self._device, 0 if self._quiet else READ, self._packets)

    def _accept(self, _mask: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:  # the client has already disconnected
            return
        sock.setblocking(False)
        number = next(self._numbers)
        self._waiting[number] = sock
        self.channel.send({"event": "connect", "connection": number})
        self._spoke = True
        self._listen()

    def _packets(self, _mask: int) -> None:
        assert self._device is not None
        for _ in range(_PACKETS):
            try:
                data = os.read(self._device, _READ_SIZE)
            except OSError:  # no more packets
                return
            attempt, answer = judge(data, socket.gethostname())
            if attempt is not None and attempt not in self._told and len(self._told) < _MAX_TOLD:
                self._told.add(attempt)
                self.channel.send({"event": "packet", **attempt._asdict()})
                self._spoke = True
                self._flush()  # the answer may end the test, after which the host checks its attempts
            if answer is not None:
                with contextlib.suppress(OSError):  # the device's queue is full
                    os.write(self._device, answer)

    # The port

    def _port_ready(self, mask: int) -> None:
        if mask & READ:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._reader.read()
        except BlockingIOError:
            return
        if not data:
            raise EOFError("the host closed the port")
        self._spoke = True
        for event in self.channel.receive(data):
            if isinstance(event, Message):
                self._answer(event.body)
                continue
            connection = self._connections.get(getattr(event, "stream", 0))
            if connection is None:  # it has ended in the guest, and the host does not know yet
                continue
            if isinstance(event, Data):
                connection.came(event.data)
            elif isinstance(event, Credit):
                connection.update()
            elif isinstance(event, Closed):
                connection.host_closed()

    def _answer(self, body: dict[str, Any]) -> None:
        number = body.get("id")
        try:
            _OPERATIONS[body["op"]](self, body)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if number is None:
                raise WireError(f"a message that makes no sense: {error!r}") from error
            reply_error(self.channel, number, error)

    def _take(self, body: dict[str, Any]) -> None:
        sock = self._waiting.pop(body["connection"])
        self._open(whole_number(body, "stream", MAX_STREAM), sock)

    def _refuse(self, body: dict[str, Any]) -> None:
        self._waiting.pop(body["connection"]).close()
        self._listen()

    def _connect(self, body: dict[str, Any]) -> None:
        stream = whole_number(body, "stream", MAX_STREAM)
        self._reach(body, lambda sock: self._open(stream, sock), again=False)

    def _wait(self, body: dict[str, Any]) -> None:
        self._reach(body, socket.socket.close, again=True)

    def _reach(self, body: dict[str, Any], use: Callable[[socket.socket], None], *, again: bool) -> None:
        """Connect to a server, hand the socket to ``use``, and reply."""
        self._check_path(body)

        def done(sock: socket.socket | None, error: OSError | None) -> None:
            if sock is None:
                reply_error(self.channel, body["id"], error)
            else:
                use(sock)
                reply(self.channel, body["id"], {})

        Reaching(self, body, done, again=again)

    def _check_path(self, body: dict[str, Any]) -> None:
        """Reject a Unix socket in a live mount: this process would wait for itself."""
        shares = [each for each in self._connections.values() if isinstance(each, Share)]
        if "path" in body and any(share.holds(body["path"]) for share in shares):
            raise ValueError("it is in a live mount, where no sockets are")

    def _share(self, body: dict[str, Any]) -> None:
        stream = whole_number(body, "stream", MAX_STREAM)
        try:
            share = Share(self, body["path"], stream, read_only=body["read_only"])
        except OSError as error:
            reply_error(self.channel, body["id"], error)
            return
        self.channel.open(stream)
        self._connections[stream] = share
        reply(self.channel, body["id"], {})
        share.update()

    def _unshare(self, body: dict[str, Any]) -> None:
        share = self._connections.get(body["stream"])
        if share is not None:  # otherwise the guest has unmounted it
            share.reset()
        reply(self.channel, body["id"], {})

    def _end(self, body: dict[str, Any]) -> None:
        connection = self._connections.get(body["stream"])
        if connection is not None:
            connection.end()

    def _reset(self, body: dict[str, Any]) -> None:
        connection = self._connections.get(body["stream"])
        if connection is not None:
            connection.reset()

    def _rest(self, body: dict[str, Any]) -> None:
        for attempt in list(self.reaching):
            attempt.cancel()
        for sock in self._waiting.values():
            sock.close()
        self._waiting.clear()
        for connection in [*self._connections.values(), *self._lingering]:
            connection.reset()
        self.loop.clear_timers()
        self._resting = self._quiet = True
        self._listen()
        reply(self.channel, body["id"], {})

    def _open(self, stream: int, sock: socket.socket) -> None:
        try:
            self.channel.open(stream)
        except ValueError as error:
            raise WireError(str(error)) from error
        with contextlib.suppress(OSError):  # not supported by Unix sockets
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[stream] = Connection(self, sock, stream)

    def _flush(self) -> None:
        """Write as much of the queue as the port accepts without blocking."""
        if not self._spoke:
            return
        empty = self.channel.flush(lambda data: os.write(self._port, data))
        self.loop.watch(self._port, READ if empty else READ | WRITE, self._port_ready)
        self._full = self.channel.queued > (_LOW if self._full else _HIGH)
        if self._resting and empty:
            self._begin()
            self.loop.later(_QUIET, self._wake)

    def _wake(self) -> None:
        self._quiet = False
        self._listen()


_OPERATIONS: dict[str, Callable[[NetworkProcess, dict[str, Any]], None]] = {
    "accept": NetworkProcess._take,
    "connect": NetworkProcess._connect,
    "end": NetworkProcess._end,
    "refuse": NetworkProcess._refuse,
    "reset": NetworkProcess._reset,
    "rest": NetworkProcess._rest,
    "share": NetworkProcess._share,
    "unshare": NetworkProcess._unshare,
    "wait": NetworkProcess._wait,
}
