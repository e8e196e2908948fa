"""Frames: typed, size-limited units of the byte stream on a virtio-serial port.

A frame is a nine-byte header (kind: u8, stream: u32, length: u32, network byte order) and
``length`` bytes of payload. Every length has a limit, checked before any payload is buffered.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct("!BII")
MAX_STREAM = 2**31 - 1


class WireError(Exception):
    """The peer violated the protocol; the connection is unusable."""


class Kind(IntEnum):
    """The type of a frame's payload."""

    HELLO = 1  # JSON object: version, role; the first frame of each side
    MESSAGE = 2  # JSON object: a request, a reply or an event
    DATA = 3  # bytes of a stream
    CREDIT = 4  # u32: the number of further bytes that may be sent on this stream
    CLOSE = 5  # no more bytes of this stream will follow from this side


MAX_PAYLOAD = {
    Kind.HELLO: 4096,
    Kind.MESSAGE: 1024 * 1024,
    Kind.DATA: 64 * 1024,
    Kind.CREDIT: 4,
    Kind.CLOSE: 0,
}


class Frame(NamedTuple):
    """One complete frame."""

    kind: Kind
    stream: int
    payload: bytes


def encode(kind: Kind, stream: int, payload: bytes = b"") -> bytes:
    """Return the frame's bytes.

    Raises:
        ValueError: The payload or the stream number exceeds its limit.
    """
    if len(payload) > MAX_PAYLOAD[kind]:
        raise ValueError(f"{kind.name} payload of {len(payload)} bytes, at most {MAX_PAYLOAD[kind]}")
    if not 0 <= stream <= MAX_STREAM:
        raise ValueError(f"stream number {stream} is outside 0..{MAX_STREAM}")
    return HEADER.pack(kind, stream, len(payload)) + payload


class FrameReader:
    """Parser that turns received bytes into frames, however the bytes are split.

    It buffers at most one incomplete frame (header and payload limit) plus the bytes fed last.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that ``data`` completes.

        Raises:
            WireError: A header names an unknown kind, or a length or stream above its limit.
        """
        self._buffer += data
        frames = []
        position = 0
        while len(self._buffer) - position >= HEADER.size:
            kind, stream, length = self._header(position)
            end = position + HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(kind, stream, bytes(self._buffer[position + HEADER.size : end])))
            position = end
        del self._buffer[:position]
        return frames

    @property
    def pending(self) -> int:
        """Number of bytes buffered from an incomplete frame."""
        return len(self._buffer)

    def _header(self, position: int) -> tuple[Kind, int, int]:
        number, stream, length = HEADER.unpack_from(self._buffer, position)
        try:
            kind = Kind(number)
        except ValueError:
            raise WireError(f"unknown frame kind {number}") from None
        if length > MAX_PAYLOAD[kind]:
            raise WireError(f"{kind.name} frame of {length} bytes, at most {MAX_PAYLOAD[kind]}")
        if stream > MAX_STREAM:
            raise WireError(f"stream number {stream} is above {MAX_STREAM}")
        return kind, stream, length
