"""A process between the runner and the host that adds what tests write to what the runner sends.

While a test runs, the runner is busy, and it may end with the test. The relay reads the pipe that is the
test's stdout and stderr. It sends the bytes as records on a stream that the host has opened for that, in
order with the records that the runner sends meanwhile. All other frames pass through it unchanged.
"""

from __future__ import annotations

from binascii import b2a_base64
from os import read, write  # bound here: a test in the runner's process may have replaced them in os
from select import POLLIN, POLLOUT, poll
from time import monotonic
from typing import TYPE_CHECKING

from pytest_microvm.guest.port import PortReader
from pytest_microvm.wire.channel import WINDOW
from pytest_microvm.wire.frames import MAX_PAYLOAD, MAX_STREAM, FrameReader, Kind, encode

if TYPE_CHECKING:
    from collections.abc import Callable

RELAY = MAX_STREAM
"""The stream number of frames from the runner to its relay: MESSAGE begins a live stream, DATA has records
for it, CLOSE ends it. The host, which counts its streams from 1, does not get that far.

The relay answers each of these frames with a byte on a pipe. The runner waits for that, so that what it lets
the test write afterwards comes after the record."""

_GATHER = 0.02  # seconds; a record for each line that a test prints would slow the test down
_READ = 256 * 1024  # more than a pipe holds, so that one read takes all
_FULL = 256 * 1024  # bytes that wait to be sent on before no more are read
_CREDIT_SIZE = MAX_PAYLOAD[Kind.CREDIT]


class OutputRelay:
    """The relay of one runner; the runner itself uses the port until it begins the first live stream.

    Args:
        port: The descriptor of the port to the host.
        runner: The descriptor of a socket to the runner.
        output: The descriptor of the pipe that tests write to.
        answers: The descriptor of the pipe for answers to the runner.
    """

    def __init__(self, port: int, runner: int, output: int, answers: int) -> None:
        self._port, self._runner, self._output, self._answers = port, runner, output, answers
        self._read_port = PortReader(port)
        self._from_host, self._from_runner = FrameReader(), FrameReader()
        self._to_host, self._to_runner = bytearray(), bytearray()
        self._streams: set[int] = set()  # live streams that the host has not closed
        self._stream = 0  # the present one; 0: no test runs
        self._credit = 0
        self._records = bytearray()  # for the present one
        self._in_record = False  # whether the last of these is not complete
        self._closing = False
        self._early = b""  # what was written while no test ran, for the next one
        self._host_ended = self._runner_ended = self._has_port = False
        self._read_at = 0.0
        self._readers = {
            port: self._take_from_host,
            runner: self._take_from_runner,
            output: self._take_output,
        }

    def serve(self) -> None:
        """Forward until the host closes the port, or the runner has ended and its data is forwarded."""
        while not self._host_ended and (not self._runner_ended or self._records or self._to_host):
            for descriptor, events in self._wait():
                if events & POLLOUT:
                    self._send(descriptor)
                if events & ~POLLOUT:
                    self._readers[descriptor]()
            self._fill_stream()

    def _wait(self) -> list[tuple[int, int]]:
        """Wait until there is anything to do; what is full is not read."""
        waiting = poll()
        if not self._has_port:
            waiting.register(self._runner, POLLIN)
            return waiting.poll()
        waiting.register(self._port, self._events(self._to_host, reads=len(self._to_runner) < _FULL))
        if not self._runner_ended:
            has_room = len(self._to_host) < _FULL and len(self._records) < _FULL
            waiting.register(self._runner, self._events(self._to_runner, reads=has_room))
        timeout = None
        if len(self._records) < _FULL and not (self._runner_ended or self._in_record):
            left = self._read_at + _GATHER - monotonic()
            if left > 0:
                timeout = left * 1000
            else:
                waiting.register(self._output, POLLIN)
        return waiting.poll(timeout)

    @staticmethod
    def _events(outgoing: bytearray, *, reads: bool) -> int:
        return (POLLOUT if outgoing else 0) | (POLLIN if reads else 0)

    def _send(self, descriptor: int) -> None:
        outgoing = self._to_host if descriptor == self._port else self._to_runner
        try:
            size = write(descriptor, bytes(outgoing[:65536]))
        except BlockingIOError:
            return
        del outgoing[:size]

    def _take_from_host(self) -> None:
        """Pass on what the host sends to the runner."""
        data = _available(self._read_port.read)
        self._host_ended = data == b""
        for frame in self._from_host.feed(data or b""):
            if frame.kind is Kind.HELLO:  # this machine is a copy: what there is belongs to another one
                self._streams.clear()
                self._early = b""
            if frame.stream not in self._streams:
                self._to_runner += encode(frame.kind, frame.stream, frame.payload)
            elif frame.kind is Kind.CLOSE:
                self._streams.remove(frame.stream)
            elif frame.stream == self._stream and len(frame.payload) == _CREDIT_SIZE:
                self._credit += int.from_bytes(frame.payload, "big")

    def _take_from_runner(self) -> None:
        """Pass on what the runner sends to the host, and its live records after what was written before."""
        data = _available(lambda: read(self._runner, 65536))
        if data == b"":
            self._take_output()
            self._runner_ended = True
        for frame in self._from_runner.feed(data or b""):
            if frame.stream != RELAY:
                self._to_host += encode(frame.kind, frame.stream, frame.payload)
                continue
            if frame.kind is Kind.MESSAGE:
                self._begin(int(frame.payload))
            else:
                if not self._in_record:
                    self._take_output()
                self._records += frame.payload
                self._in_record = frame.kind is Kind.DATA and not frame.payload.endswith(b"\n")
                self._closing = frame.kind is Kind.CLOSE
            write(self._answers, b"x")

    def _begin(self, stream: int) -> None:
        self._has_port = True
        self._streams.add(stream)
        self._stream, self._credit, self._closing = stream, WINDOW, False
        early, self._early = self._early, b""
        self._add(early)

    def _take_output(self) -> None:
        """Read what has been written; what is written between two tests belongs to the next one."""
        data = _available(lambda: read(self._output, _READ)) or b""
        self._read_at = monotonic()
        if self._stream and not self._closing:
            self._add(data)
        else:
            self._early = (self._early + data)[:_FULL]

    def _add(self, data: bytes) -> None:
        if data:
            self._records += b'{"k":"out","data":"' + b2a_base64(data, newline=False) + b'"}\n'

    def _fill_stream(self) -> None:
        """Put as much of the live stream's records into frames as its credit allows."""
        while self._records and self._credit:
            piece = bytes(self._records[: min(self._credit, MAX_PAYLOAD[Kind.DATA])])
            del self._records[: len(piece)]
            self._credit -= len(piece)
            self._to_host += encode(Kind.DATA, self._stream, piece)
        if self._closing and not self._records:
            self._to_host += encode(Kind.CLOSE, self._stream)
            self._stream, self._closing = 0, False


def _available(reader: Callable[[], bytes]) -> bytes | None:
    """Return what can be read now, b"" at the end, ``None`` if there is nothing yet."""
    try:
        return reader()
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""
