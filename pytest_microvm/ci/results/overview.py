"""The common content of a run's summaries: a matrix, the tasks that did not pass, and next steps."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_microvm.ci.definition.task import WORKTREE
from pytest_microvm.ci.results.job_junit import REPORT
from pytest_microvm.ci.results.result import PHASES, RunResult, TaskResult
from pytest_microvm.reports.reading import read_report
from pytest_microvm.reports.text import cut
from pytest_microvm.reports.values import Case

TEXT_LIMIT = 20_000
"""Maximum number of characters shown of a failure."""

_MOST_TESTS = 200  # of one task


@dataclass(frozen=True)
class Matrix:
    """A table of a run's tasks by branch and job.

    Args:
        jobs: The columns.
        rows: A branch and its tasks, one for each column; ``None``: the job does not run for the branch.
    """

    jobs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TaskResult | None, ...]], ...]


def matrix(run: RunResult) -> Matrix:
    """Return a run's tasks as a table of branches and jobs."""
    jobs = tuple(dict.fromkeys(task.job for task in run.tasks))
    branches = tuple(dict.fromkeys(task.branch for task in run.tasks))
    found = {(task.branch, task.job): task for task in run.tasks}
    return Matrix(
        jobs,
        tuple((branch, tuple(found.get((branch, job)) for job in jobs)) for branch in branches),
    )


def headline(run: RunResult) -> str:
    """Return the result of a run in one line."""
    total, passed = len(run.tasks), sum(task.verdict == "passed" for task in run.tasks)
    if run.interrupted:
        return f"Interrupted: {passed} of {total} jobs passed"
    if passed == total:
        return "The job passed" if total == 1 else f"All {total} jobs passed"
    return f"{passed} of {total} jobs passed"


def tests_line(task: TaskResult) -> str:
    """Return the counts of a task's own tests in a few words; empty if it has none."""
    counts = task.tests
    if counts is None:
        return ""
    found = [f"{counts.failed + counts.errors} failed"] if counts.failed + counts.errors else []
    found += [f"{counts.skipped} skipped"] if counts.skipped else []
    found += [f"{counts.flaky} flaky"] if counts.flaky else []
    return ", ".join([f"{counts.total} test{'' if counts.total == 1 else 's'}", *found])


def worth_telling(run: RunResult) -> list[TaskResult]:
    """Return the tasks that did not pass, the worst first, then passed ones with denied requests."""
    return sorted(
        (task for task in run.tasks if task.verdict != "passed" or task.denied),
        key=lambda task: (task.harmless, task.verdict in ("skipped", "cancelled"), task.verdict == "passed"),
    )


@dataclass(frozen=True)
class FailedTests:
    """The first failed tests of one task, and the total number of its failed tests."""

    cases: tuple[Case, ...] = ()
    total: int = 0


def failed_tests(output: Path, task: TaskResult) -> FailedTests:
    """Return a task's failed tests, without the case that stands for the job itself."""
    path = output / task.id / REPORT
    if not path.exists():  # the task never ran
        return FailedTests()
    report = read_report(path, ours=True)
    cases: Iterable[Case] = (case for suite in report.suites for case in suite.cases)
    failed = [
        case
        for case in cases
        if case.outcome in ("failed", "error") and (case.classname, case.name) != (task.job, "job")
    ]
    return FailedTests(tuple(map(_shortened, failed[:_MOST_TESTS])), len(failed))


def _shortened(case: Case) -> Case:
    problems = tuple(replace(problem, text=cut(problem.text, TEXT_LIMIT)) for problem in case.problems)
    return replace(case, problems=problems, attempts=(), out="", err="")


def local_command(task: TaskResult) -> str:
    """Return the command that runs a single task on this computer."""
    if task.branch == WORKTREE:
        source = ["--worktree"]
    else:
        source = ["--ref" if task.branch.startswith("refs/") else "--branch", task.branch]
    key = task.job.partition(" (")[0]  # without the values of its matrix
    return shlex.join(["pytest-microvm", "ci", "run", *source, "--job", key])


def next_step(task: TaskResult) -> str:
    """Return a sentence with the user's next step for a task, by its verdict."""
    return {
        "passed": "It passed, but not with all that it tried to reach.",
        "failed": "Run it here:",
        "quota": "Make the work smaller, or raise the quota in the job's definition. Run it here:",
        "crashed": "Its console says how the machine ended. Run it here:",
        "infra": "Nothing was tested: run it again.",
        "skipped": "It runs when what it needs has succeeded.",
        "cancelled": "The run ended before it did: run it again.",
    }[task.verdict]


def phases(task: TaskResult) -> list[tuple[str, float]]:
    """Return a task's phases and their seconds, in order."""
    return [(phase, task.phases[phase]) for phase in PHASES if phase in task.phases]


def duration(seconds: float) -> str:
    """Return a duration in readable form: ``0.8 s``, ``12 s``, ``3 min 5 s``."""
    if seconds < 10:  # noqa: PLR2004 - below that a tenth matters
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
