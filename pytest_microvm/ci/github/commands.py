"""Workflow commands in a step's output: write annotations, and disable commands in untrusted output.

Syntax: https://docs.github.com/actions/reference/workflow-commands-for-github-actions.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal

from pytest_microvm.untrusted.text import sanitize, sanitize_line

MOST_ANNOTATIONS = 10
"""Maximum number of annotations of one kind that GitHub shows for a step; a job may have 50."""

_TITLE_LIMIT = 250
_MESSAGE_LIMIT = 8 * 1024  # GitHub takes 64 KiB, people read a screen
_MATCHERS = ("python",)  # registered by actions/setup-python: it parses tracebacks, even a guest's


@dataclass(frozen=True)
class Annotation:
    """An annotation that GitHub shows on the job's page and in the diff.

    Args:
        level: The severity.
        message: The text.
        title: The line above the text.
        file: The file it refers to, relative to the repository's top; empty: no file.
        line: The line it refers to, counted from 1; 0: none.
    """

    level: Literal["notice", "warning", "error"]
    message: str
    title: str = ""
    file: str = ""
    line: int = 0

    def command(self) -> str:
        """Return the workflow command that creates the annotation."""
        properties = {"file": sanitize_line(self.file), "line": str(self.line) if self.line > 0 else ""}
        properties["title"] = sanitize_line(self.title, _TITLE_LIMIT)
        if not self.file:
            properties["line"] = ""
        given = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
        return f"::{self.level}{' ' if given else ''}{given}::{_data(sanitize(self.message, _MESSAGE_LIMIT))}"


def fitting(annotations: Sequence[Annotation], rest: str) -> list[Annotation]:
    """Return the annotations that GitHub shows in one step; per level, the last one counts those left out.

    Args:
        annotations: The most important first.
        rest: A readable name of the place that lists the others.
    """
    found: list[Annotation] = []
    for level in ("error", "warning", "notice"):
        kind = [annotation for annotation in annotations if annotation.level == level]
        if len(kind) > MOST_ANNOTATIONS:
            left = len(kind) - MOST_ANNOTATIONS + 1
            kind = [*kind[: MOST_ANNOTATIONS - 1], Annotation(kind[0].level, f"{left} more: see {rest}")]
        found += kind
    return found


@contextmanager
def stopped(output: IO[str]) -> Iterator[None]:
    """Disable workflow commands in all output that any process writes to the step meanwhile.

    The token that enables them again is random and written nowhere that a guest can read. The problem matcher
    of actions/setup-python is removed: it turns tracebacks, which a guest can print, into annotations.

    Args:
        output: The step's standard output.
    """
    word = secrets.token_hex(32)
    for owner in _MATCHERS:
        output.write(f"::remove-matcher owner={owner}::\n")
    output.write(f"::stop-commands::{word}\n")
    output.flush()
    try:
        yield
    finally:
        # On a separate line, even if the output before it ended without a newline.
        output.write(f"\n::{word}::\n")
        output.flush()


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
