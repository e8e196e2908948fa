"""Write a JUnit file for one reader."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import junitparser
from junitparser import xunit2

from pytest_microvm.reports.parsing import OUR_MARK
from pytest_microvm.reports.profiles import Profile
from pytest_microvm.reports.reruns import tell_apart
from pytest_microvm.reports.text import NAME_LIMIT, first_line, safe_name, safe_text
from pytest_microvm.reports.values import Case, Kind, Problem, Suite

_SMALLEST = 200  # characters of a text, in a file that would be too large
_TOO_LONG_A_PATH = 2000
_NAMELESS = "tests"

_PARTS: Any = junitparser  # half of it has no types
_XUNIT2: Any = xunit2
_FINAL = {"failure": _PARTS.Failure, "error": _PARTS.Error, "skipped": _PARTS.Skipped}
_FLAKY = {"failure": _XUNIT2.FlakyFailure, "error": _XUNIT2.FlakyError, "skipped": _XUNIT2.FlakyError}
_RERUN = {"failure": _XUNIT2.RerunFailure, "error": _XUNIT2.RerunError, "skipped": _XUNIT2.RerunError}


class _TestCase(xunit2.TestCase):  # junitparser's own way to more attributes
    file = junitparser.Attr()
    line = junitparser.IntAttr()


def write_report(
    path: Path, suites: Iterable[Suite], profile: Profile, *, project: Path | None = None
) -> None:
    """Write a JUnit file for the profile's reader, atomically.

    If the file would be too large for its reader, texts are shortened, with a note. No test is left out.

    Args:
        path: The file; its folder is created if needed.
        suites: Its content.
        profile: Its reader's profile.
        project: The folder that the CI job runs in; by default the current one.

    Raises:
        OSError: It cannot be written.
    """
    named = _named(suites, profile)
    limit = min(profile.text_limit, _longest(named))
    data = _document(named, profile, limit, path.parent, project)
    while len(data) > profile.file_limit and limit > _SMALLEST:
        limit = max(limit // 4, _SMALLEST)
        data = _document(named, profile, limit, path.parent, project)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _longest(suites: Iterable[Suite]) -> int:
    """Return an upper bound for the length of texts; no limit above it shortens anything."""
    found = _SMALLEST
    for suite in suites:
        found = max(found, len(suite.out), len(suite.err))
        for case in suite.cases:
            texts = (problem.text for problem in (*case.problems, *case.attempts))
            found = max(found, len(case.out), len(case.err), *map(len, texts), 0)
    return 2 * found  # several problems become one text


def _named(suites: Iterable[Suite], profile: Profile) -> list[Suite]:
    """Return the suites with class and test names that are unique for the reader."""
    named = [
        replace(suite, cases=tuple(_scoped(case, suite, profile) for case in suite.cases)) for suite in suites
    ]
    if not profile.flat:
        return [replace(suite, cases=tuple(tell_apart(suite.cases))) for suite in named]
    apart = iter(tell_apart(case for suite in named for case in suite.cases))
    return [replace(suite, cases=tuple(next(apart) for _ in suite.cases)) for suite in named]


def _scoped(case: Case, suite: Suite, profile: Profile) -> Case:
    classname = safe_name(case.classname) or safe_name(suite.name) or _NAMELESS
    if profile.flat and suite.scope:
        of_job = suite.scope == classname or suite.scope.endswith(f" / {classname}")
        classname = suite.scope if of_job else f"{suite.scope}.{classname}"
    if profile.safe_paths:
        classname = classname.replace("/", "_").replace("\\", "_")
        if not classname.strip("."):
            classname = f"({classname})"
    return replace(case, classname=safe_name(classname), name=safe_name(case.name) or "(no name)")


def _document(
    suites: Sequence[Suite], profile: Profile, limit: int, folder: Path, project: Path | None
) -> bytes:
    root = _XUNIT2.JUnitXml("pytest-microvm")
    for suite in suites:
        element = _XUNIT2.TestSuite(safe_name(suite.name) or _NAMELESS)
        if suite.timestamp:
            element.timestamp = safe_name(suite.timestamp)
        if suite.hostname:
            element.hostname = safe_name(suite.hostname)
        mine = [(name, value) for name, value in suite.properties if name != OUR_MARK]
        element.append(_properties([(OUR_MARK, profile.name), *mine]))
        for case in suite.cases:
            element.append(_case(case, profile, limit, folder, project))
        if suite.out:
            element.system_out = safe_text(suite.out, limit)
        if suite.err:
            element.system_err = safe_text(suite.err, limit)
        root.append(element)
    root.update_statistics()
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + bytes(root.tostring().split(b"?>\n", 1)[-1]) + b"\n"


def _case(case: Case, profile: Profile, limit: int, folder: Path, project: Path | None) -> Any:
    element: Any = _TestCase(case.name, case.classname, round(case.seconds, 3))
    if profile.places and case.file:
        element.file = safe_name(case.file)
        if case.line is not None:
            element.line = case.line
    properties = list(case.properties) if profile.case_properties else []
    if case.flaky and profile.case_properties:
        properties = [(name, value) for name, value in properties if name != "microvm.flaky"]
        properties.append(("microvm.flaky", str(len(case.attempts))))
    if properties:
        element.append(_properties(properties))
    if problem := _whole(case.problems):
        result = _FINAL[problem.kind](safe_text(problem.message, 4 * NAME_LIMIT), safe_name(problem.type))
        result.text = safe_text(_text(problem, profile), limit)
        element.append(result)
    if profile.interim:
        for attempt in case.attempts:
            element.append(_interim(attempt, _FLAKY if case.flaky else _RERUN, limit))
    if out := _out(case, profile, limit, folder, project):
        element.system_out = out
    if case.err:
        element.system_err = safe_text(case.err, limit)
    return element


def _properties(pairs: Iterable[tuple[str, str]]) -> Any:
    properties = _PARTS.Properties()
    for name, value in pairs:
        properties.add_property(_PARTS.Property(safe_name(name), safe_text(value, 4 * NAME_LIMIT)))
    return properties


def _whole(problems: Sequence[Problem]) -> Problem | None:
    """Join all problems into one: readers take the first, but count each."""
    if len(problems) < 2:  # noqa: PLR2004 - nothing to join
        return problems[0] if problems else None
    order: tuple[Kind, ...] = ("error", "failure", "skipped")
    kind = next(kind for kind in order if any(problem.kind == kind for problem in problems))
    first = next(problem for problem in problems if problem.kind == kind)
    texts = (f"{problem.message}\n{problem.text}".strip() for problem in problems)
    text = "\n\n".join(filter(None, texts))
    return replace(first, text=text)


def _text(problem: Problem, profile: Profile) -> str:
    if not profile.message_in_text:
        return problem.text
    if first_line(problem.message) in problem.text and problem.text.strip():
        return problem.text
    return f"{problem.message}\n{problem.text}".strip() or "no reason was given"


def _interim(attempt: Problem, kinds: dict[str, Any], limit: int) -> Any:
    # The schema demands a type.
    element = kinds[attempt.kind](
        safe_text(attempt.message, 4 * NAME_LIMIT), safe_name(attempt.type) or attempt.kind
    )
    element.stack_trace = safe_text(attempt.text, limit)
    return element


def _out(case: Case, profile: Profile, limit: int, folder: Path, project: Path | None) -> str:
    """Return the test's stdout, then facts for which its reader has no element."""
    parts = [safe_text(case.out, limit)] if case.out else []
    if case.attempts and not profile.interim:
        told = "passed after" if case.flaky else "failed, too, in"
        parts.append(f"{told} {len(case.attempts)} other attempt{'s' if len(case.attempts) > 1 else ''}:")
        parts += [safe_text(f"- {attempt.message}", NAME_LIMIT) for attempt in case.attempts]
    # At the end: Jenkins cuts long output in its middle.
    names = [_reference(path, profile, folder, project) for path in case.attachments]
    return "\n".join([*parts, *(f"[[ATTACHMENT|{name}]]" for name in names if name)])


def _reference(path: Path, profile: Profile, folder: Path, project: Path | None) -> str:
    """Return the path by which the reader finds an attachment; empty if it cannot be written so."""
    whole = os.path.normpath(path.absolute())
    if profile.attachments == "beside":
        whole = os.path.relpath(whole, folder.absolute())
    elif profile.attachments == "project":
        whole = os.path.relpath(whole, (project or Path.cwd()).absolute())
        if whole.startswith(".."):
            return ""
    plain = len(whole) < _TOO_LONG_A_PATH and whole == safe_name(whole, _TOO_LONG_A_PATH)
    return whole if plain and not set("[]|") & set(whole) else ""
