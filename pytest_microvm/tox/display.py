"""Show a machine's output on this terminal: colours and progress bars work, other sequences do not."""

from __future__ import annotations

import codecs
import re

from pytest_microvm.untrusted.text import sanitize

# Sequences that act within the current line; those that could overwrite other lines are made visible.
_HARMLESS = re.compile(r"\r+|\x08+|\x1b\[[0-9;]{0,30}[CDGKm]")
_UNFINISHED = re.compile(r"\x1b(\[[0-9;]{0,30})?\Z|\r\Z")
_MARK = "\ufdd0"  # a noncharacter, which valid text does not contain


class TerminalText:
    """Makes output of a machine's terminal safe for this terminal, piece by piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> bytes:
        """Return output that is ready to be written; an incomplete control sequence is held back."""
        text = self._held + self._decoder.decode(data, final)
        self._held = ""
        unfinished = None if final else _UNFINISHED.search(text)
        if unfinished is not None:
            text, self._held = text[: unfinished.start()], unfinished[0]
        kept: list[str] = []

        def keep(found: re.Match[str]) -> str:
            kept.append(found[0])
            return _MARK

        safe = sanitize(_HARMLESS.sub(keep, text.replace(_MARK, "")))
        pieces = safe.split(_MARK)
        return "".join(
            piece + (kept[number] if number < len(kept) else "") for number, piece in enumerate(pieces)
        ).encode(errors="replace")
