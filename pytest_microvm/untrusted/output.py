"""Output of a command in a machine, as text that is safe to show while it arrives."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from pytest_microvm.untrusted.text import sanitize_part

_MAX_LINE = 64 * 1024  # characters without a newline that are held back


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
