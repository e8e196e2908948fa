"""The first message of TLS: whose certificate a client asks for (RFC 8446, 4.1.2; RFC 6066, 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

HANDSHAKE = 0x16
"""The first byte of a connection that speaks TLS."""

MAX_BYTES = 32 * 1024
"""The longest beginning of a connection that is looked at; hellos have two kilobytes."""

_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_MAX_RECORD = 2**14
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", re.ASCII)


class BadHello(ValueError):
    """What came is no ClientHello that can be judged."""


@dataclass(frozen=True)
class ClientHello:
    """What matters of a ClientHello.

    Args:
        server_name: The name it asks for, in lower case; ``None`` if it asks for none.
    """

    server_name: str | None


class HelloReader:
    """Reads the ClientHello that a connection begins with, in time that grows with its bytes alone."""

    def __init__(self) -> None:
        self.data = bytearray()
        """All that came."""
        self._record = 0  # where the record begins that is not all there yet
        self._message = bytearray()  # what the records before it hold

    def feed(self, data: bytes) -> ClientHello | None:
        """Return the ClientHello once it is all there.

        Args:
            data: What came next.

        Raises:
            BadHello: There is none, it is too long, or it is ambiguous.
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
        """Return where the content of the record at hand lies, once that is known; judge what there is."""
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
    """Return the body of the handshake's first message; ``None`` if it is not all there yet."""
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
    """Fields one after another; what does not fit is an error."""

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
        """Take a field with its length before it, of that many bytes."""
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
