"""Redact credentials in the messages that a server sends over a WebSocket (RFC 6455).

A message may be fragmented, with control frames between the fragments. Bytes that may begin a credential are
held back and forwarded with the next fragment: an intermediary may change the fragmentation (section 5.4), as
extensions, which could give it a meaning, are refused. No message waits for another.
"""

from __future__ import annotations

from collections.abc import Callable

from pytest_microvm.network.proxy.refusal import Refused

_HEAD = 2  # bytes; an extended length follows
_LENGTHS = {126: 2, 127: 8}
_FINAL, _EXTENSIONS, _OPCODE = 0x80, 0x70, 0x0F  # bits of the first byte
_MASKED, _LENGTH = 0x80, 0x7F  # bits of the second one
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_CONTROL = frozenset((_CLOSE, _PING, _PONG))
_DATA = frozenset((_CONTINUATION, _TEXT, _BINARY))
_MAX_CONTROL = 125  # bytes
_MAX_LENGTH = 2**63 - 1  # bytes of a data frame


class Frames:
    """Parser of a server's frames that returns them with credentials redacted.

    Args:
        change: Redacts a message piece by piece: returns the bytes that are safe to forward, and for b"", at
            the message's end, the rest. In total it returns as many bytes as it gets.
        change_whole: Redacts the complete content of a control frame.
    """

    def __init__(self, change: Callable[[bytes], bytes], change_whole: Callable[[bytes], bytes]) -> None:
        self._change = change
        self._change_whole = change_whole
        self._head = b""  # head of the next frame, while incomplete
        self._first = 0  # first byte of the current frame
        self._left = 0  # bytes of its content not yet received
        self._in_frame = False
        self._control = b""  # received content of a control frame
        self._message: int | None = None  # opcode for the next frame of an unfinished message
        self._held = 0  # held-back bytes of the message

    def feed(self, data: bytes) -> bytes:
        """Return the redacted bytes to forward after ``data``.

        Raises:
            Refused: The server violates the WebSocket protocol.
        """
        out = []
        while data:
            if not self._in_frame:
                data, head = self._begin(data)
                out.append(head)
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            if piece:
                out.append(self._content(piece))
            if self._in_frame and not self._left:
                self._in_frame = False
                out.append(self._ended())
        return b"".join(out)

    def _begin(self, data: bytes) -> tuple[bytes, bytes]:
        """Read a frame's head as far as received; return the bytes after it and the head to forward."""
        for size, byte in enumerate(data, 1):
            self._head += bytes([byte])
            head = self._head
            if len(head) >= _HEAD and len(head) == _HEAD + _LENGTHS.get(head[1] & _LENGTH, 0):
                self._head, self._in_frame, self._first = b"", True, head[0]
                self._left = int.from_bytes(head[_HEAD:], "big") if head[_HEAD:] else head[1] & _LENGTH
                self._check(is_masked=bool(head[1] & _MASKED))
                return data[size:], self._opened()
        return b"", b""

    def _check(self, *, is_masked: bool) -> None:
        """Reject a frame for which a client must fail the connection (sections 5.1 to 5.5)."""
        opcode = self._first & _OPCODE
        if self._first & _EXTENSIONS:
            raise _broken("uses an extension that was not agreed upon")
        if is_masked:
            raise _broken("masks what it sends")
        if opcode in _CONTROL:
            if not self._first & _FINAL or self._left > _MAX_CONTROL:
                raise _broken("sends a frame for control that is too long, or in fragments")
        elif opcode not in _DATA or self._left > _MAX_LENGTH:
            raise _broken("sends a frame that there is not")
        elif (opcode == _CONTINUATION) != (self._message is not None):
            raise _broken("mixes up the fragments of its messages")

    @property
    def _is_control(self) -> bool:
        return self._first & _OPCODE in _CONTROL

    def _opened(self) -> bytes:
        """Begin a frame; return the head of a message's last frame, which includes held-back bytes."""
        if self._is_control:
            return b""
        if self._message is None:
            self._message = self._first & _OPCODE
        if self._first & _FINAL:
            return _head(_FINAL | self._message, self._held + self._left)
        return b""

    def _content(self, piece: bytes) -> bytes:
        if self._is_control:
            self._control += piece
            return b""
        changed = self._change(piece)
        if self._first & _FINAL:
            return changed
        self._held += len(piece) - len(changed)
        return self._fragment(changed) if changed else b""

    def _fragment(self, content: bytes) -> bytes:
        opcode, self._message = self._message or _CONTINUATION, _CONTINUATION
        return _head(opcode, len(content)) + content

    def _ended(self) -> bytes:
        if self._is_control:
            content, self._control = self._change_whole(self._control), b""
            return _head(self._first, len(content)) + content
        if not self._first & _FINAL:
            return b""
        self._message, self._held = None, 0
        return self._change(b"")


def _head(first: int, length: int) -> bytes:
    """Return the head of an unmasked frame."""
    if length <= _MAX_CONTROL:
        return bytes([first, length])
    code, size = (126, 2) if length < 1 << 16 else (127, 8)
    return bytes([first, code]) + length.to_bytes(size, "big")


def _broken(what: str) -> Refused:
    return Refused(502, f"the server of the WebSocket {what}")
