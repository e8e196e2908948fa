"""Take secret values out of text and bytes, as they are and as programs commonly encode them.

A value is found as it is, escaped as in JSON, URL-encoded, and inside of base64: both alphabets, at any
offset, as in ``user:token`` of basic authentication; cut into lines if nothing is before it. In texts, its
beginning and end are also found around three dots, as in pytest's reports. It is not found where a program
changed it otherwise: redaction keeps accidents out of logs, it does not keep a secret from code that wants to
tell it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import AnyStr, Generic
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
_LINES = (57, 48)  # bytes in a line of base64, as base64(1) and Python write it, and as openssl(1) does
MIN_PART = 6
"""Characters of a value that was cut short, on one side, which are looked for."""
_MAX_PART = 256  # pytest shows up to 240 characters of a value, around the middle that it leaves out
_LEFT_OUT = re.compile(r"\.{3,}|\N{HORIZONTAL ELLIPSIS}")


class _Words(Generic[AnyStr]):
    """Finds any of many words, where several begin at one place the longest.

    However many they are, what takes time is a pattern of their first characters: a key in PEM has a thousand
    lines in their encodings, and a machine may say gigabytes.

    Args:
        words: None is shorter than ``MIN_LENGTH``.
    """

    def __init__(self, words: Iterable[AnyStr]) -> None:
        self._by_head: dict[AnyStr, list[AnyStr]] = {}
        for word in sorted(words, key=lambda word: (-len(word), word)):
            self._by_head.setdefault(word[:MIN_LENGTH], []).append(word)
        self._longest = max((len(found[0]) for found in self._by_head.values()), default=0)
        self._shorter: set[AnyStr] = {head[:size] for head in self._by_head for size in range(1, MIN_LENGTH)}
        self._heads: re.Pattern[AnyStr] | None = _pattern(sorted(self._by_head)) if self._by_head else None

    def __bool__(self) -> bool:
        return self._heads is not None

    def find(self, text: AnyStr) -> Iterator[tuple[int, int]]:
        """Yield where each word begins and ends, from left to right."""
        position = 0
        while self._heads is not None and (head := self._heads.search(text, position)):
            begin = head.start()
            found = next((word for word in self._by_head[head[0]] if text.startswith(word, begin)), None)
            position = begin + (len(found) if found else 1)
            if found:
                yield begin, position

    def unfinished(self, text: AnyStr) -> int:
        """Return how many characters at the end of ``text`` begin a word that does not end there."""
        start = position = max(0, len(text) - self._longest + 1)
        while self._heads is not None and (head := self._heads.search(text, position)):
            rest = text[head.start() :]
            if any(len(word) > len(rest) and word.startswith(rest) for word in self._by_head[head[0]]):
                return len(rest)
            position = head.start() + 1
        sizes = range(min(MIN_LENGTH - 1, len(text) - start), 0, -1)
        return next((size for size in sizes if text[-size:] in self._shorter), 0)


def _pattern(heads: list[AnyStr]) -> re.Pattern[AnyStr]:
    """Return a pattern of words of one length that looks at each character of a text once or twice."""
    if isinstance(heads[0], str):
        return re.compile(_branches(heads))
    return re.compile(_branches([head.decode("latin-1") for head in heads]).encode("latin-1"))


def _branches(words: list[str]) -> str:
    below: dict[str, list[str]] = {}
    for word in words:
        below.setdefault(word[0], []).append(word[1:])
    parts = [re.escape(first) + (_branches(rest) if rest[0] else "") for first, rest in below.items()]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


class Redactor:
    """Replaces secret values by ``***``.

    Args:
        values: What is secret.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        values = [value for value in values if len(value) >= MIN_LENGTH]
        shown = {variant for value in values for variant in variants(value)}
        self._bytes = _Words({variant.encode(errors="surrogateescape") for variant in shown})
        self._text = _Words(shown)
        whole = {text for value in values for text in (value, value.strip(), *_escaped(value))}
        self._whole = sorted(text for text in whole if len(text) > MIN_PART)

    def __bool__(self) -> bool:
        return bool(self._bytes)

    def text(self, text: str) -> str:
        """Return ``text`` without the values, and without the two ends of one that was cut short."""
        if not self._text:
            return text
        return self._without_parts(_masked(text, self._text.find(text), MASK))

    def raw(self, data: bytes) -> bytes:
        """Return ``data`` without the values."""
        return _masked(data, self._bytes.find(data), MASK.encode()) if self else data

    def _without_parts(self, text: str) -> str:
        """Mask what is left of a value where something was left out, as pytest shows ``'s3cr...f=42'``."""
        spans: list[tuple[int, int]] = []
        for dots in _LEFT_OUT.finditer(text):
            lowest = max(spans[-1][1] if spans else 0, dots.start() - _MAX_PART)
            begin = min((_head_of(whole, text, lowest, dots.start()) for whole in self._whole), default=0)
            end = max((_tail_of(whole, text, dots.end()) for whole in self._whole), default=0)
            spans += [span for span in ((begin, dots.start()), (dots.end(), end)) if span[0] < span[1]]
        return _masked(text, spans, MASK)

    def tree(self, value: object) -> object:
        """Return a value of JSON with every text in it, keys too, redacted."""
        if not self._text:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        return [self.tree(item) for item in value] if isinstance(value, list) else value

    def decided(self, data: bytes) -> int:
        """Return how many bytes of ``data`` cannot become part of a (longer) value with what follows."""
        return self.split(data)[0]

    def split(self, data: bytes) -> tuple[int, bytes]:
        """Return how many bytes of ``data`` are decided (see :meth:`decided`), and these without values."""
        end = len(data) - self._bytes.unfinished(data)
        spans = []
        for begin, stop in self._bytes.find(data):
            if stop > end:
                end = min(end, begin)
                break
            spans.append((begin, stop))
        return end, _masked(data[:end], spans, MASK.encode())


def _masked(text: AnyStr, spans: Iterable[tuple[int, int]], mask: AnyStr) -> AnyStr:
    position = 0
    parts: list[AnyStr] = []
    for begin, end in spans:
        parts += [text[position:begin], mask]
        position = end
    parts.append(text[position:])
    return text[:0].join(parts)


def _head_of(whole: str, text: str, lowest: int, end: int) -> int:
    """Return where, not before ``lowest``, the beginning of ``whole`` begins that ends at ``end``."""
    begin = text.find(whole[:MIN_PART], lowest, end)
    while begin >= 0 and not whole.startswith(text[begin:end]):
        begin = text.find(whole[:MIN_PART], begin + 1, end)
    return begin if begin >= 0 else end


def _tail_of(whole: str, text: str, begin: int) -> int:
    """Return where the end of ``whole`` ends that begins at ``begin``."""
    found = text.rfind(whole[-MIN_PART:], begin, begin + _MAX_PART)
    while found >= 0 and not whole.endswith(text[begin : found + MIN_PART]):
        found = text.rfind(whole[-MIN_PART:], begin, found + MIN_PART - 1)
    return found + MIN_PART if found >= 0 else begin


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
        end, shown = self._redactor.split(data)
        self._held = data[end:]
        return shown

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
        found |= {text, *_escaped(text)}
        found |= {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        found |= {re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), quote(raw, safe=""))}
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            found = found.union(*(_inner(encode, raw, offset) for offset in range(3)))
    raw = value.encode(errors="surrogateescape")
    for size in _LINES:
        for start in range(0, len(raw) if len(raw) > size else 0, size):
            found |= _inner(base64.standard_b64encode, raw[start : start + size], 0)
    return {text for text in found if len(text) >= MIN_LENGTH}


def _escaped(text: str) -> Iterator[str]:
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
    return {text for text in found if len(text) >= _MIN_ENCODED}
