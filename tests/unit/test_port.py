"""The guest's end of a port, over a socket in the device's place."""

import socket

import pytest

from pytest_microvm.guest.port import Port
from pytest_microvm.wire.channel import VERSION, Channel, Data, Hello, Message
from pytest_microvm.wire.frames import WireError


@pytest.fixture
def ends():
    host, guest = socket.socketpair()
    with host, guest:
        yield host, Port(guest.fileno(), "agent")


def test_both_ends_greet(ends):
    host, port = ends
    channel = Channel("host")
    host.sendall(channel.take())
    assert list(port.receive()) == [Hello(VERSION, "host")]
    port.flush()
    assert list(channel.receive(host.recv(4096))) == [Hello(VERSION, "agent")]


def test_hello_of_a_new_host_end_restarts_the_channel(ends):
    host, port = ends
    for generation in range(3):
        channel = Channel("host")
        host.sendall(channel.take())
        assert list(port.receive()) == [Hello(VERSION, "host")]
        assert port.generation == generation
        port.flush()
        assert list(channel.receive(host.recv(4096))) == [Hello(VERSION, "agent")]


def test_what_the_host_before_has_sent_last_is_dropped(ends):
    host, port = ends
    channel = Channel("host")
    channel.open(1)
    host.sendall(channel.take())
    list(port.receive())
    port.channel.open(1)
    channel.close(1)
    old, new = channel.take(), Channel("host")
    new.send({"id": 1})
    host.sendall(old + new.take())
    assert list(port.receive()) == [Hello(VERSION, "host"), Message({"id": 1})]
    assert port.generation == 1
    assert not port.channel.is_open(1)


def test_a_request_and_its_stream_in_one_piece(ends):
    host, port = ends
    channel = Channel("host")
    channel.open(3)
    channel.send({"id": 1, "stdin": 3})
    channel.write(3, b"input")
    host.sendall(channel.take())
    events = []
    for event in port.receive():
        events.append(event)
        if isinstance(event, Message):
            port.channel.open(event.body["stdin"])
    assert events[-1] == Data(3, b"input")


def test_the_end_and_a_violation_are_errors(ends):
    host, port = ends
    host.sendall(b"\xff" * 9)
    with pytest.raises(WireError):
        list(port.receive())
    host.close()
    with pytest.raises(EOFError):
        port.receive()
