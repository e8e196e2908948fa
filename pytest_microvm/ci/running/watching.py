"""The interface for watching a run's progress, and a lock around it."""

from __future__ import annotations

import threading
from typing import Protocol

from pytest_microvm.ci.definition.task import Plan, Task
from pytest_microvm.ci.results.result import RunResult, TaskResult


class Watcher(Protocol):
    """Receives the events of a run; calls come from several threads, one at a time."""

    def began(self, plan: Plan) -> None:
        """Handle the start of the run."""

    def phase(self, task: Task, phase: str) -> None:
        """Handle a task's entry into one of :data:`pytest_microvm.ci.results.result.PHASES`."""

    def line(self, task: Task, text: str) -> None:
        """Handle a line of a task's output or of a message about it: safe to display, without newline."""

    def done(self, task: Task, result: TaskResult) -> None:
        """Handle a task's result."""

    def ended(self, run: RunResult) -> None:
        """Handle the end of the run, after all files are written."""


class OneAtATime:
    """Serializes calls from many threads to a watcher.

    Args:
        watcher: The watcher, which gets one call at a time.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._lock = threading.RLock()

    def began(self, plan: Plan) -> None:
        """See :class:`Watcher`; likewise for the other methods."""
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
