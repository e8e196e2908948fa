"""Make text from a guest safe to show: no terminal control but colour, no CI workflow commands."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_TEXT = 4 * 1024 * 1024

_COLOUR = r"\x1b\[[0-9;]{0,30}m"
# Controls, writing direction marks, line ends of splitlines(), invisible tags, lone surrogates (which cannot
# be encoded), and characters that XML cannot contain.
_CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb"
    "\ufffe\uffff\U000e0000-\U000e007f"
)
_UNSAFE = re.compile(f"({_COLOUR})|([{_CONTROLS}])")
# In a name also invisible characters: the name could pass for another.
_UNSAFE_NAME = re.compile(f"[{_CONTROLS}\t\n\u200b-\u200d\u2060-\u2065\ufeff]")
# GitHub obeys "::" at the start of a line; GitHub, Azure and TeamCity obey "##[", "##vso[", ... anywhere.
# Colours inside are ignored: a display may drop them.
_ANY = f"(?:{_COLOUR})*"
_WORD = "|".join(_ANY.join([*word, r"\["]) for word in ("", "vso", "teamcity"))
_COMMAND = re.compile(rf"^((?:[^\S\n]|{_COLOUR})*:{_ANY})(:)|(#{_ANY})(#{_ANY}(?:{_WORD}))", re.MULTILINE)
# The first part of such a command at the end of a text: the next text on the same line may have the rest.
_STARTS = "|".join(_ANY.join(word[:end]) for word in ("vso", "teamcity") for end in range(1, len(word) + 1))
_BEGUN = re.compile(
    rf"^(?:[^\S\n]|{_COLOUR})*:{_ANY}\Z|#{_ANY}\Z|#{_ANY}#{_ANY}\Z|#{_ANY}#{_ANY}(?:{_STARTS}){_ANY}\Z",
    re.MULTILINE,
)

# The first part of a line end or of a colour at the end of a text.
_CUT = re.compile(r"(?:\r|\x1b|\x1b\[[0-9;]{0,30})\Z")
COLOUR = re.compile(_COLOUR)
"""A colour, or another display attribute of text (SGR)."""
BLANK = re.compile(rf"(?:[^\S\n]|{_COLOUR})*")
"""A part of a line that shows nothing: a CI command may follow it."""


def sanitize(text: str, limit: int = MAX_TEXT) -> str:
    r"""Return ``text`` with control characters made visible and cut to ``limit`` characters.

    Newlines, tabs and colours (SGR sequences) stay. Bidirectional overrides and lone surrogates count
    as control characters. Commands that CI systems obey (``::name::`` at the start of a line, ``##[...]``)
    get a visible ``\`` inside.
    """
    if len(text) > limit:
        text = f"{text[:limit]}\n[{len(text) - limit} more characters were cut]"
    text = _UNSAFE.sub(_visible, text.replace("\r\n", "\n"))
    return _COMMAND.sub(_defused, text)


def sanitize_part(text: str) -> str:
    r"""Return ``text`` as :func:`sanitize` does, safe also if more text follows on its last line.

    A command that begins at its end gets its ``\`` there.
    """
    safe = sanitize(text)
    return f"{safe}\\" if _BEGUN.search(safe) else safe


def unfinished(text: str) -> int:
    """Return how many characters at the end of ``text`` could begin a line end, a colour or a command."""
    cut = _CUT.search(text)
    end = cut.start() if cut else len(text)
    begun = _BEGUN.search(text, 0, end)
    return len(text) - (begun.start() if begun else end)


def sanitize_line(text: str, limit: int = 4096) -> str:
    """Return ``text`` as one line (a node id, a path): newlines, tabs and colours are made visible too."""
    return _COMMAND.sub(_defused, _UNSAFE_NAME.sub(lambda found: _escape(found[0]), text[:limit]))


def safe_json(value: Any, *, indent: int | None = None) -> str:
    r"""Return ``value`` as JSON that is safe to show; parsing it returns ``value``.

    JSON escapes control characters anyway. In ``##[...]`` (see :func:`sanitize`), one ``#`` is written as
    ``\u0023``: in JSON, ``#`` occurs only in strings.
    """
    return json.dumps(value, indent=indent).replace("##", r"#\u0023")


def _defused(command: re.Match[str]) -> str:
    return f"{command[1] or command[3]}\\{command[2] or command[4]}"


def _visible(found: re.Match[str]) -> str:
    return found[1] or _escape(found[2])


def _escape(char: str) -> str:
    if char in "\n\t":
        return "\\n" if char == "\n" else "\\t"
    code = ord(char)
    if code > 0xFFFF:  # noqa: PLR2004 - as Python writes them
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"  # noqa: PLR2004
