"""Make text from a guest safe to show: no terminal control but colour, no CI workflow commands."""

from __future__ import annotations

import re

MAX_TEXT = 4 * 1024 * 1024

_COLOUR = r"\x1b\[[0-9;]{0,30}m"
_UNSAFE = re.compile(
    "(" + _COLOUR + ")|([\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff])"
)
# GitHub takes "::" at the start of a line; it, Azure and TeamCity take "##[", "##vso[", ... anywhere.
_COMMAND = re.compile(rf"^((?:[^\S\n]|{_COLOUR})*)(::)|(#)(#(?:vso|teamcity)?\[)", re.MULTILINE)


def sanitize(text: str, limit: int = MAX_TEXT) -> str:
    r"""Return ``text`` with control characters made visible and cut to ``limit`` characters.

    Newlines, tabs and colours (SGR sequences) stay. Bidirectional overrides and lone surrogates count
    as control characters. Commands that CI systems obey (``::name::`` at the start of a line, ``##[...]``)
    get a visible ``\`` inside.
    """
    if len(text) > limit:
        text = f"{text[:limit]}\n[{len(text) - limit} more characters were cut]"
    text = _UNSAFE.sub(_visible, text.replace("\r\n", "\n"))
    return _COMMAND.sub(lambda found: f"{found[1] or found[3] or ''}\\{found[2] or found[4]}", text)


def sanitize_line(text: str, limit: int = 4096) -> str:
    """Return ``text`` as one line (a node id, a name, a path): newlines and tabs are made visible too."""
    text = text[:limit]
    return _UNSAFE.sub(_visible, text.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\t", "\\t"))


def _visible(match: re.Match[str]) -> str:
    if match[1]:
        return match[1]
    code = ord(match[2])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"  # noqa: PLR2004
