"""GitHub's view of a run: a Markdown summary, and annotations for failed tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_microvm.ci.github.commands import Annotation
from pytest_microvm.ci.results.result import Counts
from pytest_microvm.ci.results.summary_markdown import block, code
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.text import cut, first_line
from pytest_microvm.reports.values import Case, Report

_SHOWN = 50  # failures whose full text is included
_TEXT = 20_000  # characters of one failure's text


@dataclass(frozen=True)
class Ground:
    """Facts about the run's environment and exit.

    Args:
        accelerator: The accelerator that ran the machines.
        reason: The reason for its choice.
        images: The images' names and digests.
        exit_code: The run's exit code; ``None`` if it did not end by itself.
    """

    accelerator: str
    reason: str
    images: tuple[tuple[str, str], ...]
    exit_code: int | None = None


def read_junit(path: Path) -> Report | None:
    """Return the run's JUnit report; ``None`` if the run wrote none."""
    return read_report(path, ours=True) if path.is_file() else None


def count(report: Report | None) -> Counts:
    """Return the number of tests per outcome."""
    outcomes = [(case.outcome, case.flaky) for case in _cases(report)]
    kinds = [outcome for outcome, _flaky in outcomes]
    return Counts(
        passed=kinds.count("passed"),
        failed=kinds.count("failed"),
        errors=kinds.count("error"),
        skipped=kinds.count("skipped"),
        flaky=sum(flaky for _outcome, flaky in outcomes),
    )


def remarks(report: Report | None, ground: Ground, prefix: PurePosixPath | None) -> list[Annotation]:
    """Return annotations for failed tests, an abnormal exit and emulated machines.

    Args:
        report: The run's JUnit report.
        ground: Facts about the run.
        prefix: The folder of the report's files, relative to the repository's top; ``None``: outside the
            checkout.
    """
    found = []
    for case in _cases(report):
        if case.outcome in ("failed", "error"):
            problem = case.problems[0]
            text = problem.message or first_line(problem.text) or "no message"
            file = _file(case.file, prefix)
            found.append(Annotation("error", cut(text, 4000), _title(case), file, case.line or 0))
    if ground.exit_code is None:
        found.insert(0, Annotation("error", "the run did not end by itself", "pytest-microvm"))
    elif ground.exit_code and not found:
        text = f"the run ended with exit code {ground.exit_code}; the log of its step says why"
        found.append(Annotation("error", text, "pytest-microvm"))
    if ground.accelerator == "tcg":
        text = f"machines are emulated, which is several times slower: {ground.reason}"
        found.append(Annotation("warning", text, "pytest-microvm: no KVM"))
    return found


def heading(ground: Ground) -> str:
    """Return the Markdown lines at the start of every summary."""
    images = ", ".join(f"{code(name)} ({digest[:12]})" for name, digest in ground.images) or "none yet"
    lines = [f"Accelerator: **{ground.accelerator}** ({code(ground.reason)}). Images: {images}.", ""]
    if ground.accelerator == "tcg":
        lines = [
            "> [!WARNING]",
            "> KVM is not used here: machines are emulated, several times slower.",
            "",
            *lines,
        ]
    return "\n".join(lines)


def suite_summary(report: Report | None, ground: Ground) -> str:
    """Return a suite's summary in Markdown; output of tests is quoted, so that it is not read as Markdown."""
    counts = count(report)
    lines = [f"## pytest-microvm: {_verdict(report, counts, ground)}", "", heading(ground)]
    if report is not None:
        numbers = (counts.total, counts.passed, counts.failed, counts.errors, counts.skipped, counts.flaky)
        lines += ["| tests | passed | failed | errors | skipped | flaky |", "|--:" * 6 + "|"]
        lines += ["| " + " | ".join(map(str, numbers)) + " |", ""]
    bad = [case for case in _cases(report) if case.outcome in ("failed", "error")]
    for case in bad[:_SHOWN]:
        problem = case.problems[0]
        lines += [f"### {code(_title(case))}", "", block(problem.text or problem.message, _TEXT)]
    if len(bad) > _SHOWN:
        lines += [f"{len(bad) - _SHOWN} more failures are in the JUnit report.", ""]
    return "\n".join(lines)


def path_in_repository(folder: Path, workspace: Path) -> PurePosixPath | None:
    """Return a folder's path relative to the checkout; ``None`` if it is outside."""
    relative = os.path.relpath(folder.resolve(), workspace.resolve())
    return None if relative.startswith("..") else PurePosixPath(relative)


def _cases(report: Report | None) -> Iterator[Case]:
    for suite in report.suites if report is not None else ():
        yield from suite.cases


def _title(case: Case) -> str:
    return f"{case.classname}: {case.name}" if case.classname else case.name


def _file(file: str, prefix: PurePosixPath | None) -> str:
    path = PurePosixPath(file)
    if prefix is None or not file or path.is_absolute() or ".." in path.parts:
        return ""
    return str(prefix / path)


def _verdict(report: Report | None, counts: Counts, ground: Ground) -> str:
    if report is None:
        return f"no test ran (exit code {ground.exit_code})"
    bad = counts.failed + counts.errors
    words = [f"{bad} failed"] if bad else []
    words += [f"{counts.passed} passed"]
    if not bad and ground.exit_code != 0:
        words.append(f"but exit code {ground.exit_code}")
    return ", ".join(words)
