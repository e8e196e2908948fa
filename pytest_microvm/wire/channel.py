"""One end of a channel: hello, JSON messages, and byte streams with credit, without I/O.

Strategy: the caller feeds received bytes to :meth:`Channel.receive` and gets events; outgoing bytes are
queued until the caller writes them with :meth:`Channel.flush`. Only the host opens streams.
Each side may send ``WINDOW`` bytes on a stream before the other grants more, so a slow reader bounds
the memory of both ends.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from pytest_microvm.wire.frames import MAX_PAYLOAD, Frame, FrameReader, Kind, WireError, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

VERSION = 1
WINDOW = 256 * 1024
GRANT = WINDOW // 4
"""Bytes to consume before granting credit again. If every byte were granted at once, a peer that sends
single bytes and reads nothing would make this end queue a grant, longer than the byte, for each of them."""
MAX_STREAMS = 1024
_PIECE = 64 * 1024  # bytes per write
_CREDIT = struct.Struct("!I")
# Bound at import, not looked up in json later: tests that the runner runs may replace json's functions.
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().decode


class Hello(NamedTuple):
    """The peer introduced itself."""

    version: int
    role: str


class Message(NamedTuple):
    """The peer sent a JSON object."""

    body: dict[str, Any]


class Data(NamedTuple):
    """Bytes arrived on a stream; call :meth:`Channel.consumed` after using them."""

    stream: int
    data: bytes


class Credit(NamedTuple):
    """The peer granted credit to send more bytes on a stream."""

    stream: int


class Closed(NamedTuple):
    """The peer will send no more bytes on this stream."""

    stream: int


Event = Union[Hello, Message, Data, Credit, Closed]  # noqa: UP007 - guests may run Python 3.8


class _StreamState:
    """The state of one open stream."""

    __slots__ = ("closed_here", "closed_there", "may_receive", "may_send", "used")

    def __init__(self, window: int) -> None:
        self.may_send = window
        self.may_receive = window
        self.used = 0
        self.closed_here = False
        self.closed_there = False


class Channel:
    """The state of one end of a channel.

    Args:
        role: This end's name in its hello: ``host``, ``agent``, ``runner`` or ``network``.
        window: Bytes that may be in flight on a stream; both ends must use the same value.
    """

    def __init__(self, role: str, window: int = WINDOW) -> None:
        self._window = window
        self._grant = window * GRANT // WINDOW
        self._reader = FrameReader()
        self._out = bytearray()
        self._streams: dict[int, _StreamState] = {}
        self.peer: Hello | None = None
        self._emit(Kind.HELLO, 0, _encode({"version": VERSION, "role": role}).encode())

    # Outgoing

    def send(self, body: dict[str, Any]) -> None:
        """Queue a JSON message.

        Raises:
            ValueError: The message is larger than a MESSAGE frame may be.
        """
        self._emit(Kind.MESSAGE, 0, _encode(body).encode())

    def open(self, stream: int) -> None:
        """Open ``stream`` for receiving and sending (both ends call this with the same number).

        Raises:
            ValueError: The stream is already open, or too many streams are.
        """
        if stream in self._streams:
            raise ValueError(f"stream {stream} is open already")
        if len(self._streams) >= MAX_STREAMS:
            raise ValueError(f"more than {MAX_STREAMS} streams at once")
        self._streams[stream] = _StreamState(self._window)

    def write(self, stream: int, data: bytes) -> int:
        """Queue as much of ``data`` as the peer's credit allows; return the number of bytes queued."""
        state = self._streams[stream]
        if state.closed_here:
            raise ValueError(f"stream {stream} is closed for writing")
        size = min(len(data), state.may_send)
        limit = MAX_PAYLOAD[Kind.DATA]
        for start in range(0, size, limit):
            self._emit(Kind.DATA, stream, bytes(data[start : min(start + limit, size)]))
        state.may_send -= size
        return size

    def consumed(self, stream: int, size: int) -> None:
        """Count ``size`` bytes as consumed, and grant credit for them in batches until the peer closes."""
        state = self._streams.get(stream)
        if state is None or state.closed_there:
            return
        state.used += size
        if state.used >= self._grant:
            state.may_receive += state.used
            self._emit(Kind.CREDIT, stream, _CREDIT.pack(state.used))
            state.used = 0

    def close(self, stream: int) -> None:
        """End this side of ``stream``; a second call does nothing."""
        state = self._streams.get(stream)
        if state is None or state.closed_here:
            return
        state.closed_here = True
        self._emit(Kind.CLOSE, stream)
        self._forget_if_done(stream)

    def forget(self, stream: int) -> None:
        """Drop a stream that the peer never accepted, without sending a frame."""
        self._streams.pop(stream, None)

    def take(self) -> bytes:
        """Return the queued outgoing bytes and clear the queue."""
        data, self._out = bytes(self._out), bytearray()
        return data

    def flush(self, write: Callable[[memoryview], int]) -> bool:
        """Write queued bytes until ``write`` would block; return whether the queue is empty.

        Args:
            write: Writes some of the bytes and returns their number, as ``os.write`` does on a non-blocking
                descriptor.
        """
        try:
            while self._out:
                with memoryview(self._out)[:_PIECE] as piece:
                    size = write(piece)
                del self._out[:size]
        except BlockingIOError:
            return False
        return True

    @property
    def queued(self) -> int:
        """Number of outgoing bytes in the queue."""
        return len(self._out)

    def room(self, stream: int) -> int | None:
        """Return the number of bytes :meth:`write` would queue now; None if closed for writing."""
        state = self._streams.get(stream)
        return None if state is None or state.closed_here else state.may_send

    def is_open(self, stream: int) -> bool:
        """Return True if either side may still send on ``stream``."""
        return stream in self._streams

    @property
    def pending(self) -> int:
        """Number of bytes buffered from an incomplete frame."""
        return self._reader.pending

    @property
    def open_streams(self) -> int:
        """Number of streams that are open on either side."""
        return len(self._streams)

    # Incoming

    def receive(self, data: bytes) -> Iterator[Event]:
        """Return an iterator of the events in ``data``; exhaust it before the next call.

        Each frame is validated when the iterator reaches it, so that the caller can open a stream named
        in a message before the stream's bytes follow in the same ``data``.

        Raises:
            WireError: The peer violated the protocol, here or while iterating; drop the connection.
        """
        return map(self._event, self._reader.feed(data))

    def _event(self, frame: Frame) -> Event:
        if self.peer is None and frame.kind is not Kind.HELLO:
            raise WireError(f"{frame.kind.name} frame before hello")
        return _HANDLERS[frame.kind](self, frame)

    def _hello(self, frame: Frame) -> Event:
        if self.peer is not None:
            raise WireError("a second hello")
        body = _json_object(frame.payload)
        version, role = body.get("version"), body.get("role")
        if type(version) is not int or not isinstance(role, str):
            raise WireError("a hello without version and role")
        if version != VERSION:
            raise WireError(f"the peer speaks protocol version {version}, this end {VERSION}")
        self.peer = Hello(version, role)
        return self.peer

    def _message(self, frame: Frame) -> Event:
        return Message(_json_object(frame.payload))

    def _data(self, frame: Frame) -> Event:
        state = self._receiving(frame)
        if not frame.payload:
            raise WireError(f"stream {frame.stream}: DATA without data")
        if len(frame.payload) > state.may_receive:
            raise WireError(f"stream {frame.stream}: more bytes than were granted")
        state.may_receive -= len(frame.payload)
        return Data(frame.stream, frame.payload)

    def _credit(self, frame: Frame) -> Event:
        if len(frame.payload) != _CREDIT.size:
            raise WireError("a CREDIT frame of the wrong size")
        (size,) = _CREDIT.unpack(frame.payload)
        if not size:
            raise WireError(f"stream {frame.stream}: CREDIT without credit")
        state = self._streams.get(frame.stream)
        if state is not None:  # this end may have closed the stream while the grant was in flight
            if state.may_send + size > self._window:
                raise WireError(f"stream {frame.stream}: credit beyond the window")
            state.may_send += size
        return Credit(frame.stream)

    def _closed(self, frame: Frame) -> Event:
        self._receiving(frame).closed_there = True
        self._forget_if_done(frame.stream)
        return Closed(frame.stream)

    def _receiving(self, frame: Frame) -> _StreamState:
        state = self._streams.get(frame.stream)
        if state is None or state.closed_there:
            raise WireError(f"{frame.kind.name} on stream {frame.stream}, which is not open")
        return state

    def _forget_if_done(self, stream: int) -> None:
        state = self._streams[stream]
        if state.closed_here and state.closed_there:
            del self._streams[stream]

    def _emit(self, kind: Kind, stream: int, payload: bytes = b"") -> None:
        self._out += encode(kind, stream, payload)


_HANDLERS = {
    Kind.HELLO: Channel._hello,  # noqa: SLF001 - the table of this class
    Kind.MESSAGE: Channel._message,  # noqa: SLF001
    Kind.DATA: Channel._data,  # noqa: SLF001
    Kind.CREDIT: Channel._credit,  # noqa: SLF001
    Kind.CLOSE: Channel._closed,  # noqa: SLF001
}


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        body = _decode(payload.decode())
    except (ValueError, RecursionError):
        raise WireError("a message that is not JSON") from None
    if not isinstance(body, dict):
        raise WireError("a message that is not a JSON object")
    return body
