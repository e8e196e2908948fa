"""What GitHub's runner obeys on a step's output: annotations, and how to make it obey nothing.

The syntax is that of https://docs.github.com/actions/reference/workflow-commands-for-github-actions.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal

from pytest_microvm.untrusted.text import sanitize, sanitize_line

MOST_ANNOTATIONS = 10
"""Annotations of one kind that GitHub shows for a step; a job has room for 50."""

_TITLE_LIMIT = 250
_MESSAGE_LIMIT = 8 * 1024  # GitHub takes 64 KiB, people read a screen
_MATCHERS = ("python",)  # what actions/setup-python registers: it reads tracebacks, also those of guests


@dataclass(frozen=True)
class Annotation:
    """A remark that GitHub shows on the job's page and in the changes.

    Args:
        level: How bad it is.
        message: What is shown.
        title: The line above.
        file: What it is about, relative to the repository's top; empty: no file.
        line: Which line, the first is 1; 0: none.
    """

    level: Literal["notice", "warning", "error"]
    message: str
    title: str = ""
    file: str = ""
    line: int = 0

    def command(self) -> str:
        """Return the line that makes it."""
        properties = {"file": sanitize_line(self.file), "line": str(self.line) if self.line > 0 else ""}
        properties["title"] = sanitize_line(self.title, _TITLE_LIMIT)
        if not self.file:
            properties["line"] = ""
        given = ",".join(f"{name}={_property(value)}" for name, value in properties.items() if value)
        return f"::{self.level}{' ' if given else ''}{given}::{_data(sanitize(self.message, _MESSAGE_LIMIT))}"


def fitting(annotations: Sequence[Annotation], rest: str) -> list[Annotation]:
    """Return as many annotations as GitHub shows of a kind in one step; the last one tells of the others.

    Args:
        annotations: The most important first.
        rest: Where the others are told of, for people.
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
    """Let the runner obey nothing that is written to a step's output meanwhile, by whomever.

    The word that ends it is made up here and written nowhere that a guest can read. The matcher that
    actions/setup-python registers is taken away: it makes annotations of tracebacks, which a guest can print.

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
        # On a line of its own, wherever the output before it ended.
        output.write(f"\n::{word}::\n")
        output.flush()


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
