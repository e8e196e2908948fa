"""The relay between a runner and the host: frames unchanged, and with them what tests write."""

import fcntl
import json
import os
import socket
import sys
import termios
import threading
from base64 import b64decode

import pytest

from pytest_microvm.guest.output_relay import RELAY, OutputRelay
from pytest_microvm.wire.channel import WINDOW
from pytest_microvm.wire.frames import FrameReader, Kind, encode
from support import guards


class Ends:
    """Both ends of a relay, which runs in a thread, and the pipe that tests write to."""

    def __init__(self):
        port, self.host = socket.socketpair()
        runner, self.runner = socket.socketpair()
        output, self.pipe = os.pipe()
        self.answered, answers = os.pipe()
        self.port = port
        self._ours = [port, runner]
        self._descriptors = [output, self.pipe, self.answered, answers]
        for sock in (self.host, self.runner):
            sock.settimeout(guards.PROCESS)
        port.setblocking(False)
        runner.setblocking(False)
        os.set_blocking(output, False)
        self._frames = {self.host: FrameReader(), self.runner: FrameReader()}
        relay = OutputRelay(port.fileno(), runner.fileno(), output, answers)
        self._thread = threading.Thread(target=relay.serve)
        self._thread.start()

    def frames(self, end, until):
        """Return the frames that come to an end up to one of the kind ``until``."""
        found = []
        while not found or found[-1].kind is not until:
            data = end.recv(65536)
            assert data
            found += self._frames[end].feed(data)
        return found

    def tell(self, kind, payload=b""):
        """Send a frame to the relay itself, as the runner, and wait for the answer."""
        self.runner.sendall(encode(kind, RELAY, payload))
        assert os.read(self.answered, 1)

    def ended(self):
        """Wait for the end of the relay."""
        self._thread.join(guards.PROCESS)
        return not self._thread.is_alive()

    def close(self):
        self.host.close()
        self.runner.close()
        assert self.ended()
        for sock in self._ours:
            sock.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


@pytest.fixture
def unused():
    made = Ends()
    yield made
    made.close()


@pytest.fixture
def ends(unused):
    """The same after a first live stream, since when the relay has the port."""
    unused.tell(Kind.MESSAGE, b"1000")
    unused.tell(Kind.CLOSE)
    unused.frames(unused.host, Kind.CLOSE)
    return unused


def records(frames, stream):
    """Return the records on a stream, with the output in them as bytes."""
    data = b"".join(frame.payload for frame in frames if frame.stream == stream and frame.kind is Kind.DATA)
    found = [json.loads(line) for line in data.splitlines()]
    return [b64decode(record["data"]) if record["k"] == "out" else record["k"] for record in found]


def joined(found):
    """Return records with output that came in several pieces put together."""
    made = []
    for record in found:
        if made and isinstance(record, bytes) and isinstance(made[-1], bytes):
            made[-1] += record
        else:
            made.append(record)
    return made


def test_before_its_first_stream_it_leaves_the_port_to_the_runner(unused):
    unused.host.sendall(encode(Kind.HELLO, 0, b"{}"))
    unused.runner.close()
    assert unused.ended()
    assert unused.port.recv(100) == encode(Kind.HELLO, 0, b"{}")


def test_frames_pass_unchanged_in_both_directions(ends):
    for here, there in ((ends.host, ends.runner), (ends.runner, ends.host)):
        sent = encode(Kind.HELLO, 0, b"{}") + encode(Kind.DATA, 7, b"x" * 60000) + encode(Kind.CLOSE, 7)
        here.sendall(sent)
        assert b"".join(encode(*frame) for frame in ends.frames(there, Kind.CLOSE)) == sent


def test_output_and_records_come_in_the_order_in_which_they_were_made(ends):
    ends.tell(Kind.MESSAGE, b"5")
    for number in range(50):
        os.write(ends.pipe, b"%d " % number)
        ends.tell(Kind.DATA, b'{"k":"log %d"}\n' % number)
    os.write(ends.pipe, b"last")
    ends.tell(Kind.CLOSE)
    found = joined(records(ends.frames(ends.host, Kind.CLOSE), 5))
    expected = [record for number in range(50) for record in (b"%d " % number, f"log {number}")]
    assert found == [*expected, b"last"]


def test_output_is_not_put_into_a_record_that_comes_in_parts(ends):
    ends.tell(Kind.MESSAGE, b"5")
    os.write(ends.pipe, b"before ")
    ends.tell(Kind.DATA, b'{"k":"a')
    os.write(ends.pipe, b"after ")
    ends.tell(Kind.DATA, b' long one"}\n')
    ends.tell(Kind.CLOSE)
    found = joined(records(ends.frames(ends.host, Kind.CLOSE), 5))
    assert found == [b"before ", "a long one", b"after "]


def test_output_between_two_tests_belongs_to_the_next(ends):
    ends.tell(Kind.MESSAGE, b"5")
    ends.tell(Kind.CLOSE)
    assert records(ends.frames(ends.host, Kind.CLOSE), 5) == []
    os.write(ends.pipe, b"early ")
    ends.tell(Kind.MESSAGE, b"6")
    ends.tell(Kind.CLOSE)
    assert joined(records(ends.frames(ends.host, Kind.CLOSE), 6)) == [b"early "]


def test_output_of_the_machine_that_this_one_copies_is_forgotten(ends):
    os.write(ends.pipe, b"of the other")
    while waiting_in(ends.pipe):  # until the relay has it
        pass
    ends.host.sendall(encode(Kind.HELLO, 0, b"{}"))
    ends.frames(ends.runner, Kind.HELLO)
    ends.tell(Kind.MESSAGE, b"1")
    ends.tell(Kind.CLOSE)
    assert records(ends.frames(ends.host, Kind.CLOSE), 1) == []


def waiting_in(pipe):
    """Return the number of bytes in a pipe (pipe(7))."""
    size = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, size)
    return int.from_bytes(size, sys.byteorder)


def test_writer_waits_for_a_host_that_grants_no_credit(ends):
    ends.tell(Kind.MESSAGE, b"5")
    size = 4 * 1024**2

    def flood():
        for _ in range(size // 65536):
            os.write(ends.pipe, b"x" * 65536)
        ends.tell(Kind.CLOSE)

    writer = threading.Thread(target=flood)
    writer.start()
    frames = []
    while sum(len(frame.payload) for frame in frames) < WINDOW:
        frames += ends.frames(ends.host, Kind.DATA)
    assert sum(len(frame.payload) for frame in frames) == WINDOW
    assert writer.is_alive()
    while frames[-1].kind is not Kind.CLOSE:
        ends.host.sendall(encode(Kind.CREDIT, 5, len(frames[-1].payload).to_bytes(4, "big")))
        frames += ends._frames[ends.host].feed(ends.host.recv(65536))
    writer.join(guards.PROCESS)
    assert joined(records(frames, 5)) == [b"x" * size]


def test_frames_for_a_live_stream_do_not_reach_the_runner(ends):
    ends.tell(Kind.MESSAGE, b"5")
    ends.tell(Kind.CLOSE)
    ends.frames(ends.host, Kind.CLOSE)
    ends.host.sendall(encode(Kind.CREDIT, 5, b"\0\0\0\1") + encode(Kind.CLOSE, 5))
    ends.host.sendall(encode(Kind.MESSAGE, 0, b"{}"))
    assert [frame.kind for frame in ends.frames(ends.runner, Kind.MESSAGE)] == [Kind.MESSAGE]


def test_what_was_written_before_the_runner_ended_is_sent(ends):
    ends.tell(Kind.MESSAGE, b"5")
    os.write(ends.pipe, b"last words")
    ends.runner.close()
    assert ends.ended()
    assert joined(records(ends.frames(ends.host, Kind.DATA), 5)) == [b"last words"]


def test_it_ends_with_the_host(ends):
    ends.host.close()
    assert ends.ended()
