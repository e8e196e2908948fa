"""Write the JUnit report of a whole run: a suite for each branch and job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pytest_microvm.ci.results.job_junit import REPORT, job_suite, own_suites
from pytest_microvm.ci.results.result import RunResult
from pytest_microvm.reports.profiles import profile_named
from pytest_microvm.reports.values import Suite
from pytest_microvm.reports.writing import write_report


def write_merged_junit(output: Path, run: RunResult, *, profile: str) -> None:
    """Write a run's ``junit.xml``, with every test of every task.

    Args:
        output: The run's folder, with a folder for each task.
        run: The run's result.
        profile: The profile of the file's reader: a name in :data:`pytest_microvm.reports.profiles.PROFILES`.

    Raises:
        UsageError: There is no such profile.
        OSError: The file cannot be written.
    """
    write_report(output / REPORT, _suites(output, run), profile_named(profile, "--junit-profile"))


def _suites(output: Path, run: RunResult) -> Iterator[Suite]:
    several = len({task.branch for task in run.tasks}) > 1
    for task in run.tasks:
        folder = output / task.id
        suite = job_suite(folder, task, own_suites(folder), output)
        # With several branches their equal tests are distinct; with one, its name would keep tools from
        # comparing the tests with those of the branch it is to be merged into.
        yield replace(suite, scope=task.title if several else task.job)
