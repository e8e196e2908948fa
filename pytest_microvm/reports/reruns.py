"""Entries with the same name: join the attempts of one test, keep different tests apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pytest_microvm.reports.values import Case, Problem

# pytest writes a test that failed, and whose teardown failed as well, as two entries.
_TEARDOWN = "failed on teardown with"
_MOST_ATTEMPTS = 100


def join_attempts(cases: Iterable[Case]) -> list[Case]:
    """Return ``cases`` of one suite with the attempts of each test joined.

    An entry that follows a failed one of the same class and name is another attempt. One that follows a
    passed or skipped one is another test of the same name: a test that passed is not repeated.
    """
    tests: list[list[Case]] = []
    latest: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        key = (case.classname, case.name, case.file)
        before = latest.get(key)
        if before is not None and _failed(before[-1]) and case.outcome != "skipped":
            before.append(case)
        else:
            latest[key] = [case]
            tests.append(latest[key])
    return [test[0] if len(test) == 1 else _joined(test) for test in tests]


def tell_apart(cases: Iterable[Case]) -> list[Case]:
    """Return ``cases`` with a number after each name that an earlier case of the same class has."""
    taken: set[tuple[str, str]] = set()
    counts: dict[tuple[str, str], int] = {}
    found = []
    for case in cases:
        name = case.name
        while (case.classname, name) in taken:
            counts[case.classname, case.name] = number = counts.get((case.classname, case.name), 1) + 1
            name = f"{case.name} ({number})"
        taken.add((case.classname, name))
        found.append(case if name == case.name else replace(case, name=name))
    return found


def _failed(case: Case) -> bool:
    return case.outcome in ("failed", "error")


def _joined(entries: Sequence[Case]) -> Case:
    """Join the entries of a test, of which all but the last failed, into one case."""
    runs: list[tuple[Problem, ...]] = []
    for entry in entries:
        if runs and any(problem.message.startswith(_TEARDOWN) for problem in entry.problems):
            runs[-1] += entry.problems
        else:
            runs.append(entry.problems)
    counts = runs[0] if _failed(entries[-1]) else ()  # the first failure counts, as it does for surefire
    others = runs[1:] if counts else runs[:-1]
    attempts = [problem for run in others for problem in run]
    attempts += [problem for entry in entries for problem in entry.attempts]
    return replace(
        entries[-1],
        seconds=sum(entry.seconds for entry in entries),
        problems=counts,
        attempts=tuple(attempts[:_MOST_ATTEMPTS]),
        out="\n".join(entry.out for entry in entries if entry.out),
        err="\n".join(entry.err for entry in entries if entry.err),
        claims=tuple(claim for entry in entries for claim in entry.claims),
        attachments=tuple(path for entry in entries for path in entry.attachments),
    )
