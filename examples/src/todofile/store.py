"""The file: read, add, finish; written whole or not at all."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from todofile.task import Task

if TYPE_CHECKING:
    from collections.abc import Iterator


class Store:
    """The tasks in one file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def tasks(self) -> list[Task]:
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [Task.parse(line) for line in lines if line.strip()]

    def add(self, task: Task) -> None:
        with self._locked():
            self._save([*self.tasks(), task])

    def finish(self, number: int) -> Task:
        with self._locked():
            tasks = self.tasks()
            if not 1 <= number <= len(tasks):
                raise IndexError(f"there is no task {number}")
            tasks[number - 1] = tasks[number - 1].finished()
            self._save(tasks)
            return tasks[number - 1]

    def _save(self, tasks: list[Task]) -> None:
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(f"{task}\n" for task in tasks))
        beside.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
