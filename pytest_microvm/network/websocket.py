"""Where the frames of a WebSocket end (RFC 6455, 5.2): nothing of a message has to wait for the next one."""

from __future__ import annotations

from collections.abc import Callable

_HEAD = 2  # bytes; those of a longer length follow
_LENGTHS = {126: 2, 127: 8}
_EXTENSIONS = (
    0x70  # bits of the first byte that mean something to extensions alone, which nobody has asked for
)
_OPCODES = frozenset((0x0, 0x1, 0x2, 0x8, 0x9, 0xA))
_MASKED = 0x80


class Frames:
    """Hands on what a server sends, and says where a frame ends.

    What is no frame of a server, and all after it, is handed on as a stream without ends. No frame begins
    with a printable character.

    Args:
        change: Applied to each piece, and to none where a frame ends, for what it held back.
    """

    def __init__(self, change: Callable[[bytes], bytes]) -> None:
        self._change = change
        self._head = b""  # of the frame at hand, while it is not all there
        self._left = 0  # bytes of its content that are still to come
        self._is_stream = False

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent on now that ``data`` came; at the end (none) what was held back."""
        out = []
        while data and not self._is_stream:
            size = self._content(data) if self._left else self._begin(data)
            out.append(self._change(data[:size]))
            data = data[size:]
            if not self._left and not self._head:
                out.append(self._change(b""))
        return b"".join([*out, self._change(data)] if data or not out else out)

    def _content(self, data: bytes) -> int:
        size = min(self._left, len(data))
        self._left -= size
        return size

    def _begin(self, data: bytes) -> int:
        """Read the head of a frame; return how many of the bytes belong to it."""
        for size, byte in enumerate(data, 1):
            self._head += bytes([byte])
            if not _may_begin(self._head):
                self._is_stream = True
                return size
            if len(self._head) >= _HEAD and len(self._head) == _HEAD + _LENGTHS.get(self._head[1], 0):
                self._left = int.from_bytes(self._head[_HEAD:] or self._head[1:], "big")
                self._head = b""
                return size
        return len(data)


def _may_begin(head: bytes) -> bool:
    """Tell whether a frame of a server begins so."""
    known = not head[0] & _EXTENSIONS and head[0] & 0xF in _OPCODES
    return known and not head[1:2] >= bytes([_MASKED])
