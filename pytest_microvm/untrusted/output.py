"""Output of a command in a machine, as text that is safe to show while it arrives."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator

from pytest_microvm.untrusted.text import BLANK, COLOUR, sanitize, sanitize_part, unfinished

_MAX_LINE = 64 * 1024  # characters without a newline that are held back
_MAX_UNFINISHED = 4096  # characters that may be the beginning of a command
_RESETS = frozenset("\x1b[0;m")


def safe_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield blocks of whole lines, with their newlines; an overlong line is yielded in parts.

    Nothing in it can act on a terminal or a CI system.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    for data in pieces:
        held += decoder.decode(data)
        whole, newline, held = held.rpartition("\n")
        if len(held) > _MAX_LINE:
            whole, newline, held = whole + newline + held, "", ""
        if whole or newline:
            yield sanitize_part(whole + newline)
    held += decoder.decode(b"", final=True)
    if held:
        yield sanitize_part(held)


class LiveText:
    """Output as text that is safe to show, without waiting for the end of a line.

    Only what could be the first part of a character, a colour or a command waits for the next piece.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._begun = False  # whether the present line shows anything yet
        self._coloured = False

    def feed(self, data: bytes) -> str:
        """Add a piece; return what can be shown by now."""
        text = self._held + self._decoder.decode(data)
        held = unfinished(self._in_line(text))
        self._held = text[len(text) - held :]
        if held > _MAX_UNFINISHED:
            self._held = ""
            return self._shown(text, sanitize_part)
        return self._shown(text[: len(text) - held], sanitize)

    def end(self) -> str:
        """Return the rest, before text of another source, which has its own colours."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        shown = self._shown(text, sanitize_part)
        if self._coloured:
            shown += "\x1b[0m"
        self._begun = self._coloured = False
        return shown

    def _in_line(self, text: str) -> str:
        """Return ``text``, after a character if its first line has begun already: no command follows that."""
        return f".{text}" if self._begun else text

    def _shown(self, text: str, make_safe: Callable[[str], str]) -> str:
        safe = make_safe(self._in_line(text))[self._begun :]
        _before, newline, line = safe.rpartition("\n")
        self._begun = (self._begun and not newline) or not BLANK.fullmatch(line)
        colours = COLOUR.findall(safe)
        if colours:
            self._coloured = not _RESETS.issuperset(colours[-1])
        return safe
