"""Schedule tasks: start each after those that it needs, and at most as many at once as there are slots."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace

from pytest_microvm.ci.definition.task import Plan, Task
from pytest_microvm.ci.results.result import TaskResult, Verdict
from pytest_microvm.ci.running.executor import Executor
from pytest_microvm.ci.running.watching import Watcher
from pytest_microvm.untrusted.text import sanitize_line

_log = logging.getLogger("pytest_microvm")
_LOOK = 1.0  # seconds: a signal just before Python blocks is handled on wake-up
_GRACE = 120.0  # seconds for cancelled tasks to return their results


class Schedule:
    """Runs a plan.

    Args:
        plan: The plan.
        executor: Runs the tasks.
        watcher: Receives the tasks' phases and results.
        finish: Called with a task's final result; returns it with further fields set.
        fail_fast: Whether the first failure stops running tasks and prevents new ones.

    Attributes:
        interrupted: Whether the run was interrupted.
    """

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        watcher: Watcher,
        finish: Callable[[Task, TaskResult], TaskResult],
        *,
        fail_fast: bool = False,
    ) -> None:
        self.interrupted = False
        self._executor = executor
        self._watcher = watcher
        self._finish = finish
        self._fail_fast = fail_fast
        self._waiting = list(plan.tasks)
        self._running: dict[Future[TaskResult], Task] = {}
        self._results: dict[str, TaskResult] = {}
        self._attempts: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        self._lost: dict[str, int] = {}
        self._tasks = plan.tasks

    def run(self) -> list[TaskResult]:
        """Run all tasks and return their results in the plan's order.

        The first Ctrl-C stops running tasks and collects their results; the second one exits at once.
        """
        for task in self._waiting:
            self._watcher.phase(task, "queue")
            self._begun[task.id] = time.time()
        try:
            self._go_on()
        except KeyboardInterrupt:
            self.interrupted = True
            self._give_up("the run was interrupted")
        return [self._results[task.id] for task in self._tasks]

    def _go_on(self) -> None:
        while self._waiting or self._running:
            self._start()
            if not self._running:
                continue  # all waiting tasks were skipped
            done, _running = wait(self._running, _LOOK, FIRST_COMPLETED)
            for future in done:
                self._ended(future)

    def _start(self) -> None:
        for task in list(self._waiting):
            results = [self._results.get(name) for name in task.needs]
            failed = [result for result in results if result is not None and not result.harmless]
            if failed:
                self._waiting.remove(task)
                self._settle(task, self._not_run(task, "skipped", f"it needs {failed[0].job}"))
            elif None not in results and len(self._running) < self._executor.slots:
                self._waiting.remove(task)
                self._submit(task)

    def _submit(self, task: Task) -> None:
        self._attempts[task.id] = self._attempts.get(task.id, 0) + 1
        self._running[self._executor.submit(task)] = task

    def _ended(self, future: Future[TaskResult]) -> None:
        task = self._running.pop(future, None)
        if task is None:
            return  # it was stopped early
        result = self._outcome(task, future)
        attempts = self._attempts[task.id]
        self._lost[task.id] = self._lost.get(task.id, 0) + result.lost_workers
        again = result.verdict == "infra" and result.lost_workers <= 1  # with two lost, more may follow
        if again and attempts <= task.job.retries and not self.interrupted:
            number = f"{attempts} of {task.job.retries}"
            self._watcher.line(task, f"infra: {result.reason}; trying again ({number})")
            self._submit(task)
            return
        begun = self._begun[task.id]
        result = replace(
            result,
            attempts=attempts,
            lost_workers=self._lost[task.id],
            started=begun,
            seconds=time.time() - begun,
        )
        self._settle(task, result)
        if self._fail_fast and not result.harmless and result.verdict != "cancelled":
            self._give_up(f"{result.title} {result.verdict}, and --fail-fast was given")

    def _outcome(self, task: Task, future: Future[TaskResult]) -> TaskResult:
        """Return a task's result; log an unexpected exception and turn it into the verdict ``infra``."""
        error = future.exception()
        if error is None:
            return future.result()
        _log.error("%s: this is a bug of pytest-microvm", task.title, exc_info=error)
        return self._not_run(task, "infra", f"internal error: {sanitize_line(repr(error))}")

    def _settle(self, task: Task, result: TaskResult) -> None:
        result = self._finish(task, result)
        self._results[task.id] = result
        self._watcher.done(task, result)

    def _give_up(self, why: str) -> None:
        """Stop running tasks and start no further ones."""
        self._waiting = []
        self._executor.cancel()
        running, self._running = {task.id: future for future, task in self._running.items()}, {}
        wait(running.values(), timeout=_GRACE)
        for task in self._tasks:
            if task.id in self._results:
                continue
            future = running.get(task.id)
            if future is None:
                self._settle(task, self._not_run(task, "cancelled", why))
            elif future.done():
                self._ended_early(task, future, why)
            else:
                self._settle(task, self._not_run(task, "cancelled", f"{why}; it did not end in time"))

    def _ended_early(self, task: Task, future: Future[TaskResult], why: str) -> None:
        begun = self._begun[task.id]
        result, attempts = self._outcome(task, future), self._attempts[task.id]
        result = replace(result, attempts=attempts, started=begun, seconds=time.time() - begun)
        if result.verdict == "cancelled":
            result = replace(result, reason=why)
        self._settle(task, result)

    def _not_run(self, task: Task, verdict: Verdict, reason: str) -> TaskResult:
        source, job = task.source, task.job
        begun = self._begun[task.id]
        return TaskResult(
            task.id,
            source.branch,
            source.commit,
            job.name,
            verdict,
            reason,
            allow_failure=job.allow_failure,
            started=begun,
            seconds=time.time() - begun,
        )
