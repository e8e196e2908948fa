"""The guest's network process over a socket: its own loop and sockets, and a host that says what it likes."""

import contextlib
import os
import socket
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_microvm.guest import network as network_module
from pytest_microvm.guest.network import NetworkProcess
from pytest_microvm.wire.channel import Channel, Closed, Data, Message
from pytest_microvm.wire.frames import Kind, WireError, encode
from pytest_microvm.wire.network import CONNECTIONS, WINDOW
from support import guards

RESET = struct.pack("ii", 1, 0)


class Guest:
    """The process as a thread, and the host's end of its port, driven step by step."""

    def __init__(self):
        self.sock, self._theirs = socket.socketpair()
        self.sock.settimeout(guards.PROCESS)
        self.channel = Channel("host", WINDOW)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
        self.events = []
        self.end = None
        self.network = NetworkProcess(self._theirs.fileno(), self.listener)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        try:
            self.network.serve()
        except (EOFError, WireError, ConnectionError) as error:  # the last is none of a real port
            self.end = error
        finally:  # what the end of the process does
            network = self.network
            for attempt in list(network.reaching):
                attempt.cancel()
            for sock in network._waiting.values():
                sock.close()
            for connection in [*network._connections.values(), *network._lingering]:
                connection.reset()
            network.loop._selector.close()

    def close(self):
        self.sock.close()
        self.joined()
        self._theirs.close()
        self.listener.close()

    def joined(self):
        self._thread.join(guards.PROCESS)
        assert not self._thread.is_alive()
        return self.end

    def send(self, **body):
        self.channel.send(body)
        self.flush()

    def flush(self):
        self.sock.sendall(self.channel.take())

    def next(self, kind):
        """Return the next event of ``kind``; those before it are dropped, bytes are granted again."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if isinstance(event, Data):
                    self.channel.consumed(event.stream, len(event.data))
                if isinstance(event, kind):
                    return event
            self.flush()
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.events += list(self.channel.receive(data))

    def client(self):
        return socket.create_connection(self.listener.getsockname(), timeout=guards.PROCESS)

    def accept(self, stream):
        body = self.next(Message).body
        assert body["event"] == "connect"
        self.channel.open(stream)
        self.send(op="accept", connection=body["connection"], stream=stream)

    def answer(self):
        return self.next(Message).body

    def read(self, stream, size):
        found = b""
        while len(found) < size:
            event = self.next(Data)
            assert event.stream == stream
            found += event.data
        return found


@pytest.fixture
def guest():
    guest = Guest()
    yield guest
    guest.close()


@contextlib.contextmanager
def server():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(guards.PROCESS)
        yield listener, listener.getsockname()[1]


def test_nothing_is_said_before_there_is_something_to_say(guest):
    guest.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        guest.sock.recv(1)
    guest.sock.settimeout(guards.PROCESS)
    with guest.client():
        assert guest.answer() == {"event": "connect", "connection": 1}
        assert guest.channel.peer.role == "network"


def test_each_direction_of_a_connection_closes_separately(guest):
    with guest.client() as client:
        guest.accept(1)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert guest.read(1, 8) == b"question"
        assert guest.next(Closed).stream == 1
        guest.channel.write(1, b"answer")
        guest.channel.close(1)
        guest.flush()
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""


def test_a_refused_connection_ends(guest):
    with guest.client() as client:
        guest.send(op="refuse", connection=guest.answer()["connection"])
        assert client.recv(1) == b""


def test_a_client_that_is_not_heard_is_stopped_and_goes_on(guest):
    """Its bytes wait in the kernel: no more than a window is under way."""
    data = bytes(range(256)) * 64 * 1024
    with guest.client() as client:
        guest.accept(1)
        sender = threading.Thread(target=client.sendall, args=[data], daemon=True)
        sender.start()
        first = b""
        while len(first) < WINDOW:
            came = guest.channel.receive(guest.sock.recv(65536))
            first += b"".join(event.data for event in came if isinstance(event, Data))
        guest.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            guest.sock.recv(1)
        guest.sock.settimeout(guards.PROCESS)
        guest.channel.consumed(1, len(first))
        assert first + guest.read(1, len(data) - len(first)) == data
        sender.join(guards.PROCESS)


def test_client_that_does_not_read_does_not_block_another(guest):
    with guest.client() as deaf, guest.client() as other:
        guest.accept(1)
        guest.accept(2)
        sent = 0
        guest.sock.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                while guest.channel.room(1):
                    sent += guest.channel.write(1, bytes(WINDOW))
                guest.flush()
                for _event in guest.channel.receive(guest.sock.recv(65536)):
                    pass
        guest.sock.settimeout(guards.PROCESS)
        guest.channel.write(2, b"hello")
        guest.flush()
        assert other.recv(10) == b"hello"
        guest.channel.close(1)
        guest.flush()
        found = 0
        while data := deaf.recv(1 << 20):
            found += len(data)
        assert found == sent


def test_client_reset_is_reported_to_the_host(guest):
    client = guest.client()
    guest.accept(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    assert guest.answer() == {"event": "reset", "stream": 1}
    assert guest.next(Closed).stream == 1


def test_the_host_resets(guest):
    with guest.client() as client:
        guest.accept(1)
        guest.channel.send({"op": "reset", "stream": 1})
        guest.channel.close(1)
        assert guest.next(Closed).stream == 1
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        guest.send(op="reset", stream=1)  # a second one, and one of nothing, is nothing
        guest.send(op="end", stream=77)
        with guest.client():
            assert guest.answer()["event"] == "connect"


def test_last_words_are_heard_by_a_client_that_still_talks(guest):
    """A server that answers early and closes would have the kernel throw its answer away."""
    with guest.client() as client:
        guest.accept(1)
        client.sendall(bytes(1000))
        guest.read(1, 1000)
        guest.channel.write(1, b"too large")
        guest.channel.close(1)
        guest.send(op="end", stream=1)
        assert guest.next(Closed).stream == 1
        for _ in range(20):
            client.sendall(bytes(50_000))
        assert client.recv(100) == b"too large"
        assert client.recv(100) == b""


def test_connections_beyond_the_limit_wait(guest, monkeypatch):
    monkeypatch.setattr(network_module, "CONNECTIONS", 2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(guest.client()) for _ in range(3)]
        guest.accept(1)
        guest.accept(2)
        guest.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            guest.next(Message)
        guest.sock.settimeout(guards.PROCESS)
        clients[0].close()
        guest.next(Closed)
        guest.channel.close(1)
        guest.flush()
        guest.accept(3)


def test_the_host_reaches_a_server(guest):
    with server() as (listener, port):
        guest.channel.open(5)
        guest.send(id=9, op="connect", stream=5, port=port)
        assert guest.answer() == {"id": 9, "result": {}}
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(guards.PROCESS)
            guest.channel.write(5, b"hi")
            guest.channel.close(5)
            guest.flush()
            assert accepted.recv(10) == b"hi"
            assert accepted.recv(10) == b""
            accepted.sendall(b"bye")
        assert guest.read(5, 3) == b"bye"
        assert guest.next(Closed).stream == 5


def test_the_host_reaches_a_server_on_ipv6_and_on_a_unix_socket(guest, tmp_path):
    with (
        socket.socket() as four,
        socket.socket(socket.AF_INET6) as six,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        four.bind(("127.0.0.1", 0))  # the port is nobody's, not even this guest's own: IPv4 is tried first
        six.bind(("::1", four.getsockname()[1]))
        six.listen()
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        for stream, where in ((1, {"port": six.getsockname()[1]}), (2, {"path": str(tmp_path / "socket")})):
            guest.channel.open(stream)
            guest.send(id=stream, op="connect", stream=stream, **where)
            assert guest.answer() == {"id": stream, "result": {}}


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ({"port": 1}, "ConnectionRefusedError"),
        ({"path": "/nowhere/socket"}, "FileNotFoundError"),
        ({"path": "x" * 200}, "OSError"),
        ({"port": 0}, "ValueError"),
        ({"port": 65536}, "ValueError"),
        ({"port": True}, "ValueError"),
        ({"port": "80"}, "ValueError"),
        ({"path": 3}, "TypeError"),
        ({"port": 1, "timeout": -1}, "ValueError"),
        ({}, "KeyError"),
    ],
)
def test_a_server_that_cannot_be_reached(guest, where, kind):
    guest.send(id=1, op="connect", stream=1, **where)
    answer = guest.answer()
    assert answer["id"] == 1
    assert answer["error"]["type"] == kind
    with guest.client():
        assert guest.answer()["event"] == "connect"


def test_waiting_for_a_server(guest):
    with server() as (_listener, port):
        pass
    guest.send(id=1, op="wait", port=port, timeout=guards.PROCESS)
    guest.send(id=2, op="wait", port=port, timeout=0.01)
    answer = guest.answer()
    assert (answer["id"], answer["error"]["type"]) == (2, "ConnectionRefusedError")
    with socket.create_server(("127.0.0.1", port)):
        assert guest.answer() == {"id": 1, "result": {}}


def test_a_unix_server_that_is_full_is_waited_for(guest, tmp_path):
    with contextlib.ExitStack() as stack:
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.settimeout(guards.PROCESS)
        unix.bind(str(tmp_path / "socket"))
        unix.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(tmp_path / "socket"))
        guest.channel.open(1)
        guest.send(id=1, op="connect", stream=1, path=str(tmp_path / "socket"))
        guest.send(id=2, op="connect", stream=2, path=str(tmp_path / "none"))
        assert guest.answer()["id"] == 2  # while the other waits
        for _ in range(2):
            stack.enter_context(unix.accept()[0])
        assert guest.answer() == {"id": 1, "result": {}}


def test_after_a_rest_it_is_as_it_was(guest, monkeypatch, tmp_path):
    monkeypatch.setattr(network_module, "_QUIET", 0.2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(guest.client()) for _ in range(3)]
        guest.accept(1)
        guest.accept(2)
        guest.answer()  # of the third, which nobody accepts
        clients[0].sendall(b"x")
        guest.channel.close(2)
        guest.send(op="end", stream=2)  # it lingers
        guest.send(id=1, op="wait", port=1, timeout=guards.PROCESS)
        guest.send(id=7, op="rest")
        while guest.answer().get("id") != 7:
            pass
        with pytest.raises(ConnectionResetError):
            clients[0].recv(1)
        assert clients[1].recv(1) == b""
        assert clients[2].recv(1) == b""
        waits = stack.enter_context(guest.client())  # it keeps quiet, then begins anew, with a hello
        guest.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            guest.sock.recv(1)
        guest.sock.settimeout(guards.PROCESS)
        guest.channel = Channel("host", WINDOW)
        guest.accept(1)
        waits.sendall(b"again")
        assert guest.read(1, 5) == b"again"


@pytest.mark.parametrize(
    "frames",
    [
        encode(Kind.MESSAGE, 0, b"{}"),
        b"\xff" * 20,
        Channel("host").take() + encode(Kind.MESSAGE, 0, b'{"op":"accept","connection":5,"stream":1}'),
        Channel("host").take() + encode(Kind.MESSAGE, 0, b'{"op":"nothing"}'),
        Channel("host").take() + encode(Kind.MESSAGE, 0, b"{}"),
        Channel("host").take() + encode(Kind.DATA, 3, b"x"),
    ],
)
def test_a_host_that_breaks_the_protocol_ends_it(guest, frames):
    guest.sock.sendall(frames)
    assert isinstance(guest.joined(), WireError)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
MESSAGES = st.fixed_dictionaries(
    {"op": st.sampled_from(["accept", "refuse", "connect", "wait", "end", "reset", "rest", "other"])},
    optional={
        "id": VALUES,
        "connection": VALUES,
        "stream": st.integers(-1, 5) | VALUES,
        "port": st.just(1) | VALUES,
        "path": st.just("/nowhere") | VALUES,
        "timeout": st.just(0.01) | VALUES,
    },
)


@settings(
    max_examples=2 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(MESSAGES, max_size=6))
def test_any_messages_are_answered_or_end_it_in_order(messages):
    guest = Guest()
    try:
        for message in messages:
            guest.channel.send(message)
        with contextlib.suppress(OSError):
            guest.flush()
            guest.sock.shutdown(socket.SHUT_WR)
        assert guest.joined() is not None
    finally:
        guest.close()


def test_full_port_waits_without_turning(guest, monkeypatch):
    """A timer that is due in seconds does not make the process poll each few milliseconds."""
    turns = []
    receive = NetworkProcess._receive
    monkeypatch.setattr(NetworkProcess, "_receive", lambda self: (turns.append(1), receive(self)))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(guest.client()) for _ in range(20)]
        for stream in range(1, 21):
            guest.accept(stream)
        for client in clients:  # the host reads nothing of it
            client.sendall(bytes(WINDOW))
        guest.send(id=1, op="wait", port=1, timeout=5)
        deadline = time.monotonic() + guards.PROCESS
        while not guest.network._full and time.monotonic() < deadline:
            time.sleep(0.01)
        turns.clear()
        time.sleep(0.5)
        assert guest.network._full
    assert len(turns) < 10


def test_host_hears_of_an_attempt_before_it_is_answered(monkeypatch):
    """The answer may end a test, and the host then looks at what the test tried."""
    question = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"
    udp = struct.pack("!HHHH", 40000, 53, 8 + len(question), 0) + question
    ends = socket.inet_aton("192.0.0.8") + socket.inet_aton("198.51.100.7")
    packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 7, 0, 64, 17, 0) + ends + udp
    written = []
    write = os.write

    def noted(file, data):
        written.append(file)
        return write(file, data)

    with contextlib.ExitStack() as stack:
        port, _host, device, kernel = map(
            stack.enter_context, (*socket.socketpair(), *socket.socketpair(type=socket.SOCK_DGRAM))
        )
        device.setblocking(False)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        network = NetworkProcess(port.fileno(), listener, device.fileno())
        kernel.send(packet)
        monkeypatch.setattr(network_module.os, "write", noted)
        network._packets(0)
        network.loop._selector.close()
    assert written == [network._port, network._device]
