"""What a JUnit file says: values, whatever dialect they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["failure", "error", "skipped"]
Outcome = Literal["passed", "failed", "error", "skipped"]
Properties = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a test did not pass.

    Args:
        kind: ``failure``, ``error`` or ``skipped``.
        message: In a line or two.
        text: All of it, a traceback for example.
        type: What its tool calls it: an exception's name.
    """

    kind: Kind
    message: str = ""
    text: str = ""
    type: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One test, whatever number of attempts it took.

    Args:
        classname: Where it is: a module, a class, a file.
        name: What it is called there.
        file: The file it is defined in, relative to the repository.
        line: The line there; the first is 1.
        seconds: How long it took.
        problems: Why it did not pass; none if it did.
        attempts: Failures of other attempts: of a test that passed in the end, what makes it flaky.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        properties: Names and values.
        claims: Files that the report says belong to it. Nobody has looked whether that is true.
        attachments: Files that do belong to it.
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
        """What came of it, in one word."""
        kinds = {problem.kind for problem in self.problems}
        if "error" in kinds:
            return "error"
        if "failure" in kinds:
            return "failed"
        return "skipped" if kinds else "passed"

    @property
    def flaky(self) -> bool:
        """Whether it passed after it had failed."""
        return self.outcome == "passed" and bool(self.attempts)


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that ran together.

    Args:
        name: What they are called together.
        cases: The tests.
        scope: What to put before their class names where a reader does not keep suites apart.
        properties: Names and values.
        timestamp: When they began, ISO 8601.
        hostname: Where.
        out: What was written to stdout outside any test.
        err: What was written to stderr outside any test.
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
    """One file.

    Args:
        suites: Those with tests in them; where it could not be read, one of them says so.
        trouble: Why it could not be read, or not to its end.
    """

    suites: tuple[Suite, ...]
    trouble: str = ""
