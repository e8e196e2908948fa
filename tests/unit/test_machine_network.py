"""A machine's network on the host: the guest's own process on the other end, or one that says anything."""

import asyncio
import contextlib
import gc
import json
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_microvm.errors import MachineCrashed, MachineError
from pytest_microvm.guest.network import NetworkProcess
from pytest_microvm.network.port import service as service_module
from pytest_microvm.network.port import streams as port_module
from pytest_microvm.network.port.forwarding import Address
from pytest_microvm.network.port.service import MachineNetwork
from pytest_microvm.network.proxy.log import NetworkLog
from pytest_microvm.wire.channel import Channel, Message
from pytest_microvm.wire.frames import Kind, encode
from pytest_microvm.wire.network import CONNECTIONS, WINDOW
from support import guards

RESET = struct.pack("ii", 1, 0)


class Echo:
    """In place of the proxy: says back what it hears."""

    def __init__(self):
        self.served = 0
        self.closed = False

    async def serve(self, reader, writer):
        self.served += 1
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def close(self):
        self.closed = True


class Machine:
    """A machine's network with the socket of its port; ended with the test."""

    def __init__(self, proxy=None):
        ours, self.sock = socket.socketpair()
        self._ours = ours
        self.log = NetworkLog()
        self.proxy = proxy or Echo()
        self.violated = threading.Event()
        self.network = MachineNetwork(ours, lambda: self.proxy, self.log, self.violated.set)

    def close(self):
        self.network.close()
        self._ours.close()
        self.sock.close()


class Guest(Machine):
    """One whose port leads to the guest's own process, run as a thread."""

    def __init__(self, proxy=None):
        super().__init__(proxy)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        self.process = NetworkProcess(self.sock.fileno(), self.listener)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        try:
            self.process.serve()
        except (EOFError, ConnectionError):
            pass
        finally:  # what the end of the process does
            for attempt in list(self.process.reaching):
                attempt.cancel()
            for sock in self.process._waiting.values():
                sock.close()
            for connection in [*self.process._connections.values(), *self.process._lingering]:
                connection.reset()
            self.process.loop._selector.close()

    def client(self):
        return socket.create_connection(self.listener.getsockname(), timeout=guards.PROCESS)

    def close(self):
        self.network.close()
        self._ours.close()
        self._thread.join(guards.PROCESS)
        assert not self._thread.is_alive()
        self.sock.close()
        self.listener.close()


@pytest.fixture
def guest():
    guest = Guest()
    yield guest
    guest.close()


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()


@contextlib.contextmanager
def server(handle, address=("127.0.0.1", 0)):
    """Serve each connection with ``handle(sock)`` on a thread of its own."""
    threads = []
    with socket.create_server(address, backlog=CONNECTIONS) as listener:

        def serve(sock):
            with sock, contextlib.suppress(OSError):
                sock.settimeout(guards.PROCESS)
                handle(sock)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threads.append(threading.Thread(target=serve, args=[sock], daemon=True))
                    threads[-1].start()

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(guards.PROCESS)
    for thread in threads:
        thread.join(guards.PROCESS)


def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)


def read_all(sock):
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def connect(address):
    return socket.create_connection((address.host, address.port), timeout=guards.PROCESS)


# From the guest


def test_nothing_begins_before_the_guest_speaks(machine):
    assert machine.network.silent
    assert machine.network._port is None
    assert (machine.network.bytes_received, machine.network.bytes_sent) == (0, 0)
    machine.network.rest()  # has nothing to do, and says nothing
    machine.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        machine.sock.recv(1)


def test_a_connection_is_served_and_counted(guest):
    with guest.client() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"hello"
    assert not guest.network.silent
    assert guest.network.bytes_received > 5 < guest.network.bytes_sent


def test_many_at_once_each_whole(guest):
    """A hundred connections of a megabyte, each way."""
    data = [bytes([number]) * (1 << 20) for number in range(100)]
    found = [b""] * len(data)

    def exchange(number):
        with guest.client() as client:
            sender = threading.Thread(target=send, args=[client, data[number]])
            sender.start()
            found[number] = read_all(client)
            sender.join(guards.PROCESS)

    def send(client, content):
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=exchange, args=[number]) for number in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [number for number, content in enumerate(found) if content != data[number]] == []
    assert guest.proxy.served == len(data)


class Deaf(Echo):
    """Reads nothing until it is told to."""

    def __init__(self):
        super().__init__()
        self.listen = threading.Event()

    async def serve(self, reader, writer):
        await asyncio.to_thread(self.listen.wait, guards.PROCESS)
        await super().serve(reader, writer)


def test_a_proxy_that_does_not_read_stops_the_client():
    guest = Guest(Deaf())
    try:
        with guest.client() as client:
            client.setblocking(False)
            sent, data = 0, os.urandom(1 << 16)
            idle = 0
            while idle < 20:
                try:
                    sent += client.send(data)
                    idle = 0
                except BlockingIOError:
                    idle += 1
                    time.sleep(0.01)  # the kernel offers nothing to wait for that says "no more"
            assert guest.network.bytes_received < 4 * WINDOW
            guest.proxy.listen.set()
            client.settimeout(guards.PROCESS)
            client.shutdown(socket.SHUT_WR)
            assert len(read_all(client)) == sent
    finally:
        guest.close()


class Flood(Echo):
    """Writes without an end; tells how much it got rid of."""

    def __init__(self):
        super().__init__()
        self.written = 0

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65536))
                await writer.drain()
                self.written += 65536


def test_a_client_that_does_not_read_stops_the_proxy():
    guest = Guest(Flood())
    try:
        with guest.client() as client:
            before = -1
            while guest.proxy.written != before or not before:
                before = guest.proxy.written
                time.sleep(0.2)
            assert before < 16 << 20  # the kernel's buffers, for the most part
            client.recv(1)
        with guest.client() as other:
            other.recv(1)  # others are served, and the first one's writer was told that it is gone
    finally:
        guest.close()


def test_a_proxy_that_ends_is_an_end_for_the_client(guest):
    class Short(Echo):
        async def serve(self, reader, writer):
            await reader.readline()
            writer.write(b"too large")

    guest.proxy = Short()
    with guest.client() as client:
        client.sendall(b"POST\n")
        for _ in range(20):
            client.sendall(bytes(50_000))
        assert read_all(client) == b"too large"


def test_a_proxy_that_aborts_is_an_error_for_the_client(guest):
    class Rude(Echo):
        async def serve(self, reader, writer):
            writer.write(b"only a par")
            await writer.drain()
            writer.transport.abort()

    guest.proxy = Rude()
    with pytest.raises(ConnectionResetError), guest.client() as client:  # even while it connects
        read_all(client)


def test_a_client_that_resets_is_an_error_for_the_proxy(guest):
    failures = []
    told = threading.Event()

    class Careful(Echo):
        async def serve(self, reader, writer):
            try:
                await reader.readexactly(100)
            except ConnectionError as error:
                failures.append(error)
                told.set()

    guest.proxy = Careful()
    client = guest.client()
    client.sendall(b"x")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    assert told.wait(guards.PROCESS)


def test_what_the_guest_sent_past_the_proxy_is_logged(machine):
    guest = Channel("network", WINDOW)
    attempts = [
        ("TCP", "1.2.3.4", 443, ""),
        ("DNS", "192.0.0.53", 53, "a.example"),
        ("IP/47", "2001:db8::2", 0, ""),
    ]
    for protocol, address, port, name in attempts:
        guest.send({"event": "packet", "protocol": protocol, "address": address, "port": port, "name": name})
    machine.sock.sendall(guest.take())
    guest.send({"event": "connect", "connection": 1})
    machine.sock.sendall(guest.take())
    machine.sock.settimeout(guards.PROCESS)
    next_message(guest, machine.sock)
    assert [(found.method, found.host, found.port) for found in machine.network.requests] == [
        ("TCP", "1.2.3.4", 443),
        ("DNS", "a.example", 53),
        ("IP/47", "2001:db8::2", 0),
    ]
    assert machine.network.denied == machine.network.requests
    assert {found.seen_by for found in machine.network.requests} == {"guest"}


# To the guest


def test_a_forwarded_port_carries_many_connections(guest):
    with server(echo) as port, guest.network.forward(port) as address:
        assert address.url == f"http://127.0.0.1:{address.port}"
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(address)) for _ in range(100)]
            for number, client in enumerate(clients):
                client.sendall(b"%d" % number)
                client.shutdown(socket.SHUT_WR)
            assert [read_all(client) for client in clients] == [b"%d" % number for number in range(100)]


def test_a_forwarded_port_carries_what_is_large_both_ways(guest):
    content = os.urandom(1 << 20) * 16

    def swap(sock):
        assert read_all(sock) == content
        sock.sendall(content)

    with server(swap) as port, guest.network.forward(port) as address, connect(address) as client:
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == content


def test_clients_beyond_the_limit_wait(guest, monkeypatch):
    monkeypatch.setattr(port_module, "CONNECTIONS", 3)
    with server(echo) as port, guest.network.forward(port) as address, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(5)]
        for client in clients:
            client.sendall(b"x")
        waiting = set(clients)
        while len(waiting) > 2:
            served = select.select(waiting, [], [], guards.PROCESS)[0]
            assert served
            waiting -= set(served)
        assert len(waiting) == 2
        assert select.select(waiting, [], [], 0.1)[0] == []
        for client in set(clients) - waiting:
            assert client.recv(1) == b"x"
            client.close()
        for client in waiting:
            assert client.recv(1) == b"x"


def test_forwarded_ports_keep_their_numbers_at_one_address(guest):
    with server(echo) as one, server(echo) as two, guest.network.forward_ports([one, two, one]) as host:
        assert host.startswith("127.")
        assert host != "127.0.0.1"  # where the servers themselves listen
        for port in (one, two):
            with connect(Address(host, port)) as client:
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        connect(Address(host, one))


def test_forwarded_ports_that_are_taken_at_all_addresses_are_an_error(guest):
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(OSError, match="Address already in use"), guest.network.forward_ports([taken]):
            pass


def test_unix_sockets_on_both_sides(guest, tmp_path):
    path = str(tmp_path / "daemon")
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(path)
        daemon.listen()
        with guest.network.forward(path, unix=True) as address:
            assert address.url == "http+unix://" + str(address.path).replace("/", "%2F")
            assert address.path.parent.stat().st_mode & 0o777 == 0o700
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(guards.PROCESS)
                client.connect(str(address))
                accepted, _ = daemon.accept()
                with accepted:
                    accepted.sendall(b"hello")
                assert read_all(client) == b"hello"
        assert not address.path.parent.exists()


def test_port_without_a_listener_resets_and_wait_for_times_out(guest):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with (
        guest.network.forward(port) as address,
        pytest.raises(ConnectionResetError),  # it may come as early as that: while connecting
        connect(address) as client,
    ):
        client.recv(1)
    with pytest.raises(TimeoutError, match=r"Connection refused, for 0.1 s"):
        guest.network.wait_for(port, 0.1)
    with server(echo, ("127.0.0.1", port)):
        guest.network.wait_for(port, guards.PROCESS)


def test_a_forwarding_ends_with_its_block(guest):
    with server(echo) as port:
        with guest.network.forward(port) as address:
            client = connect(address)
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(address)


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("how", ["closed here", "ended by itself"])
def test_everything_ends_with_the_machine(how):
    guest = Guest()
    before = descriptors()
    threads = {thread.name for thread in threading.enumerate()}
    with server(echo) as port, guest.network.forward(port) as address:
        clients = [connect(address) for _ in range(10)]
        clients.append(guest.client())
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        if how == "closed here":
            guest.network.close()
            guest._ours.close()
        else:
            guest.sock.shutdown(socket.SHUT_RDWR)
        for client in clients[:-1]:
            with client, pytest.raises(ConnectionResetError):
                client.recv(1)
        clients[-1].close()
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        with pytest.raises(MachineCrashed):
            guest.network.wait_for(port, guards.PROCESS)
    with pytest.raises(MachineCrashed), guest.network.forward(port):
        pass
    guest.close()
    assert guest.proxy.closed
    gc.collect()
    assert descriptors() <= before
    assert {thread.name for thread in threading.enumerate()} <= threads | {"microvm-io", "microvm-network"}


def test_a_guest_that_does_not_come_to_rest(machine):
    machine.sock.sendall(HELLO)
    with pytest.raises(TimeoutError, match=r"did not answer within 0.1 s"):
        machine.network.rest(0.1)


def test_a_guest_that_never_answers_a_wait(machine, monkeypatch):
    monkeypatch.setattr(service_module, "_ANSWER", 0.1)
    with pytest.raises(TimeoutError, match=r"network process did not answer"):
        machine.network.wait_for(80, 0.1)


def test_after_a_rest_both_ends_begin_anew(guest):
    with server(echo) as port, guest.network.forward(port) as address, connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        guest.network.rest(guards.PROCESS)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert guest.network.silent
    counted = guest.network.bytes_received
    with guest.client() as client:
        client.sendall(b"again")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"again"
    guest.network.settle()  # the bytes may have been quicker than the thread that began the port
    assert guest.network.bytes_received > counted


# A guest that says anything


def next_message(channel, sock):
    while True:
        for event in channel.receive(sock.recv(65536)):
            if isinstance(event, Message):
                return event.body


def test_connections_beyond_the_limit_are_refused(machine):
    guest = Channel("network", WINDOW)
    answers = []
    machine.sock.settimeout(guards.PROCESS)
    for number in range(1, CONNECTIONS + 11):
        guest.send({"event": "connect", "connection": number})
        machine.sock.sendall(guest.take())
    while len(answers) < CONNECTIONS + 10:
        events = guest.receive(machine.sock.recv(65536))
        answers += [event.body["op"] for event in events if isinstance(event, Message)]
    assert answers == ["accept"] * CONNECTIONS + ["refuse"] * 10


def test_a_guest_that_reads_nothing_is_not_heard_without_end(machine):
    """Else the answers to what it asks would fill the host's memory."""
    guest = Channel("network", WINDOW)
    guest.send({"event": "connect", "connection": 1})
    machine.sock.sendall(guest.take())
    asked = encode(Kind.MESSAGE, 0, b'{"event":"connect","connection":9}') * 1000
    machine.sock.settimeout(0.5)
    with pytest.raises(TimeoutError):
        machine.sock.sendall(asked * 1000)
    assert machine.network.bytes_received < 16 << 20
    assert not machine.violated.is_set()


def test_guest_that_reads_nothing_stays_bounded_while_polled(machine):
    machine.sock.setblocking(False)
    asked = bytearray(HELLO + encode(Kind.MESSAGE, 0, b'{"event":"connect","connection":9}') * 200_000)
    heard = []
    for _ in range(12):
        with contextlib.suppress(BlockingIOError):
            while asked:
                del asked[: machine.sock.send(asked)]
        assert machine.network.denied == []
        heard.append(machine.network.bytes_received)
    assert asked
    assert heard[-1] == heard[-4]


HELLO = Channel("network", WINDOW).take()


def said(body):
    return encode(Kind.MESSAGE, 0, json.dumps(body).encode())


PACKET = {"event": "packet", "protocol": "TCP", "address": "1.2.3.4", "port": 80, "name": ""}


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 16,
        said({"event": "connect", "connection": 1}),
        HELLO + HELLO,
        HELLO + said({}),
        HELLO + said({"event": "other"}),
        HELLO + said({"event": ["connect"]}),
        HELLO + said({"event": "connect"}),
        HELLO + said({"event": "connect", "connection": "1"}),
        HELLO + said({"event": "connect", "connection": True}),
        HELLO + said({"event": "reset"}),
        HELLO + said({"id": 5, "result": {}}),
        HELLO + said({"id": None}),
        HELLO + said({**PACKET, "protocol": "HTTP"}),
        HELLO + said({**PACKET, "protocol": 6}),
        HELLO + said({**PACKET, "address": "1" * 100}),
        HELLO + said({**PACKET, "port": 65536}),
        HELLO + said({**PACKET, "port": None}),
        HELLO + said({**PACKET, "name": "n" * 2000}),
        HELLO + said(PACKET) * 10_001,
        HELLO + encode(Kind.DATA, 1, b"x"),
        HELLO + encode(Kind.CLOSE, 1),
        HELLO + encode(Kind.MESSAGE, 0, b"not json"),
    ],
)
def test_a_guest_that_breaks_the_protocol_is_ended(machine, data):
    with contextlib.suppress(OSError):
        machine.sock.sendall(data)
    assert machine.violated.wait(guards.PROCESS)
    with pytest.raises(MachineError):
        machine.network.wait_for(80, 1)


def test_more_than_was_granted_ends_it_too(machine):
    machine.proxy = Deaf()
    guest = Channel("network", WINDOW)
    guest.send({"event": "connect", "connection": 1})
    machine.sock.sendall(guest.take())
    machine.sock.settimeout(guards.PROCESS)
    stream = next_message(guest, machine.sock)["stream"]
    machine.sock.setblocking(False)
    waits = bytearray(encode(Kind.DATA, stream, bytes(WINDOW)) * 9)
    while waits and not machine.violated.is_set():
        with contextlib.suppress(BlockingIOError):
            del waits[: machine.sock.send(waits)]
    assert machine.violated.wait(guards.PROCESS)
    machine.proxy.listen.set()


def credit(stream, size):
    return encode(Kind.CREDIT, stream, struct.pack("!I", size))


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "event": st.sampled_from(["connect", "packet", "reset", "x"]),
        "id": st.integers(-1, 3),
        "connection": st.integers(-1, 3),
        "stream": st.integers(-1, 9),
        "protocol": st.sampled_from(["TCP", "DNS", "\x1b", ""]),
        "address": st.text(max_size=70),
        "port": st.integers(-1, 70_000),
        "name": st.text(max_size=9),
        "error": st.none() | st.dictionaries(st.sampled_from(["type", "message"]), st.text(max_size=9)),
    },
)
FRAMES = st.one_of(
    BODIES.map(said),
    st.binary(max_size=30),
    st.builds(
        lambda kind, stream, data: encode(kind, stream, data if kind is Kind.DATA else b""),
        st.sampled_from([Kind.DATA, Kind.CLOSE]),
        st.integers(0, 9),
        st.binary(max_size=99),
    ),
    st.builds(credit, st.integers(0, 9), st.integers(0, 2**20)),
)


@settings(max_examples=3 * settings.default.max_examples)
@given(st.booleans(), st.lists(FRAMES, max_size=12))
def test_any_bytes_of_a_guest_end_it_or_are_harmless(greets, frames):
    machine = Machine()
    failures = []
    before, threading.excepthook = threading.excepthook, failures.append
    try:
        machine.sock.sendall((HELLO if greets else b"") + b"".join(frames))
        machine.sock.shutdown(socket.SHUT_WR)
        machine.sock.settimeout(guards.PROCESS)
        with contextlib.suppress(MachineError, OSError):
            machine.network.wait_for(1, 0.0)
    finally:
        machine.close()
        threading.excepthook = before
    assert failures == []
