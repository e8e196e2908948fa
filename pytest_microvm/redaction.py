"""Take secret values out of text and bytes, as they are and as programs commonly encode them.

A value is found as it is, escaped as in JSON, URL-encoded, and inside of base64 (both alphabets, at any
offset, as in ``user:token`` of basic authentication). It is not found where a program changed it otherwise:
redaction keeps accidents out of logs, it does not keep a secret from code that wants to tell it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import quote, quote_plus

MASK = "***"
MIN_LENGTH = 4
"""Characters a value must have to be looked for: shorter ones are part of ordinary words."""

_MIN_LINE = 16  # characters of a line of a longer value (a key in PEM) that is looked for by itself
_MIN_ENCODED = 8  # characters of base64 that cannot be there by chance
# What JSON libraries escape although they need not, so that it may stand in HTML: Go, Rails, PHP if told to;
# Gson; System.Text.Json. Tokens in base64 have some of it.
_ESCAPED = ("", "<>&", "<>&='", "<>&'+`\"")
_CODES = ("\\u%04x", "\\u%04X")


class Redactor:
    """Replaces secret values by ``***``.

    Args:
        values: What is secret.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        shown = {variant for value in values if len(value) >= MIN_LENGTH for variant in variants(value)}
        self._variants = sorted(
            {v.encode(errors="surrogateescape") for v in shown}, key=lambda variant: (-len(variant), variant)
        )
        self._pattern = re.compile(b"|".join(map(re.escape, self._variants))) if self._variants else None
        self._longest = len(self._variants[0]) if self._variants else 0
        texts = sorted(shown, key=lambda text: (-len(text), text))
        self._text = re.compile("|".join(map(re.escape, texts))) if texts else None

    def __bool__(self) -> bool:
        return self._pattern is not None

    def text(self, text: str) -> str:
        """Return ``text`` without the values."""
        return self._text.sub(MASK, text) if self._text is not None else text

    def raw(self, data: bytes) -> bytes:
        """Return ``data`` without the values."""
        return self._pattern.sub(MASK.encode(), data) if self._pattern is not None else data

    def tree(self, value: object) -> object:
        """Return a value of JSON with every text in it, keys too, redacted."""
        if self._text is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        return [self.tree(item) for item in value] if isinstance(value, list) else value

    def decided(self, data: bytes) -> int:
        """Return how many bytes of ``data`` cannot become part of a (longer) value with what follows."""
        tail = data[max(0, len(data) - self._longest + 1) :]
        end = len(data) - max((_overlap(tail, variant) for variant in self._variants), default=0)
        if self._pattern is not None:
            for found in self._pattern.finditer(data):
                if found.start() < end < found.end():
                    return found.start()
        return end


class RedactedStream:
    """Redacts bytes that come in pieces: what may be the beginning of a value waits for the next piece.

    Args:
        redactor: What is looked for.
    """

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take what came; return what can be shown by now."""
        data = self._held + data
        end = self._redactor.decided(data)
        self._held = data[end:]
        return self._redactor.raw(data[:end])

    def end(self) -> bytes:
        """Return what was still held: no more will come."""
        held, self._held = self._held, b""
        return self._redactor.raw(held)


def variants(value: str) -> set[str]:
    """Return how ``value`` may appear, the longer ones of its lines included."""
    lines = [line for line in value.splitlines() if len(line) >= _MIN_LINE]
    found: set[str] = set()
    for text in {value, value.strip(), *lines}:
        raw = text.encode(errors="surrogateescape")
        found |= {text, *_in_json(text)}
        found |= {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        found |= {re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), quote(raw, safe=""))}
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            found = found.union(*(_inner(encode, raw, offset) for offset in range(3)))
    return {text for text in found if len(text) >= MIN_LENGTH}


def _in_json(text: str) -> Iterator[str]:
    """Yield ``text`` as libraries write it in JSON: with the escapes that are needed, and with others."""
    for ascii_alone in (True, False):
        written = json.dumps(text, ensure_ascii=ascii_alone)[1:-1]
        for chars in _ESCAPED:
            bare = written.replace('\\"', '"') if '"' in chars else written
            for code in _CODES:
                escaped = bare.translate({ord(char): code % ord(char) for char in chars})
                yield escaped
                yield escaped.replace("/", "\\/")  # PHP


def _inner(encode: Callable[[bytes], bytes], raw: bytes, offset: int) -> set[str]:
    """Return the base64 of ``raw``, ``offset`` bytes into a group, without what the bytes before it decide.

    Once up to what the bytes behind it decide, and as it is where none follow, padded and not.
    """
    encoded = encode(b"\0" * offset + raw).decode()
    first = -(-offset * 8 // 6)
    last = (offset + len(raw)) * 8 // 6
    found = {encoded[first:last], encoded[first:], encoded[first:].rstrip("=")}
    return found if last - first >= _MIN_ENCODED else set()


def _overlap(tail: bytes, variant: bytes) -> int:
    """Return the length of the longest end of ``tail`` with which ``variant`` begins, but for all of it."""
    start = max(0, len(tail) - len(variant) + 1)
    while (start := tail.find(variant[:1], start)) >= 0:
        if variant.startswith(tail[start:]):
            return len(tail) - start
        start += 1
    return 0
