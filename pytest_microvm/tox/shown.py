"""Make tox's own output safe: it repeats text of a project's configuration, such as commands and keys."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tox.report import ToxHandler

from pytest_microvm.untrusted.text import sanitize


class SafeStream:
    """A text stream that sanitizes text; bytes written to its buffer pass unchanged.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write sanitized text."""
        self._stream.write(sanitize(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install() -> None:
    """Sanitize tox's log, reports and tracebacks for the rest of the process."""
    if isinstance(sys.stdout, SafeStream):
        return
    show = ToxHandler.format

    def format_safely(self: ToxHandler, record: logging.LogRecord) -> str:
        return sanitize(show(self, record))

    ToxHandler.format = format_safely  # type: ignore[method-assign] # tox has no other way to reach its handler
    for name in ("stdout", "stderr"):
        setattr(sys, name, SafeStream(getattr(sys, name)))
