"""What a command in a machine says, as text that is safe to show while it comes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from pytest_microvm.untrusted.text import sanitize_part

_MAX_LINE = 64 * 1024  # characters without a newline that are held back


def safe_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield whole lines, some at a time, their newlines included; a line without end comes in parts.

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
