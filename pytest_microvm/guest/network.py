"""The network process of a machine: carries connections over the port ``network``, the only way out.

It is forked from the agent when the machine boots, so each template holds it asleep, and a copy pays for it
only once it is used. The guest's programs find it as their HTTP proxy on 127.0.0.1:3128; what they send past
it comes out of the device ``nowhere`` (see ``tun``). If it ends, the machine goes on without a network. The
messages are told in ``pytest_microvm.wire.network``.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import os
import resource
import select
import selectors
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from pytest_microvm.guest import tun
from pytest_microvm.guest.connections import READ, WRITE, Connection, Reaching, whole_number
from pytest_microvm.guest.packets import judge
from pytest_microvm.guest.port import Reader, open_port
from pytest_microvm.guest.share import Share
from pytest_microvm.wire.channel import Channel, Closed, Credit, Data, Message
from pytest_microvm.wire.frames import MAX_STREAM, WireError
from pytest_microvm.wire.network import CONNECTIONS, PORT, WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_SIZE = 65536
_HIGH = 256 * 1024  # bytes that wait for the port; above it nothing more is read from sockets
_LOW = 64 * 1024
_PACKETS = 32  # at a time, so that a flood of them does not stop connections
_MAX_TOLD = 1000  # attempts, of which each kind is told once
_FILES = 4096
_QUIET = 1.0  # seconds after a rest; the machine is frozen in them


class Network:
    """The process's state.

    Args:
        port: A descriptor of the port; not blocking from here on.
        listener: Where programs connect to.
        device: The device that leads nowhere, if there is one.
    """

    def __init__(self, port: int, listener: socket.socket, device: int | None = None) -> None:
        self.reaching: set[Reaching] = set()
        self._port = port
        self._reader = Reader(port)
        self._listener = listener
        self._device = device
        self._selector = selectors.DefaultSelector()
        self._port_alone = select.poll()
        self._quiet = False  # since a rest
        self._timers: list[list[Any]] = []
        self._numbers = itertools.count(1)
        os.set_blocking(port, False)
        listener.setblocking(False)
        self._begin()
        self._selector.register(port, READ, self._port_ready)
        self._port_alone.register(port, select.POLLIN | select.POLLOUT)
        self._listen()

    def _begin(self) -> None:
        """Be as if nothing had ever been said."""
        self.channel = Channel("network", WINDOW)
        self._out = bytearray()
        self._full = False  # whether so much waits for the port that nothing is to be added
        self._spoke = False  # until then the hello stays in the channel
        self._resting = False  # whether the answer to a rest is under way
        self._waiting: dict[int, socket.socket] = {}
        self._connections: dict[int, Connection | Share] = {}
        self._lingering: set[Connection | Share] = set()
        self._told: set[Any] = set()

    def serve(self) -> None:
        """Carry connections until the host closes the port.

        Raises:
            EOFError: It did.
            WireError: The host broke the protocol.
        """
        while True:
            if self._full:  # nothing else can be done before the port takes some of it
                self._port_alone.poll(self._patience())
                self._receive()
            else:
                for key, mask in self._selector.select(self._patience()):
                    # One before it may have dropped it, and the number may already be another file's.
                    if self._selector.get_map().get(key.fd) is key and not self._full:
                        key.data(mask)
                        self._flush()
            self._run_timers()
            self._flush()

    # For connections

    def watch(self, file: socket.socket | int, events: int, ready: Callable[[int], None]) -> None:
        """Call ``ready`` when ``file`` has one of ``events``; 0: forget it."""
        number = file if isinstance(file, int) else file.fileno()
        known = self._selector.get_map().get(number) if number >= 0 else None
        if known is None:
            if events:
                self._selector.register(file, events, ready)
        elif not events:
            self._selector.unregister(file)
        elif known.events != events:
            self._selector.modify(file, events, ready)

    def forget(self, stream: int, connection: Connection | Share) -> None:
        """Drop a connection that has ended here."""
        self._lingering.discard(connection)
        if self._connections.get(stream) is connection:
            del self._connections[stream]
            self._listen()

    def linger(self, stream: int, connection: Connection) -> None:
        """Keep a connection that has something left to say, but no stream any more."""
        self.forget(stream, connection)
        self._lingering.add(connection)

    def later(self, seconds: float, call: Callable[[], None]) -> list[Any]:
        """Call ``call`` in so many seconds; return what :meth:`never` takes."""
        timer = [time.monotonic() + seconds, next(self._numbers), call]
        heapq.heappush(self._timers, timer)
        return timer

    def never(self, timer: list[Any] | None) -> None:
        """Take back what :meth:`later` was told."""
        if timer is not None:
            timer[2] = None

    # The guest's programs

    def _listen(self) -> None:
        """Take connections as long as there is room for them; others wait in the kernel."""
        room = len(self._waiting) + len(self._connections) < CONNECTIONS
        self.watch(self._listener, READ if room and not self._quiet else 0, self._accept)
        if self._device is not None:
            self.watch(self._device, 0 if self._quiet else READ, self._packets)

    def _accept(self, _mask: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:  # it has gone already
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
            except OSError:  # no more
                return
            attempt, answer = judge(data, socket.gethostname())
            if attempt is not None and attempt not in self._told and len(self._told) < _MAX_TOLD:
                self._told.add(attempt)
                self.channel.send({"event": "packet", **attempt._asdict()})
                self._spoke = True
                self._flush()  # the answer may end the test, after which the host looks at what it tried
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
            if connection is None:  # it has ended here, and the host does not know yet
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
            self._reply_error(number, error)

    def _take(self, body: dict[str, Any]) -> None:
        sock = self._waiting.pop(body["connection"])
        self._open(whole_number(body, "stream", MAX_STREAM), sock)

    def _refuse(self, body: dict[str, Any]) -> None:
        self._waiting.pop(body["connection"]).close()
        self._listen()

    def _connect(self, body: dict[str, Any]) -> None:
        stream = whole_number(body, "stream", MAX_STREAM)
        self._check_path(body)

        def done(sock: socket.socket | None, error: OSError | None) -> None:
            if sock is None:
                self._reply_error(body["id"], error)
                return
            self._open(stream, sock)
            self.channel.send({"id": body["id"], "result": {}})

        Reaching(self, body, done, again=False)

    def _wait(self, body: dict[str, Any]) -> None:
        self._check_path(body)

        def done(sock: socket.socket | None, error: OSError | None) -> None:
            if sock is None:
                self._reply_error(body["id"], error)
                return
            sock.close()
            self.channel.send({"id": body["id"], "result": {}})

        Reaching(self, body, done, again=True)

    def _check_path(self, body: dict[str, Any]) -> None:
        """Refuse a Unix socket in a live mount: this process would wait for itself."""
        shares = [each for each in self._connections.values() if isinstance(each, Share)]
        if "path" in body and any(share.holds(body["path"]) for share in shares):
            raise ValueError("it is in a live mount, where no sockets are")

    def _share(self, body: dict[str, Any]) -> None:
        stream = whole_number(body, "stream", MAX_STREAM)
        try:
            share = Share(self, body["path"], stream, read_only=body["read_only"])
        except OSError as error:
            self._reply_error(body["id"], error)
            return
        self.channel.open(stream)
        self._connections[stream] = share
        self.channel.send({"id": body["id"], "result": {}})
        share.update()

    def _unshare(self, body: dict[str, Any]) -> None:
        share = self._connections.get(body["stream"])
        if share is not None:  # else somebody has unmounted it here
            share.reset()
        self.channel.send({"id": body["id"], "result": {}})

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
        self._timers.clear()
        self._resting = self._quiet = True
        self._listen()
        self.channel.send({"id": body["id"], "result": {}})

    def _open(self, stream: int, sock: socket.socket) -> None:
        try:
            self.channel.open(stream)
        except ValueError as error:
            raise WireError(str(error)) from error
        with contextlib.suppress(OSError):  # a Unix socket has no such thing
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[stream] = Connection(self, sock, stream)

    def _reply_error(self, number: int, error: BaseException | None) -> None:
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        told = {
            "type": type(error).__name__,
            "message": message[:1000],
            "errno": getattr(error, "errno", 0) or 0,
        }
        self.channel.send({"id": number, "error": told})

    def _flush(self) -> None:
        """Write what the port takes now."""
        if not self._spoke:
            return
        self._out += self.channel.take()
        try:
            while self._out:
                del self._out[: os.write(self._port, memoryview(self._out)[:_READ_SIZE])]
        except BlockingIOError:
            pass
        self.watch(self._port, READ | WRITE if self._out else READ, self._port_ready)
        self._full = len(self._out) > (_LOW if self._full else _HIGH)
        if self._resting and not self._out:
            self._begin()
            self.later(_QUIET, self._wake)

    # Time

    def _wake(self) -> None:
        self._quiet = False
        self._listen()

    def _patience(self) -> float | None:
        while self._timers and self._timers[0][2] is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            call = heapq.heappop(self._timers)[2]
            if call is not None:
                call()


_OPERATIONS: dict[str, Callable[[Network, dict[str, Any]], None]] = {
    "accept": Network._take,
    "connect": Network._connect,
    "end": Network._end,
    "refuse": Network._refuse,
    "reset": Network._reset,
    "rest": Network._rest,
    "share": Network._share,
    "unshare": Network._unshare,
    "wait": Network._wait,
}


def listen() -> socket.socket:
    """Return the socket that programs find their proxy on."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(CONNECTIONS)
    return listener


def start() -> None:
    """Fork the process and wait until it sleeps: no template may hold it while it still begins."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        return
    try:
        _leave_agent(writing)
        port = open_port("network")
        device = tun.open_device()
        if device is not None:
            tun.name_resolver()
        network = Network(port, listen(), device)
        os.close(writing)
        network.serve()
    except EOFError:
        pass
    except BaseException:  # noqa: BLE001 - a copy of PID 1 must not return; the console is told
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def _leave_agent(keep: int) -> None:
    """Let go of what belongs to the agent."""
    gc.freeze()  # its objects' pages stay shared
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.closerange(3, keep)
    os.closerange(keep + 1, 256)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_FILES, hard), hard))
    for name, text in (("comm", "microvm-network"), ("oom_score_adj", "-1000")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
