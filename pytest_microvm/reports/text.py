"""Text of unknown origin, made safe for a report: cut visibly, valid in XML, without commands."""

from __future__ import annotations

import re

from pytest_microvm.untrusted.text import sanitize, sanitize_line

TEXT_LIMIT = 1024 * 1024
"""Characters of one text, such as a traceback, that are kept."""
NAME_LIMIT = 1000
"""Characters of one name that are kept."""

_COLOUR = re.compile(r"\x1b\[[0-9;]{0,30}m")
# Jenkins and GitLab obey these in what a test printed; Jenkins takes the file, wherever it is.
_ATTACHMENT = re.compile(r"(\[\[ATTACHMENT)(\|)", re.IGNORECASE)


def safe_text(text: str, limit: int = TEXT_LIMIT) -> str:
    r"""Return ``text`` as a report may have it.

    Control characters are visible, colours are gone, and what CI systems obey (``::error::``, ``##[...]``,
    ``[[ATTACHMENT|...]]``) has a visible ``\`` inside. Every character is one that XML 1.0 allows.

    Args:
        text: Anything.
        limit: How many characters are kept; what is left out, is left out of the middle, and told.
    """
    plain = _COLOUR.sub("", sanitize(cut(text, limit), 2 * limit + 100))
    return _ATTACHMENT.sub(r"\1\\\2", plain)


def safe_name(text: str, limit: int = NAME_LIMIT) -> str:
    """Return ``text`` as one line that a report may have as a name."""
    line = sanitize_line(cut(text, limit), 2 * limit + 100).strip()
    return _ATTACHMENT.sub(r"\1\\\2", line)


def cut(text: str, limit: int) -> str:
    """Return ``text`` with what is beyond ``limit`` characters left out of its middle, which is told.

    The end is longer than the beginning: that is where the reason of a failure is.
    """
    beyond = len(text) - limit
    if beyond <= 0:
        return text
    head = limit // 4
    return f"{text[:head]}[... {beyond:,} characters left out]{text[head + beyond :]}"


def first_line(text: str, limit: int = NAME_LIMIT) -> str:
    """Return the first line of ``text`` that says something."""
    return next((line.strip()[:limit] for line in text.splitlines() if line.strip()), "")
