"""Write a task's JUnit report: the branch's own reports sanitized, or its steps as tests if it has none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

from pytest_microvm.ci.results.result import PHASES, Counts, StepResult, TaskResult
from pytest_microvm.reports.parsing import CASE_LIMIT
from pytest_microvm.reports.profiles import profile_named
from pytest_microvm.reports.reading import UNREADABLE, read_report
from pytest_microvm.reports.text import TEXT_LIMIT, safe_name, safe_text
from pytest_microvm.reports.values import Case, Problem, Properties, Report, Suite
from pytest_microvm.reports.writing import write_report

REPORT = "junit.xml"
"""The file name of the written reports."""

_TAKEN = "junit"  # the folder with the branch's own files
_EVIDENCE = ("log.txt", "console.txt")
_MOST_FILES = 1000
_MOST_BYTES = 128 * 1024 * 1024
_LOG_TAIL = 64 * 1024
_WORKSPACE = "/workspace"


def write_job_junit(folder: Path, result: TaskResult, *, profile: str, output: Path) -> Counts | None:
    """Write a task's ``junit.xml``.

    Args:
        folder: The task's folder. Its ``junit`` folder comes from the branch and is untrusted.
        result: The task's result.
        profile: The profile of the file's reader: a name in :data:`pytest_microvm.reports.profiles.PROFILES`.
        output: The folder that the paths of ``result`` are relative to.

    Returns:
        The number of the branch's tests per outcome; ``None`` if it reported none.

    Raises:
        UsageError: There is no such profile.
        OSError: The file cannot be written.
    """
    own = own_suites(folder)
    suite = job_suite(folder, result, own, output)
    write_report(folder / REPORT, [suite], profile_named(profile, "--junit-profile"))
    return count(case for one in own for case in one.cases) if own else None


def own_suites(folder: Path) -> tuple[Suite, ...]:
    """Return the suites of all JUnit files that the branch itself wrote.

    Args:
        folder: The task's folder.
    """
    taken = folder / _TAKEN
    files = sorted(_files(taken))
    found: list[Suite] = []
    cases = size = 0
    for number, path in enumerate(files):
        size += path.stat(follow_symlinks=False).st_size
        if cases >= CASE_LIMIT or size > _MOST_BYTES or number >= _MOST_FILES:
            found.append(_left_out(len(files) - number))
            break
        report = read_report(path)
        cases += sum(len(suite.cases) for suite in report.suites)
        found += _from_file(report, path.relative_to(taken).as_posix(), several=len(files) > 1)
    return tuple(found)


def job_suite(folder: Path, result: TaskResult, own: Iterable[Suite], output: Path) -> Suite:
    """Return a task's tests as one suite, which fails whenever the task's verdict is a failure.

    Args:
        folder: The task's folder.
        result: The task's result.
        own: The suites that the branch itself reported.
        output: The folder that the paths of ``result`` are relative to.
    """
    evidence = tuple(path for name in _EVIDENCE if _is_file(path := folder / name))
    own = tuple(own)
    taken_back = set(result.artifacts)
    cases = [_with_files(case, result, taken_back, output) for suite in own for case in suite.cases]
    if not own:
        cases = list(_steps(result, folder))
    cases = [
        replace(case, attachments=(*case.attachments, *evidence))
        if case.outcome in ("failed", "error")
        else case
        for case in cases
    ]
    cases += _verdict(result, cases, evidence)
    return Suite(
        result.title,
        tuple(cases),
        scope=result.job,
        properties=tuple(_properties(result)),
        timestamp=_timestamp(result.started),
        hostname=result.worker,
        out=_joined(suite.out for suite in own),
        err=_joined(suite.err for suite in own),
    )


def count(cases: Iterable[Case]) -> Counts:
    """Return the number of cases per outcome."""
    outcomes = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    flaky = 0
    for case in cases:
        outcomes[case.outcome] += 1
        flaky += case.flaky
    return Counts(outcomes["passed"], outcomes["failed"], outcomes["error"], outcomes["skipped"], flaky)


# The branch's own files


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files below a folder; symbolic links are ignored."""
    for parent, _folders, names in os.walk(folder):
        yield from (path for name in names if _is_file(path := Path(parent, name)))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _from_file(report: Report, name: str, *, several: bool) -> Iterator[Suite]:
    mark: Properties = (("microvm.report", safe_name(name)),) if several else ()
    for suite in report.suites:
        cases = tuple(replace(case, properties=(*case.properties, *mark)) for case in suite.cases)
        yield replace(suite, cases=cases)


def _left_out(number: int) -> Suite:
    brief = f"{number:,} files of JUnit were left out: there are too many, or they are too large together"
    return Suite(_TAKEN, (Case(_TAKEN, UNREADABLE, problems=(Problem("error", brief),)),))


def _with_files(case: Case, result: TaskResult, taken_back: set[str], output: Path) -> Case:
    """Return the case with attachments: the files it claims, if they were copied back from its machine."""
    found = []
    for claim in case.claims:
        inside = PurePosixPath(_WORKSPACE, claim)
        if ".." in inside.parts or not inside.is_relative_to(_WORKSPACE):
            continue
        name = f"{result.id}/artifacts/{inside.relative_to(_WORKSPACE)}"
        if name in taken_back and _is_file(output / name):
            found.append(output / name)
    return replace(case, attachments=tuple(found))


# Facts that do not come from the branch


def _steps(result: TaskResult, folder: Path) -> Iterator[Case]:
    failed = [step for step in result.steps if step.status]
    for step in result.steps:
        yield Case(
            result.job,
            safe_name(step.name) or "step",
            seconds=step.seconds,
            problems=tuple(_step_problems(step, folder, told=step in failed[:1])),
        )


def _step_problems(step: StepResult, folder: Path, *, told: bool) -> Iterator[Problem]:
    if step.status is None and step.seconds:
        yield Problem("error", "it did not run to its end", _log_tail(folder))
    elif step.status is None:
        yield Problem("skipped", "it did not run")
    elif step.status:
        how = f"signal {-step.status} ended it" if step.status < 0 else f"exit status {step.status}"
        yield Problem("failure", how, _log_tail(folder) if told else "")


def _log_tail(folder: Path) -> str:
    path = folder / _EVIDENCE[0]
    if not _is_file(path):
        return ""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL))
        text = file.read(_LOG_TAIL).decode(errors="replace")
    return safe_text(f"[... {size - _LOG_TAIL:,} bytes left out]{text}" if size > _LOG_TAIL else text)


def _verdict(result: TaskResult, cases: Iterable[Case], evidence: tuple[Path, ...]) -> list[Case]:
    """Return a case for the job itself if its tests do not reflect its verdict."""
    verdict, reason = result.verdict, result.reason or result.verdict
    red = any(case.outcome in ("failed", "error") for case in cases)
    if verdict == "passed" or (verdict == "failed" and red):
        return []
    kind: Problem
    if verdict in ("skipped", "cancelled"):
        kind = Problem("skipped", f"{verdict}: {reason}")
    else:
        kind = Problem("failure" if verdict == "failed" else "error", f"{verdict}: {reason}", type=verdict)
    attached = evidence if kind.kind != "skipped" else ()
    return [Case(result.job, "job", seconds=0.0, problems=(kind,), attachments=attached)]


def _properties(result: TaskResult) -> Iterator[tuple[str, str]]:
    known = {
        "branch": result.branch,
        "commit": result.commit,
        "job": result.job,
        "verdict": result.verdict,
        "reason": result.reason,
        "allow_failure": "true" if result.allow_failure else "",
        "attempts": str(result.attempts),
        "image": str(result.machine.get("image", "")),
        "image_digest": str(result.machine.get("image_digest", "")),
        "accelerator": str(result.machine.get("accelerator", "")),
    }
    for name, value in known.items():
        if value:
            yield f"microvm.{name}", value
    for phase in PHASES:
        if phase in result.phases:
            yield f"microvm.{phase}_seconds", f"{result.phases[phase]:.3f}"


def _timestamp(started: float) -> str:
    if not started:
        return ""
    return datetime.fromtimestamp(started, tz=timezone.utc).isoformat(timespec="seconds")


def _joined(texts: Iterable[str]) -> str:
    return safe_text("\n".join(filter(None, texts)), TEXT_LIMIT)
