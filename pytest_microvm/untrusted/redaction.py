"""Take secret values out of text and bytes, as they are and as programs commonly encode them.

A value is found as it is, escaped as in JSON, URL-encoded, and inside of base64: both alphabets, at any
offset, as in ``user:token`` of basic authentication; cut into lines if nothing is before it. In texts, its
beginning and end are also found around three dots, as in pytest's reports. It is not found where a program
changed it otherwise: redaction keeps accidents out of logs, it does not keep a secret from code that wants to
tell it.

Such code must not make the search slow either: time is linear in the text, and hardly depends on how many
values there are. A library with Aho and Corasick's algorithm (``pyahocorasick``) would do that too, but is an
extension in C in the environment of the users' tests, and does not know what to hold of a stream.
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
_MAX_START = 128  # characters of a word that are looked for at once
_MAX_PATTERN = 8192  # characters of a pattern: compiling it takes 20 ms
_LEFT_OUT = re.compile(r"\.{3,}|\N{HORIZONTAL ELLIPSIS}")


class _Words(Generic[AnyStr]):
    """Finds any of many words, where several begin at one place the longest, in time linear in the text.

    A pattern finds how they begin: with as many characters of each as keep it small, since a key in PEM has a
    thousand lines in their encodings. Only words that it has not whole are looked up where it finds one.

    Args:
        words: None is shorter than ``MIN_LENGTH``.
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
        """Yield where each word begins and ends, from left to right."""
        position = 0
        while self._heads is not None and (head := self._heads.search(text, position)):
            begin, end = head.span()
            if head[0] in self._cut:
                end = begin + self._length_at(text, begin)
            if end > begin:
                yield begin, end
            position = max(end, begin + 1)

    def unfinished(self, text: AnyStr) -> int:
        """Return how many characters at the end of ``text`` begin a word that does not end there."""
        if self._begins(text):  # a long word that comes in small pieces: nothing else is looked at each time
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
        while at >= 0:  # what is not before the rest in order, and does not begin it, has what does
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
        """Tell whether what ``text`` has from a place on begins a word that is longer."""
        start = text[begin : begin + _MAX_START]
        for word in self._long.get(start, ()):
            if len(word) > len(text) - begin and word.startswith(text[begin:]):
                return True
        at = bisect_right(self._starts, start)
        is_short = 0 < len(text) - begin < _MAX_START
        return is_short and at < len(self._starts) and self._starts[at].startswith(start)


def _prefixes(words: list[AnyStr]) -> list[int]:
    """Return for each of some sorted words the number of the longest other one that it begins with, or -1."""
    found: list[int] = []
    for number, word in enumerate(words):
        before = number - 1
        while before >= 0 and not word.startswith(words[before]):
            before = found[before]
        found.append(before)
    return found


def _depth(words: list[AnyStr]) -> int:
    """Return how many characters of each word a pattern can have and stay small."""
    depth = _MAX_START
    while depth > MIN_LENGTH and sum(min(len(word), depth) for word in words) > _MAX_PATTERN:
        depth = max(MIN_LENGTH, depth * 3 // 4)
    return depth


def _pattern(words: set[AnyStr]) -> re.Pattern[AnyStr] | None:
    """Return a pattern that finds the longest of some words, which looks at few of them at each place."""
    if not words:
        return None
    first = next(iter(words))
    if isinstance(first, str):
        return re.compile(_branches(sorted(words)))
    return re.compile(_branches(sorted(word.decode("latin-1") for word in words)).encode("latin-1"))


def _branches(words: list[str], at: int = 0) -> str:
    """Return a pattern of what sorted words, which are the same up to ``at``, have from there on."""
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
    """Finds beginnings of values that end where something was left out, in time linear in the text.

    Args:
        wholes: The values; none is shorter than ``MIN_PART``.
    """

    def __init__(self, wholes: Iterable[str]) -> None:
        self._sorted = sorted({whole[:_MAX_PART] for whole in wholes})
        self._reach = max(map(len, self._sorted), default=0)
        self._firsts: re.Pattern[str] | None = _pattern({whole[:MIN_PART] for whole in self._sorted})

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each beginning begins and ends, from left to right."""
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
    """Replaces secret values by ``***``.

    Args:
        values: What is secret.
        keep_length: Replace each of their characters by ``*`` instead.
    """

    def __init__(self, values: Iterable[str] = (), *, keep_length: bool = False) -> None:
        self._values = frozenset(value for value in values if len(value) >= MIN_LENGTH)
        self._keep_length = keep_length

    def __bool__(self) -> bool:
        return bool(self._values)

    # Made when they are needed: a response is only searched as bytes, and most runs show few texts.

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
        """The values' beginnings, and their ends, which are read backwards."""
        whole = {text for value in self._values for text in (value, value.strip(), *_escaped(value))}
        whole = {text for text in whole if len(text) > MIN_PART}
        return _Beginnings(whole), _Beginnings(text[::-1] for text in whole)

    def text(self, text: str) -> str:
        """Return ``text`` without the values, and without the two ends of one that was cut short."""
        if not self:
            return text
        return self._without_parts(self._masked(text, self._text.find(text), MASK))

    def raw(self, data: bytes) -> bytes:
        """Return ``data`` without the values."""
        return self._masked(data, self._bytes.find(data), MASK.encode()) if self else data

    def _without_parts(self, text: str) -> str:
        """Mask what is left of a value where something was left out, as pytest shows ``'s3cr...f=42'``."""
        if not _LEFT_OUT.search(text):
            return text
        size = len(text)
        heads, tails = self._parts
        ends = ((size - end, size - begin) for begin, end in tails.find(text[::-1]))
        return self._masked(text, _joined([*heads.find(text), *ends]), MASK)

    def tree(self, value: object) -> object:
        """Return a value of JSON with every text in it, keys too, redacted."""
        if not self:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(key)): self.tree(item) for key, item in value.items()}
        return [self.tree(item) for item in value] if isinstance(value, list) else value

    def split(self, data: bytes) -> tuple[int, bytes]:
        """Return how many bytes of ``data`` cannot become part of a (longer) value with what follows.

        And these without values.
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
    """Yield spans from left to right, those that overlap as one."""
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
