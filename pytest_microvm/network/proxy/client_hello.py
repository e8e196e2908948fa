"""Parse the server name in a TLS ClientHello (RFC 8446, 4.1.2; RFC 6066, 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

HANDSHAKE = 0x16
"""The first byte of a connection that speaks TLS."""

MAX_BYTES = 32 * 1024
"""Maximum bytes of a ClientHello with its record headers; real ones have two kilobytes."""

_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_MAX_RECORD = 2**14
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.ASCII)


class BadHello(ValueError):
    """The bytes are no valid, unambiguous ClientHello."""


@dataclass(frozen=True)
class ClientHello:
    """The relevant part of a ClientHello.

    Args:
        server_name: The requested server name in lower case; ``None`` if there is none.
    """

    server_name: str | None


class HelloReader:
    """Incremental reader of the ClientHello that begins a connection, in time linear in its bytes."""

    def __init__(self) -> None:
        self.data = bytearray()
        """All bytes received."""
        self._record = 0  # start of the first incomplete record
        self._message = bytearray()  # content of the records before it

    def feed(self, data: bytes) -> ClientHello | None:
        """Return the ClientHello once it is complete.

        Args:
            data: The next received bytes.

        Raises:
            BadHello: The bytes are no ClientHello, or it is too long or ambiguous.
        """
        self.data += data
        while (content := self._content()) is not None:
            start, end = content
            came = self.data[start:end]
            if message := _complete(self._message, came):
                return _hello(_Fields(message))
            if len(self.data) < end:
                break
            self._message += came
            self._record = end
        if len(self.data) > MAX_BYTES:
            raise BadHello(f"it is longer than {MAX_BYTES} bytes")
        return None

    def _content(self) -> tuple[int, int] | None:
        """Return start and end of the current record's content once known; validate its header so far."""
        header = bytes(self.data[self._record : self._record + _RECORD_HEADER])
        if header and header[0] != HANDSHAKE:
            raise BadHello("it does not begin with a handshake")
        if header[1:2] not in (b"", b"\x03"):
            raise BadHello("it is of another version of TLS")
        if len(header) < _RECORD_HEADER:
            return None
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _MAX_RECORD:
            raise BadHello("a record has a wrong length")
        start = self._record + _RECORD_HEADER
        return start, start + length


def _complete(before: bytearray, came: bytearray) -> bytes | None:
    """Return the body of the handshake's first message; ``None`` if it is incomplete."""
    start = bytes(before[:_MESSAGE_HEADER]) + bytes(came[:_MESSAGE_HEADER])
    if start and start[0] != _CLIENT_HELLO:
        raise BadHello("it does not begin with a ClientHello")
    if len(start) < _MESSAGE_HEADER:
        return None
    end = _MESSAGE_HEADER + int.from_bytes(start[1:_MESSAGE_HEADER], "big")
    if end > MAX_BYTES:
        raise BadHello(f"it is longer than {MAX_BYTES} bytes")
    if len(before) + len(came) < end:
        return None
    return bytes(before + came)[_MESSAGE_HEADER:end]


class _Fields:
    """Reader of consecutive fields; a field beyond the data is an error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, number: int) -> bytes:
        if self._at + number > len(self._data):
            raise BadHello("it ends too early")
        self._at += number
        return self._data[self._at - number : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Fields:
        """Read a field preceded by its length, an integer of ``size`` bytes."""
        return _Fields(self.take(self.number(size)))

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def _hello(fields: _Fields) -> ClientHello:
    fields.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session, cipher suites, compression
        fields.vector(size)
    if not fields.left:
        return ClientHello(None)
    extensions = fields.vector(2)
    if fields.left:
        raise BadHello("something follows its extensions")
    names = []
    while extensions.left:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            names.append(_server_name(content))
    if len(names) > 1:
        raise BadHello("it asks for several names")
    return ClientHello(names[0] if names else None)


def _server_name(content: _Fields) -> str:
    entries = content.vector(2)
    kind, name = entries.number(1), entries.vector(2)
    if kind or entries.left or content.left:
        raise BadHello("it asks for several names")
    text = name.take(name.left)
    if not _NAME.fullmatch(text):
        raise BadHello("it asks for something that is no name")
    return text.decode("ascii").lower()
