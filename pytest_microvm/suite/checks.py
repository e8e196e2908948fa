"""Validate JSON values that a guest sent: expected type, bounded, or :class:`ProtocolViolation`."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from pytest_microvm.errors import ProtocolViolation
from pytest_microvm.untrusted.text import sanitize, sanitize_line
from pytest_microvm.wire.fields import is_whole

MAX_LINE = 32 * 1024 * 1024
MAX_LIST = 1_000_000
MAX_VALUES = 2_000_000
"""JSON values in the records about one test. Each costs some 64 bytes of memory, but two or three in JSON."""
MAX_COLLECTED_VALUES = 20_000_000
"""JSON values in the records of a collection, few of which are kept."""

_MAX_PATHS = 100_000
_MAX_DIGITS = 1000  # before 3.10.7, Python parses integers in quadratic time
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # no closing quote: up to the end, at once


def violation(what: str) -> ProtocolViolation:
    """Return the error for a guest that sent ``what`` (our own words, never the guest's)."""
    return ProtocolViolation(
        f"the guest's pytest sent {what}", resolution="the machine was ended; its report cannot be used"
    )


class Records:
    """A reader for the records of one answer, which together may hold at most ``limit`` values.

    Without the limit, ``[[],[],...]`` would grow to more than twenty times its size when parsed.
    """

    def __init__(self, limit: int = MAX_VALUES) -> None:
        self._left = limit

    def read(self, line: bytes) -> dict[str, Any]:
        """Return the JSON object in ``line``.

        Raises:
            ProtocolViolation: The line is not a JSON object, is too long, or exceeds the limit of values.
        """
        if len(line) > MAX_LINE:
            raise violation(f"a record of more than {MAX_LINE} bytes")
        self._left -= _count_values(line, self._left)
        if self._left < 0:
            raise violation("too many values")
        try:
            value = _DECODER.decode(line.decode())
        except (ValueError, RecursionError):
            raise violation("a record that is not JSON") from None
        if not isinstance(value, dict):
            raise violation("a record that is not a JSON object")
        return value


def _count_values(line: bytes, enough: int) -> int:
    """Return an upper bound of the values in ``line``, computed precisely where it could matter."""
    roughly = sum(map(line.count, (b",", b"[", b"{"))) + 1
    if roughly <= min(enough, len(line) // 100):
        return roughly
    return sum(map(_STRING.sub(b"", line).count, (b",", b"[", b"{"))) + 1


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("a number with too many digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_whole)


def text(value: object, what: str) -> str:
    """Return ``value`` as text that is safe to show."""
    if not isinstance(value, str):
        raise violation(f"a {what} that is not text")
    return sanitize(value)


def line(value: object, what: str) -> str:
    """Return ``value`` as one line that is safe to show."""
    if not isinstance(value, str):
        raise violation(f"a {what} that is not text")
    return sanitize_line(value)


def path(value: object, what: str) -> str:
    """Return ``value`` as a safe line that, followed by a colon, cannot form a CI workflow command."""
    shown = line(value, what)
    return f"\\{shown}" if shown.lstrip().startswith(":") else shown


def choice(value: object, allowed: frozenset[str], what: str) -> str:
    """Return ``value`` if it is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise violation(f"an unknown {what}")
    return value


def integer(value: object, what: str, low: int = 0, high: int = 2**53) -> int:
    """Return ``value`` as a whole number between ``low`` and ``high``."""
    if not is_whole(value, low, high):
        raise violation(f"a {what} that is not a number in its range")
    return value


def seconds(value: object) -> float:
    """Return ``value`` as a finite number of seconds, not below 0; 0 if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0.0
    return float(value) if 0 <= value < 2**53 else 0.0


def data(value: object, what: str) -> bytes:
    """Return the bytes that ``value`` encodes in base64."""
    if not isinstance(value, str):
        raise violation(f"{what} that is not text")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError:
        raise violation(f"{what} that is not base64") from None


def array(value: object, what: str, limit: int = MAX_LIST) -> list[Any]:
    """Return ``value`` as a list of at most ``limit`` entries."""
    if not isinstance(value, list) or len(value) > limit:
        raise violation(f"a {what} that is not a list of at most {limit} entries")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """Return ``value`` as a JSON object."""
    if not isinstance(value, dict):
        raise violation(f"a {what} that is not an object")
    return value


def paths(value: object) -> tuple[str, ...]:
    """Return a list of paths as the guest wrote them: not safe to show.

    Raises:
        ProtocolViolation: It is not a list of texts.
    """
    found = array(value, "list of files", _MAX_PATHS)
    if not all(isinstance(path, str) for path in found):
        raise violation("a path that is not a text")
    return tuple(found)


def plain(value: object, depth: int = 0) -> Any:
    """Return any JSON value with safe texts and a bounded depth."""
    if isinstance(value, str):
        return sanitize(value)
    if depth > 10:  # noqa: PLR2004 - deeper than marker arguments and properties are
        return "..."
    if isinstance(value, list):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {sanitize_line(str(key)): plain(item, depth + 1) for key, item in value.items()}
    return value
