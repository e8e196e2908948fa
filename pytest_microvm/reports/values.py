"""The content of a JUnit file as values, independent of its dialect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["failure", "error", "skipped"]
Outcome = Literal["passed", "failed", "error", "skipped"]
Properties = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason that a test did not pass.

    Args:
        kind: ``failure``, ``error`` or ``skipped``.
        message: Summary in a line or two.
        text: Full text, for example a traceback.
        type: Its type as the tool names it: an exception's name.
    """

    kind: Kind
    message: str = ""
    text: str = ""
    type: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One test, with all its attempts.

    Args:
        classname: Its place: a module, a class, a file.
        name: Its name there.
        file: The file it is defined in, relative to the repository.
        line: The line there; the first is 1.
        seconds: How long it took.
        problems: The reasons that it did not pass; none if it did.
        attempts: Failures of other attempts; a test that passed and has some is flaky.
        out: Its stdout.
        err: Its stderr.
        properties: Names and values.
        claims: Files that the report claims belong to it, unverified.
        attachments: Files that belong to it, verified.
    """

    classname: str
    name: str
    file: str = ""
    line: int | None = None
    seconds: float = 0.0
    problems: tuple[Problem, ...] = ()
    attempts: tuple[Problem, ...] = ()
    out: str = ""
    err: str = ""
    properties: Properties = ()
    claims: tuple[str, ...] = ()
    attachments: tuple[Path, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """The overall result of the test."""
        kinds = {problem.kind for problem in self.problems}
        if "error" in kinds:
            return "error"
        if "failure" in kinds:
            return "failed"
        return "skipped" if kinds else "passed"

    @property
    def flaky(self) -> bool:
        """True if it passed after it had failed."""
        return self.outcome == "passed" and bool(self.attempts)


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that ran together.

    Args:
        name: The suite's name.
        cases: The tests.
        scope: A prefix for their class names where a reader does not separate suites.
        properties: Names and values.
        timestamp: Time of their start, ISO 8601.
        hostname: Host that they ran on.
        out: Stdout outside any test.
        err: Stderr outside any test.
    """

    name: str
    cases: tuple[Case, ...] = ()
    scope: str = ""
    properties: Properties = ()
    timestamp: str = ""
    hostname: str = ""
    out: str = ""
    err: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The content of one file.

    Args:
        suites: Suites with tests; if the file could not be read, one of them reports that.
        trouble: Why it could not be read to its end; empty if it could.
    """

    suites: tuple[Suite, ...]
    trouble: str = ""
