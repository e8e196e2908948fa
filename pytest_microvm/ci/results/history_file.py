"""The history's SQLite file: open it, migrate it to this version, replace it if it is damaged."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from pytest_microvm.errors import HostError

_BUSY = 60.0  # seconds to wait for another writer
_T = TypeVar("_T")

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, repository TEXT NOT NULL,
        definition TEXT NOT NULL, started REAL NOT NULL, seconds REAL NOT NULL, interrupted INTEGER NOT NULL,
        cases INTEGER NOT NULL)""",
        "CREATE INDEX runs_by_time ON runs (started, id)",
        """CREATE TABLE tasks (number INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs ON DELETE
        CASCADE, id TEXT NOT NULL, revision TEXT NOT NULL, job TEXT NOT NULL, data TEXT NOT NULL)""",
        "CREATE INDEX tasks_of_run ON tasks (run)",
        """CREATE TABLE cases (task INTEGER NOT NULL REFERENCES tasks ON DELETE CASCADE, position INTEGER
        NOT NULL, name TEXT NOT NULL, outcome TEXT NOT NULL, seconds REAL NOT NULL,
        PRIMARY KEY (task, position)) WITHOUT ROWID""",
    ),
)
"""The statements that migrate a database from version N to N + 1; entries are only ever added."""


class HistoryFile:
    """A database that several processes read and write concurrently.

    Args:
        path: The file; it is created on first use.
        say: Called with a message if the file was damaged and is replaced by a new one.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say

    def do(self, action: Callable[[sqlite3.Connection], _T]) -> _T:
        """Call ``action`` with the database; a damaged file is first renamed and replaced by a new one.

        Raises:
            HostError: The file is of a newer version, or unusable for another reason.
        """
        try:
            try:
                with self._open() as database:
                    return action(database)
            except sqlite3.DatabaseError as error:
                # Damage raises exactly this class; a lock, a full disk, ... raise subclasses.
                if type(error) is not sqlite3.DatabaseError:
                    raise
                self._put_aside(error)
            with self._open() as database:
                return action(database)
        except (sqlite3.Error, OSError) as error:
            raise HostError(
                f"the history of runs cannot be used: {error}",
                details=str(self._path),
                resolution="free the disk, correct the rights of the file, or remove it; a new one is begun",
            ) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            if _version(database) != len(_MIGRATIONS):
                self._migrate(database)
            yield database
        finally:
            database.close()

    def _migrate(self, database: sqlite3.Connection) -> None:
        """Migrate a database to this version; a new one has version 0."""
        with self._alone():
            version = _version(database)
            if version > len(_MIGRATIONS):
                raise HostError(
                    f"the history of runs is of a newer version of pytest-microvm (format {version})",
                    details=f"{self._path}; this version knows formats up to {len(_MIGRATIONS)}",
                    resolution="upgrade pytest-microvm, or remove the file",
                )
            database.execute("PRAGMA journal_mode = WAL")
            with transaction(database):
                for statements in _MIGRATIONS[version:]:
                    for statement in statements:
                        database.execute(statement)
                database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    def _put_aside(self, error: sqlite3.DatabaseError) -> None:
        """Rename a damaged file, unless another process has done so meanwhile."""
        with self._alone():
            if self._sound():
                return
            aside = self._path.with_name(f"history.damaged-{time.time_ns()}.sqlite3")
            for end in ("-wal", "-shm"):
                Path(f"{self._path}{end}").unlink(missing_ok=True)
            self._path.replace(aside)
        self._say(f"the history of runs was damaged ({error}): a new one begins; the old one is {aside}")

    def _sound(self) -> bool:
        with contextlib.closing(sqlite3.connect(self._path, timeout=_BUSY)) as database:
            try:
                found: str = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
            except sqlite3.DatabaseError:
                return False
            return found == "ok"

    def _alone(self) -> FileLock:
        return FileLock(self._path.with_name("history.lock"))


def _version(database: sqlite3.Connection) -> int:
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    return version


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Run a write transaction; it takes the lock at once, since a reader cannot always become a writer."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # on a full disk SQLite has already rolled back
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
