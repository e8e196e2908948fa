"""Interfaces between scheduling and machines: an executor runs tasks, here or on a cluster."""

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
    """Provides the files of the sources under test."""

    def tree(self, source: Source) -> Tree:
        """Return a source's files."""

    def bundle(self, source: Source) -> Path:
        """Return the path of a git bundle with a source's history, created on first use."""


@dataclass(frozen=True)
class Work:
    """The data that all tasks of a run share.

    Args:
        sources: Provides the files.
        output: The run's output folder; a task's own is ``output / task.id``.
        watcher: Receives the run's events.
        repository: An identifier that separates this repository's prepared templates from another's.
        default_branch: The branch whose prepared templates all branches may use.
    """

    sources: Sources
    output: Path
    watcher: Watcher
    repository: str
    default_branch: str


class Executor(Protocol):
    """Runs tasks, many at the same time."""

    slots: int
    """The maximum number of tasks to submit at the same time."""

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start one attempt at a task, in one machine; its folder is complete when the future is done.

        The future never raises an exception: a machine that did not start is a result, too.
        """

    def cancel(self) -> None:
        """Stop running tasks soon; their results and files so far are still collected."""

    def close(self) -> None:
        """Release all resources."""
