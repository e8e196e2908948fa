"""Where tasks run: the seam between the plan's order and the machines."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_microvm.ci.definition.task import Source, Task
from pytest_microvm.ci.results.result import TaskResult
from pytest_microvm.ci.running.watching import Watcher
from pytest_microvm.ci.sources.tree import Tree


class Sources(Protocol):
    """Gives the files of what is built and tested."""

    def tree(self, source: Source) -> Tree:
        """Return a source's files."""

    def bundle(self, source: Source) -> Path:
        """Return a git bundle with a source's history, made when first asked for."""


@dataclass(frozen=True)
class Work:
    """What every task needs.

    Args:
        sources: The files.
        output: The run's output folder; a task's own is ``output / task.id``.
        watcher: Told what happens.
        repository: What keeps the prepared templates of one repository apart from another's.
        default_branch: Whose prepared templates all branches may use.
    """

    sources: Sources
    output: Path
    watcher: Watcher
    repository: str
    default_branch: str


class Executor(Protocol):
    """Runs tasks, many at a time."""

    slots: int
    """How many tasks to give it at once."""

    def submit(self, task: Task) -> Future[TaskResult]:
        """Begin a task: one attempt, in one machine; its folder is filled when the future is done.

        The future never raises: a machine that did not come up is a result, too.
        """

    def cancel(self) -> None:
        """End what runs, soon; what has come of it so far is still taken back."""

    def close(self) -> None:
        """Give everything back."""
