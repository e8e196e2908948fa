"""Merge several reports into one without losing a test or mistaking one for another."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_microvm.reports.text import safe_name
from pytest_microvm.reports.values import Case, Report, Suite


def merged(reports: Sequence[tuple[Path, Report]]) -> list[Suite]:
    """Return the suites of several files, each with a unique name.

    If tests of two suites have the same class and name, a reader that does not separate suites gets the
    suites' names before their class names.

    Args:
        reports: The files and their content.
    """
    suites = [(path, _with_files(suite, path.parent)) for path, report in reports for suite in report.suites]
    names = Counter(suite.name for _path, suite in suites)
    labelled = [
        replace(suite, name=safe_name(f"{path.stem}: {suite.name}")) if names[suite.name] > 1 else suite
        for path, suite in suites
    ]
    apart = list(_numbered(labelled))
    colliding = _colliding(apart)
    return [
        replace(suite, scope=suite.name) if number in colliding else suite
        for number, suite in enumerate(apart)
    ]


def _numbered(suites: Sequence[Suite]) -> Iterator[Suite]:
    taken: set[str] = set()
    for suite in suites:
        name, number = suite.name, 1
        while name in taken:
            number += 1
            name = f"{suite.name} ({number})"
        taken.add(name)
        yield replace(suite, name=name)


def _colliding(suites: Sequence[Suite]) -> set[int]:
    """Return the indexes of suites that have a test with the class and name of another suite's test."""
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, suite in enumerate(suites):
        for case in suite.cases:
            found[case.classname, case.name].add(number)
    return {number for numbers in found.values() if len(numbers) > 1 for number in numbers}


def _with_files(suite: Suite, folder: Path) -> Suite:
    return replace(suite, cases=tuple(_attached(case, folder) for case in suite.cases))


def _attached(case: Case, folder: Path) -> Case:
    """Return the case with the files that it claims, if they exist in its report's folder or below."""
    top = Path(os.path.normpath(folder.absolute()))
    found = []
    for claim in case.claims:
        path = Path(os.path.normpath(top / claim))
        # A link could lead to a file that the report's author has no right to.
        if path.is_relative_to(top) and path.is_file() and path.resolve().is_relative_to(top.resolve()):
            found.append(path)
    return replace(case, attachments=tuple(found)) if found else case
