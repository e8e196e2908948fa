"""Run tasks on this computer, each in a thread that waits for its machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pytest_microvm.ci.definition.task import Task
from pytest_microvm.ci.results.result import TaskResult
from pytest_microvm.ci.running.attempt import Attempt
from pytest_microvm.ci.running.executor import Work
from pytest_microvm.host.host import Host


class LocalExecutor:
    """Runs tasks on this computer (implements :class:`pytest_microvm.ci.running.executor.Executor`).

    Args:
        host: The host, which starts machines.
        work: The data that all tasks share.
        slots: How many tasks run at the same time.
    """

    def __init__(self, host: Host, work: Work, slots: int) -> None:
        self.slots = slots
        self._host = host
        self._work = work
        self._cancelled = threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=slots, thread_name_prefix="microvm-ci")

    def submit(self, task: Task) -> Future[TaskResult]:
        """Start a task."""
        run: Callable[[], TaskResult] = Attempt(self._host, task, self._work, self._cancelled).run
        return self._threads.submit(run)

    def cancel(self) -> None:
        """Stop running tasks soon."""
        self._cancelled.set()

    def close(self) -> None:
        """Cancel running tasks and wait until the threads have ended."""
        self.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
