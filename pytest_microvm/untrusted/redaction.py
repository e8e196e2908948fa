"""Redact secret values in text and bytes, verbatim and in the encodings that programs commonly use.

A value is found verbatim, JSON-escaped, URL-encoded, and inside of base64: in both alphabets, at any offset
(as in ``user:token`` of basic authentication), and split into lines if nothing is before it. In texts, its
beginning and end are also found around three dots, as in pytest's reports. A value that a program changed
otherwise is not found: redaction prevents accidental leaks into logs, it does not stop code that wants to
leak a secret.

Such code must not make the search slow either: time is linear in the text, and nearly independent of the
number of values. A library with Aho and Corasick's algorithm (``pyahocorasick``) would do that too, but is an
extension in C in the environment of the users' tests, and cannot tell how much of a stream to hold back.
"""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import groupby
from typing import AnyStr, Generic
from urllib.parse import quote, quote_plus

MASK = "***"
MIN_LENGTH = 4
"""Minimum characters of a value: shorter ones are part of ordinary words."""

_MIN_LINE = 16  # minimum characters of a line of a longer value (a key in PEM) that is searched by itself
_MIN_ENCODED = 8  # minimum characters of base64, which do not occur by chance
# Characters that JSON libraries escape needlessly, so that the text may stand in HTML: Go, Rails, PHP as an
# option; Gson; System.Text.Json. Tokens in base64 contain some of them.
_ESCAPED = ("", "<>&", "<>&='", "<>&'+`\"")
_CODES = ("\\u%04x", "\\u%04X")
_LINES = (57, 48)  # bytes in a line of base64, as base64(1) and Python write it, and as openssl(1) does
MIN_PART = 6
"""Minimum characters, on one side, of a truncated value."""
_MAX_PART = 256  # pytest shows up to 240 characters of a value, around the middle that it leaves out
_MAX_START = 128  # characters of a word that are matched at once
_MAX_PATTERN = 8192  # characters of a pattern: compiling it takes 20 ms
_LEFT_OUT = re.compile(r"\.{3,}|\N{HORIZONTAL ELLIPSIS}")


class _Words(Generic[AnyStr]):
    """Finds any of many words in time linear in the text; of several at one place, the longest.

    A pattern matches the beginnings of the words, as many characters of each as keep it small, since a key in
    PEM has a thousand lines in their encodings. Only words longer than that are looked up at each match.

    Args:
        words: Words of at least ``MIN_LENGTH`` characters.
    """

    def __init__(self, words: Iterable[AnyStr]) -> None:
        self._long: dict[AnyStr, list[AnyStr]] = {}  # by their first characters, the longest first
        self._short: set[AnyStr] = set()
        for word in sorted(words, key=len, reverse=True):
            if len(word) > _MAX_START:
                self._long.setdefault(word[:_MAX_START], []).append(word)
            else:
                self._short.add(word)
        self._starts: list[AnyStr] = sorted(self._short.union(self._long))
        self._within = _prefixes(self._starts)
        every = self._short.union(*self._long.values())
        self._longest = max(map(len, every), default=0)
        depth = _depth(self._starts)
        self._cut: set[AnyStr] = {word[:depth] for word in every if len(word) > depth}
        self._heads: re.Pattern[AnyStr] | None = _pattern({start[:depth] for start in self._starts})
        self._firsts: re.Pattern[AnyStr] | None = _pattern({start[:MIN_LENGTH] for start in self._starts})
        depth = _depth(list(self._long))
        self._long_starts: re.Pattern[AnyStr] | None = _pattern({start[:depth] for start in self._long})

    def find(self, text: AnyStr) -> Iterator[tuple[int, int]]:
        """Yield the start and end of each word, from left to right."""
        position = 0
        while self._heads is not None and (head := self._heads.search(text, position)):
            begin, end = head.span()
            if head[0] in self._cut:
                end = begin + self._length_at(text, begin)
            if end > begin:
                yield begin, end
            position = max(end, begin + 1)

    def unfinished(self, text: AnyStr) -> int:
        """Return the number of characters at the end of ``text`` that begin a word not complete there."""
        if self._begins(text):  # a long word that arrives in small pieces: skip the search below
            return len(text)
        for starts, most in ((self._long_starts, self._longest), (self._firsts, _MAX_START)):
            position = max(0, len(text) - most + 1)
            while starts is not None and (start := starts.search(text, position)):
                if self._begins(text, start.start()):
                    return len(text) - start.start()
                position = start.start() + 1
        sizes = range(min(MIN_LENGTH - 1, len(text)), 0, -1)
        return next((size for size in sizes if self._begins(text, len(text) - size)), 0)

    def _length_at(self, text: AnyStr, begin: int) -> int:
        """Return the length of the longest word at a place; 0 if none is there."""
        rest = text[begin : begin + _MAX_START]
        at = bisect_right(self._starts, rest) - 1
        while at >= 0:  # each prefix of the rest is the start sorted before it, or begins that start
            start = self._starts[at]
            if rest.startswith(start):
                for word in self._long.get(start, ()):
                    if text.startswith(word, begin):
                        return len(word)
                if start in self._short:
                    return len(start)
            at = self._within[at]
        return 0

    def _begins(self, text: AnyStr, begin: int = 0) -> bool:
        """Return True if ``text`` from ``begin`` on is the beginning of a longer word."""
        start = text[begin : begin + _MAX_START]
        for word in self._long.get(start, ()):
            if len(word) > len(text) - begin and word.startswith(text[begin:]):
                return True
        at = bisect_right(self._starts, start)
        is_short = 0 < len(text) - begin < _MAX_START
        return is_short and at < len(self._starts) and self._starts[at].startswith(start)


def _prefixes(words: list[AnyStr]) -> list[int]:
    """Return for each sorted word the index of the longest other word that it begins with, or -1."""
    found: list[int] = []
    for number, word in enumerate(words):
        before = number - 1
        while before >= 0 and not word.startswith(words[before]):
            before = found[before]
        found.append(before)
    return found


def _depth(words: list[AnyStr]) -> int:
    """Return the number of characters of each word with which a pattern stays small."""
    depth = _MAX_START
    while depth > MIN_LENGTH and sum(min(len(word), depth) for word in words) > _MAX_PATTERN:
        depth = max(MIN_LENGTH, depth * 3 // 4)
    return depth


def _pattern(words: set[AnyStr]) -> re.Pattern[AnyStr] | None:
    """Return a pattern that matches the longest of some words, and tries few of them at each place."""
    if not words:
        return None
    first = next(iter(words))
    if isinstance(first, str):
        return re.compile(_branches(sorted(words)))
    return re.compile(_branches(sorted(word.decode("latin-1") for word in words)).encode("latin-1"))


def _branches(words: list[str], at: int = 0) -> str:
    """Return a pattern for sorted words without their first ``at`` characters, which are the same."""
    if len(words) == 1:
        return re.escape(words[0][at:])
    pairs = enumerate(zip(words[0], words[-1], strict=False))
    same = next((place for place, (one, other) in pairs if one != other), len(words[0]))
    if same > at:
        return re.escape(words[0][at:same]) + _branches(words, same)
    ends = len(words[0]) == at
    groups = groupby(words[1:] if ends else words, key=lambda word: word[at])
    parts = [_branches(list(group), at) for _, group in groups]
    return f"(?:{'|'.join([*parts, ''] if ends else parts)})"


class _Beginnings:
    """Finds the beginnings of truncated values, before the dots, in time linear in the text.

    Args:
        wholes: The values, of at least ``MIN_PART`` characters.
    """

    def __init__(self, wholes: Iterable[str]) -> None:
        self._sorted = sorted({whole[:_MAX_PART] for whole in wholes})
        self._reach = max(map(len, self._sorted), default=0)
        self._firsts: re.Pattern[str] | None = _pattern({whole[:MIN_PART] for whole in self._sorted})

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield the span of each beginning, from left to right."""
        position, dots = 0, None
        while self._firsts is not None and (first := self._firsts.search(text, position)):
            begin, end = first.span()
            if dots is None or dots.start() < end:
                dots = _LEFT_OUT.search(text, end)
            if dots is None:
                return
            end, position = dots.start(), begin + 1
            if end - begin > self._reach:
                position = end - self._reach
            elif self._has(text[begin:end]):
                yield begin, end
                position = dots.end()

    def _has(self, part: str) -> bool:
        at = bisect_left(self._sorted, part)
        return at < len(self._sorted) and self._sorted[at].startswith(part)


class Redactor:
    """Replaces secret values with ``***``.

    Args:
        values: The secret values.
        keep_length: Replace each of their characters with ``*`` instead.
    """

    def __init__(self, values: Iterable[str] = (), *, keep_length: bool = False) -> None:
        self._values = frozenset(value for value in values if len(value) >= MIN_LENGTH)
        self._keep_length = keep_length

    def __bool__(self) -> bool:
        return bool(self._values)

    # Built at first use: a response is only searched as bytes, and most runs show few texts.

    @cached_property
    def _shown(self) -> set[str]:
        return {variant for value in self._values for variant in variants(value)}

    @cached_property
    def _bytes(self) -> _Words[bytes]:
        return _Words({variant.encode(errors="surrogateescape") for variant in self._shown})

    @cached_property
    def _text(self) -> _Words[str]:
        return _Words(self._shown)

    @cached_property
    def _parts(self) -> tuple[_Beginnings, _Beginnings]:
        """The finders of the values' beginnings and, in reversed text, of their ends."""
        whole = {text for value in self._values for text in (value, value.strip(), *_escaped(value))}
        whole = {text for text in whole if len(text) > MIN_PART}
        return _Beginnings(whole), _Beginnings(text[::-1] for text in whole)

    def text(self, text: str) -> str:
        """Return ``text`` with the values masked, also the two ends of a truncated one."""
        if not self:
            return text
        return self._without_parts(self._masked(text, self._text.find(text), MASK))

    def raw(self, data: bytes) -> bytes:
        """Return ``data`` with the values masked."""
        return self._masked(data, self._bytes.find(data), MASK.encode()) if self else data

    def _without_parts(self, text: str) -> str:
        """Mask the two ends of truncated values, which pytest shows as ``'s3cr...f=42'``."""
        if not _LEFT_OUT.search(text):
            return text
        size = len(text)
        heads, tails = self._parts
        ends = ((size - end, size - begin) for begin, end in tails.find(text[::-1]))
        return self._masked(text, _joined([*heads.find(text), *ends]), MASK)

    def tree(self, value: object) -> object:
        """Return a JSON value with all its texts redacted, including keys."""
        if not self:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        return [self.tree(item) for item in value] if isinstance(value, list) else value

    def split(self, data: bytes) -> tuple[int, bytes]:
        """Return the length of the part of ``data`` that can be redacted now, and that part redacted.

        Later data cannot make bytes of this part belong to a (longer) value.
        """
        if not self:
            return len(data), data
        end = len(data) - self._bytes.unfinished(data)
        spans = []
        for begin, stop in self._bytes.find(data) if end else ():
            if stop > end:
                end = min(end, begin)
                break
            spans.append((begin, stop))
        return end, self._masked(data[:end], spans, MASK.encode())

    def _masked(self, text: AnyStr, spans: Iterable[tuple[int, int]], mask: AnyStr) -> AnyStr:
        position = 0
        parts: list[AnyStr] = []
        for begin, end in spans:
            parts += [text[position:begin], mask[:1] * (end - begin) if self._keep_length else mask]
            position = end
        parts.append(text[position:])
        return text[:0].join(parts)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield spans from left to right, with overlapping ones merged."""
    begin = end = 0
    for start, stop in sorted(spans):
        if start < end:
            end = max(end, stop)
            continue
        if begin < end:
            yield begin, end
        begin, end = start, stop
    if begin < end:
        yield begin, end


class RedactedStream:
    """Redacts bytes that arrive in pieces; a possible beginning of a value is held until the next piece.

    Args:
        redactor: Finds the values.
    """

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Add a piece; return the redacted bytes that can be shown by now."""
        data = self._held + data
        end, shown = self._redactor.split(data)
        self._held = data[end:]
        return shown

    def end(self) -> bytes:
        """Return the bytes still held, redacted, at the end of the stream."""
        held, self._held = self._held, b""
        return self._redactor.raw(held)


def variants(value: str) -> set[str]:
    """Return the forms in which ``value`` may appear, including those of its longer lines."""
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
    """Yield ``text`` as libraries write it in JSON, with the needed escapes and with others."""
    for ascii_alone in (True, False):
        written = json.dumps(text, ensure_ascii=ascii_alone)[1:-1]
        for chars in _ESCAPED:
            bare = written.replace('\\"', '"') if '"' in chars else written
            for code in _CODES:
                escaped = bare.translate({ord(char): code % ord(char) for char in chars})
                yield escaped
                yield escaped.replace("/", "\\/")  # PHP


def _inner(encode: Callable[[bytes], bytes], raw: bytes, offset: int) -> set[str]:
    """Return base64 forms of ``raw``, ``offset`` bytes into a group, without what earlier bytes affect.

    One is also without what later bytes affect; two are for the end of the data, padded and not.
    """
    encoded = encode(b"\0" * offset + raw).decode()
    first = -(-offset * 8 // 6)
    last = (offset + len(raw)) * 8 // 6
    found = {encoded[first:last], encoded[first:], encoded[first:].rstrip("=")}
    return {text for text in found if len(text) >= _MIN_ENCODED}
