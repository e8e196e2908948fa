"""Match paths of requests with paths of rules, and detect paths that servers interpret differently."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

EVERY_PATH = "/*"
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_WRITTEN = re.compile(r"/(?:[!$&'()*+,\-./0-9:=@A-Z_a-z~]|%[0-9A-Fa-f]{2})*")  # RFC 3986 without ";"
_TELLING = frozenset(b"/\\;%?#\x7f") | frozenset(range(0x20))


def plain_path(path: str) -> str | None:
    r"""Return a request's path unescaped, or ``None`` if servers may interpret it differently.

    Such paths have dot segments, empty segments, ``\``, ``;parameters``, escaped slashes or percent signs, or
    characters that are invalid in a URL.

    Args:
        path: The raw path of the request, without the query.
    """
    if not _WRITTEN.fullmatch(path):
        return None
    if any(int(found[1], 16) in _TELLING for found in _ESCAPE.finditer(path)):
        return None
    try:
        plain = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        return None
    if "//" in plain or any(segment in (".", "..") for segment in plain.split("/")):
        return None
    return plain


def is_allowed_by(pattern: str, path: str) -> bool:
    """Return True if a rule's path allows a request's: ``/a/*`` all below ``/a/``, ``/a`` only itself."""
    if pattern == EVERY_PATH:
        return True
    plain = plain_path(path)
    return plain is not None and (
        plain.startswith(pattern[:-1]) if pattern.endswith("/*") else plain == pattern
    )


def is_denied_by(pattern: str, path: str) -> bool:
    """Return True if a rule's path denies a request's.

    All paths match that a server may treat as the same: in other case, with a trailing slash, and every
    ambiguous path (see :func:`plain_path`).
    """
    if pattern == EVERY_PATH:
        return True
    plain = plain_path(path)
    if plain is None:
        return True
    asked, forbidden = plain.casefold().rstrip("/"), pattern.casefold().removesuffix("*").rstrip("/")
    return asked == forbidden or (pattern.endswith("/*") and asked.startswith(forbidden + "/"))
