"""Make text of unknown origin safe for a report: visibly truncated, valid in XML, without commands."""

from __future__ import annotations

import re

from pytest_microvm.untrusted.text import sanitize, sanitize_line

TEXT_LIMIT = 1024 * 1024
"""Maximum characters of one text, such as a traceback; the rest is left out."""
NAME_LIMIT = 1000
"""Maximum characters of one name; the rest is left out."""

_COLOUR = re.compile(r"\x1b\[[0-9;]{0,30}m")
# Jenkins and GitLab obey these in a test's output; Jenkins takes the file, wherever it is.
_ATTACHMENT = re.compile(r"(\[\[ATTACHMENT)(\|)", re.IGNORECASE)


def safe_text(text: str, limit: int = TEXT_LIMIT) -> str:
    r"""Return ``text`` made safe for a report.

    Control characters become visible, colours are removed, and commands of CI systems (``::error::``,
    ``##[...]``, ``[[ATTACHMENT|...]]``) get a visible ``\`` inside. Every character is allowed in XML 1.0.

    Args:
        text: Anything.
        limit: Characters to keep; those beyond are left out of the middle, with a note.
    """
    plain = _COLOUR.sub("", sanitize(cut(text, limit), 2 * limit + 100))
    return _ATTACHMENT.sub(r"\1\\\2", plain)


def safe_name(text: str, limit: int = NAME_LIMIT) -> str:
    """Return ``text`` as one line, made safe for a name in a report."""
    line = sanitize_line(cut(text, limit), 2 * limit + 100).strip()
    return _ATTACHMENT.sub(r"\1\\\2", line)


def cut(text: str, limit: int) -> str:
    """Return ``text`` cut to ``limit`` characters, with a note in place of its middle.

    The end is longer than the beginning, because it has the reason of a failure.
    """
    beyond = len(text) - limit
    if beyond <= 0:
        return text
    head = limit // 4
    return f"{text[:head]}[... {beyond:,} characters left out]{text[head + beyond :]}"


def first_line(text: str, limit: int = NAME_LIMIT) -> str:
    """Return the first line of ``text`` that is not blank."""
    return next((line.strip()[:limit] for line in text.splitlines() if line.strip()), "")
