"""The history of runs and their test results, in a SQLite file under the cache.

It keeps the last :data:`KEPT_RUNS` runs of the last :data:`KEPT_DAYS` days, and at most :data:`KEPT_CASES`
test cases, those of the newest runs. Several runs may write concurrently: WAL, and a busy timeout.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_microvm.ci.results.history_file import HistoryFile, transaction
from pytest_microvm.ci.results.result import RunResult, TaskResult, task_from_json
from pytest_microvm.errors import UsageError
from pytest_microvm.git.checkout import matches
from pytest_microvm.untrusted.text import sanitize_line

KEPT_RUNS = 1000
KEPT_DAYS = 90
KEPT_CASES = 500_000
LAST = "last"
"""The alias of the newest run's id."""

_CASES_OF_A_RUN = 100_000
_NAME = 1000  # characters
_DAY = 86400.0
_log = logging.getLogger("pytest_microvm")

_FLAKY = """
WITH tried AS (
  SELECT repository, job, revision, name, SUM(outcome = 'passed') AS passed,
         SUM(outcome IN ('failed', 'error')) AS failed, SUM(outcome = 'flaky') AS flaky
  FROM cases JOIN tasks ON tasks.number = cases.task JOIN runs ON runs.number = tasks.run
  WHERE started >= ? GROUP BY repository, job, revision, name)
SELECT repository, job, name, COUNT(*) AS commits, SUM(passed), SUM(failed), SUM(flaky)
FROM tried WHERE flaky OR (passed AND failed)
GROUP BY repository, job, name ORDER BY commits DESC, SUM(failed) + SUM(flaky) DESC, repository, job, name
"""
_PRUNE_CASES = """
DELETE FROM cases WHERE task IN (SELECT tasks.number FROM tasks JOIN
  (SELECT number, SUM(cases) OVER (ORDER BY started DESC, id DESC) AS total FROM runs) AS counted
  ON counted.number = tasks.run WHERE total > ?)
"""


@dataclass(frozen=True)
class CaseResult:
    """The result of one test.

    Args:
        task: The id of the task that it ran in.
        name: The names of the test's class and of the test.
        outcome: ``passed``, ``failed``, ``error``, ``skipped``, or ``flaky``: passed after it had failed.
        seconds: The duration.
    """

    task: str
    name: str
    outcome: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Flaky:
    """A test that passed and failed with the same code.

    Args:
        repository: The repository's folder.
        job: The job that runs it.
        name: The test's name.
        commits: The number of commits with which it both passed and failed.
        passed: How often it passed with these commits.
        failed: How often it failed with these commits.
        flaky: How often it did both in one run.
    """

    repository: str
    job: str
    name: str
    commits: int
    passed: int
    failed: int
    flaky: int


class History:
    """The history of runs in a cache folder.

    Args:
        cache: The cache folder; see :func:`pytest_microvm.images.store.cache_root`.
        say: Called with a message if the file was damaged and is replaced by a new one.
    """

    def __init__(self, cache: Path, say: Callable[[str], None] = _log.warning) -> None:
        self._file = HistoryFile(cache / "ci" / "history.sqlite3", say)

    def add(self, run: RunResult, cases: Iterable[CaseResult] = ()) -> None:
        """Add a run, and delete expired entries.

        Args:
            run: The run; it replaces one with the same id.
            cases: The tests of its tasks.

        Raises:
            HostError: The file cannot be written, or is of a newer version.
        """
        tests: dict[str, list[CaseResult]] = {task.id: [] for task in run.tasks}
        for case in islice((case for case in cases if case.task in tests), _CASES_OF_A_RUN):
            tests[case.task].append(case)

        def write(database: sqlite3.Connection) -> None:
            with transaction(database):
                _insert(database, run, tests)
                _prune(database)

        self._file.do(write)

    def runs(self, limit: int, branches: Sequence[str] = ()) -> list[RunResult]:
        """Return runs, the newest first.

        Args:
            limit: The maximum number of runs.
            branches: Globs; only tasks of matching branches are included, and runs without any are left out.
        """

        def read(database: sqlite3.Connection) -> list[RunResult]:
            found = (_run(database, row) for row in database.execute(_ALL_RUNS).fetchall())
            if branches:
                found = (part for run in found if (part := _only(run, branches)).tasks)
            return list(islice(found, limit))

        return self._file.do(read)

    def run(self, prefix: str) -> RunResult:
        """Return a run by a prefix of its id, or by :data:`LAST`.

        Raises:
            UsageError: No run matches, or more than one.
        """

        def read(database: sqlite3.Connection) -> list[RunResult]:
            rows = database.execute(_ALL_RUNS).fetchall()
            rows = rows[:1] if prefix == LAST else [row for row in rows if row[1].startswith(prefix)]
            exact = [row for row in rows if row[1] == prefix] or rows
            return [_run(database, row) for row in exact[:2]]

        found = self._file.do(read)
        if len(found) == 1 and prefix:
            return found[0]
        what = "more than one run begins with" if found else "there is no run"
        raise UsageError(f"{what} {prefix!r}", resolution="see `pytest-microvm ci history`")

    def cases(self, run: str) -> list[CaseResult]:
        """Return the tests of the run with the id ``run``, in order."""
        query = """SELECT tasks.id, name, outcome, cases.seconds FROM cases JOIN tasks
        ON tasks.number = cases.task JOIN runs ON runs.number = tasks.run WHERE runs.id = ?
        ORDER BY tasks.number, position"""
        return self._file.do(lambda database: [CaseResult(*row) for row in database.execute(query, (run,))])

    def flaky(self, days: float = KEPT_DAYS) -> list[Flaky]:
        """Return the tests that passed and failed with the same commit, in one run or several, worst first.

        Args:
            days: The period to search, in days up to now.
        """
        since = time.time() - days * _DAY
        return self._file.do(lambda database: [Flaky(*row) for row in database.execute(_FLAKY, (since,))])


_ALL_RUNS = "SELECT * FROM runs ORDER BY started DESC, id DESC"


def _insert(database: sqlite3.Connection, run: RunResult, tests: dict[str, list[CaseResult]]) -> None:
    database.execute("DELETE FROM runs WHERE id = ?", (run.id,))
    facts = (run.id, _text(run.repository), _text(run.definition), run.started, run.seconds, run.interrupted)
    count = sum(map(len, tests.values()))
    added = database.execute("INSERT INTO runs VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", (*facts, count))
    number = added.lastrowid
    for task in run.tasks:
        words = (task.id, task.commit, _text(task.job), json.dumps(asdict(task)))
        added = database.execute("INSERT INTO tasks VALUES (NULL, ?, ?, ?, ?, ?)", (number, *words))
        rows = [
            (added.lastrowid, position, _text(case.name), case.outcome, case.seconds)
            for position, case in enumerate(tests[task.id])
        ]
        database.executemany("INSERT INTO cases VALUES (?, ?, ?, ?, ?)", rows)


def _prune(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM runs WHERE started < ?", (time.time() - KEPT_DAYS * _DAY,))
    newest = "SELECT number FROM runs ORDER BY started DESC, id DESC LIMIT ?"
    database.execute(f"DELETE FROM runs WHERE number NOT IN ({newest})", (KEPT_RUNS,))  # noqa: S608 - ours
    database.execute(_PRUNE_CASES, (KEPT_CASES,))


def _run(database: sqlite3.Connection, row: Sequence[Any]) -> RunResult:
    number, name, repository, definition, started, seconds, interrupted, _cases = row
    found = database.execute("SELECT data FROM tasks WHERE run = ? ORDER BY number", (number,))
    # Fields that an older version did not write get their defaults.
    unknown = asdict(TaskResult("", "", "", "", "infra"))
    tasks = tuple(task_from_json({**unknown, **json.loads(data)}) for (data,) in found)
    return RunResult(name, repository, definition, started, seconds, tasks, bool(interrupted))


def _only(run: RunResult, branches: Sequence[str]) -> RunResult:
    tasks = tuple(task for task in run.tasks if matches(task.branch, branches))
    return RunResult(run.id, run.repository, run.definition, run.started, run.seconds, tasks, run.interrupted)


def _text(text: str) -> str:
    """Return text as one line that the database can store."""
    return sanitize_line(text, _NAME)
