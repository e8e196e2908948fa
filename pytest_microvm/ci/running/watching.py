"""Who is told how a run goes, while it does."""

from __future__ import annotations

import threading
from typing import Protocol

from pytest_microvm.ci.definition.task import Plan, Task
from pytest_microvm.ci.results.result import RunResult, TaskResult


class Watcher(Protocol):
    """Told of everything; calls come from several threads, one at a time."""

    def began(self, plan: Plan) -> None:
        """The run begins."""

    def phase(self, task: Task, phase: str) -> None:
        """A task is in one of :data:`pytest_microvm.ci.results.result.PHASES` now."""

    def line(self, task: Task, text: str) -> None:
        """A task's commands, or we about it, said a line: safe to show, without its newline."""

    def done(self, task: Task, result: TaskResult) -> None:
        """A task has its result."""

    def ended(self, run: RunResult) -> None:
        """The run has ended; everything is written."""


class OneAtATime:
    """A watcher that many threads may tell something.

    Args:
        watcher: Who is told, by one at a time.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.RLock()

    def began(self, plan: Plan) -> None:
        """See :class:`Watcher`, as for the others."""
        with self._lock:
            self._watcher.began(plan)

    def phase(self, task: Task, phase: str) -> None:  # noqa: D102
        with self._lock:
            self._watcher.phase(task, phase)

    def line(self, task: Task, text: str) -> None:  # noqa: D102
        with self._lock:
            self._watcher.line(task, text)

    def done(self, task: Task, result: TaskResult) -> None:  # noqa: D102
        with self._lock:
            self._watcher.done(task, result)

    def ended(self, run: RunResult) -> None:  # noqa: D102
        with self._lock:
            self._watcher.ended(run)
