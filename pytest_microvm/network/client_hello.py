"""The first message of TLS: whose certificate a client asks for (RFC 8446, 4.1.2; RFC 6066, 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass

HANDSHAKE = 0x16
"""The first byte of a connection that speaks TLS."""

MAX_BYTES = 32 * 1024
"""The longest beginning of a connection that is looked at; hellos have two kilobytes."""

_RECORD_HEADER = 5
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


def read_client_hello(data: bytes) -> ClientHello | None:
    """Return the ClientHello that ``data`` begins with; ``None`` if it is not all there yet.

    Args:
        data: The first bytes of a connection.

    Raises:
        BadHello: It does not begin with one, it is too long, or it is ambiguous.
    """
    message = bytearray()
    at = 0
    while at < len(data):
        length = _record_length(data[at : at + _RECORD_HEADER])
        if length is None:
            break
        at += _RECORD_HEADER
        message += data[at : at + length]
        if found := _message(message):
            return _hello(_Fields(found))
        if len(data) < at + length:
            break
        at += length
    if len(data) > MAX_BYTES:
        raise BadHello(f"it is longer than {MAX_BYTES} bytes")
    return None


def _record_length(header: bytes) -> int | None:
    """Return how long a record is; judge as much of its header as there is."""
    if header[0] != HANDSHAKE:
        raise BadHello("it does not begin with a handshake")
    if header[1:2] not in (b"", b"\x03"):
        raise BadHello("it is of another version of TLS")
    if len(header) < _RECORD_HEADER:
        return None
    length = int.from_bytes(header[3:], "big")
    if not 0 < length <= _MAX_RECORD:
        raise BadHello("a record has a wrong length")
    return length


def _message(data: bytearray) -> bytes | None:
    """Return the body of the handshake's first message; ``None`` if it is not all there yet."""
    if data and data[0] != _CLIENT_HELLO:
        raise BadHello("it does not begin with a ClientHello")
    end = 4 + int.from_bytes(data[1:4], "big")
    if len(data) >= 4 and end > MAX_BYTES:  # noqa: PLR2004 - type and length
        raise BadHello(f"it is longer than {MAX_BYTES} bytes")
    return bytes(data[4:end]) if 4 <= len(data) >= end else None  # noqa: PLR2004


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
