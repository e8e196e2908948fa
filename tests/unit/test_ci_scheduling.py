"""The order of tasks: needs, places, tries, the first failure, Ctrl-C."""

import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from pytest_microvm.ci.definition.job import Job, Step
from pytest_microvm.ci.definition.task import Plan, Source, Task, make_plan
from pytest_microvm.ci.results.result import TaskResult
from pytest_microvm.ci.running.scheduling import Schedule

STEPS = (Step("true", "true"),)


class Threads:
    """An executor whose tasks are functions; it notes what ran beside what."""

    def __init__(self, work, slots=2):
        self.slots = slots
        self.log = []
        self.most = 0
        self.cancelled = threading.Event()
        self._work = work
        self._running = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(8)

    def submit(self, task) -> Future:
        return self._pool.submit(self._run, task)

    def _run(self, task):
        with self._lock:
            self.log.append(task.id)
            self._running += 1
            self.most = max(self.most, self._running)
        try:
            verdict = self._work(task, self)
        finally:
            with self._lock:
                self._running -= 1
        return TaskResult(task.id, task.source.branch, "c", task.job.name, verdict, f"it {verdict}")

    def cancel(self):
        self.cancelled.set()

    def close(self):
        self._pool.shutdown()


class Told:
    """A watcher that keeps what it was told."""

    def __init__(self):
        self.lines, self.ended_with = [], []

    def began(self, plan): ...

    def phase(self, task, phase): ...

    def ended(self, run): ...

    def line(self, task, text):
        self.lines.append((task.id, text))

    def done(self, task, result):
        self.ended_with.append((task.id, result.verdict))


def job(key, *needs, retries=1, allow_failure=False, branches=("*",)):
    return Job(key, key, STEPS, needs=needs, retries=retries, allow_failure=allow_failure, branches=branches)


def scheduled(plan, work, *, slots=2, fail_fast=False):
    executor, told = Threads(work, slots), Told()
    schedule = Schedule(plan, executor, told, lambda _task, result: result, fail_fast=fail_fast)
    results = schedule.run()
    executor.close()
    assert [result.id for result in results] == [task.id for task in plan.tasks]
    assert sorted(told.ended_with) == sorted((result.id, result.verdict) for result in results)
    return results, executor, told, schedule


def test_plan_repeats_jobs_and_their_needs_per_branch():
    sources = [Source("main", "1"), Source("feature/x", "2")]
    jobs = [job("build"), job("test", "build"), job("release", "test", branches=("main",))]
    plan = make_plan(sources, jobs)
    assert [(task.title, task.id) for task in plan.tasks][:3] == [
        ("main / build", "main.build"), ("main / test", "main.test"), ("main / release", "main.release"),
    ]  # fmt: skip
    assert plan.tasks[1].needs == ("main.build",)
    build, test = plan.tasks[3:]
    assert test.needs == (build.id,)
    assert build.id.startswith("feature-x.build-")
    assert len({task.id for task in plan.tasks}) == 5


@pytest.mark.parametrize("name", ["feature/x", "feature-x", "../../etc", "-", "a" * 300, "é", "a b", "."])
def test_an_id_is_the_name_of_one_folder(name):
    [task] = make_plan([Source(name, "1")], [job("test")]).tasks
    assert "/" not in task.id
    assert task.id.strip(".-") == task.id
    assert 0 < len(task.id) < 100


def test_branches_that_look_alike_have_folders_of_their_own():
    names = ["a/b", "a-b", "a b", "a_b", "a.b", "A/B"]
    plan = make_plan([Source(name, "1") for name in names], [job("test")])
    assert len({task.id.lower() for task in plan.tasks}) == len(names)


def test_nothing_begins_before_what_it_needs_and_places_are_kept():
    plan = make_plan([Source("a", "1"), Source("b", "1")], [job("build"), job("test", "build"), job("lint")])
    results, executor, _told, _schedule = scheduled(plan, lambda _task, _executor: "passed")
    assert {result.verdict for result in results} == {"passed"}
    for branch in "ab":
        assert executor.log.index(f"{branch}.build") < executor.log.index(f"{branch}.test")
    assert executor.most <= 2


def test_what_needs_a_failed_job_is_skipped_and_so_on():
    jobs = [job("build"), job("test", "build"), job("deploy", "test"), job("lint")]
    plan = make_plan([Source("a", "1")], jobs)
    results, executor, _told, _schedule = scheduled(
        plan, lambda task, _executor: "failed" if task.job.key == "build" else "passed"
    )
    assert [result.verdict for result in results] == ["failed", "skipped", "skipped", "passed"]
    assert results[1].reason == "it needs build"
    assert sorted(executor.log) == ["a.build", "a.lint"]


def test_allowed_failure_does_not_stop_dependent_jobs():
    plan = make_plan([Source("a", "1")], [job("lint", allow_failure=True), job("test", "lint")])
    plan = Plan(tuple(plan.tasks))

    def work(task, _executor):
        return "failed" if task.job.key == "lint" else "passed"

    executor, told = Threads(work), Told()

    def finish(task, result):
        return replace(result, allow_failure=task.job.allow_failure)

    results = Schedule(plan, executor, told, finish).run()
    executor.close()
    assert [result.verdict for result in results] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("fails", "attempts", "verdict"), [(0, 1, "passed"), (2, 3, "passed"), (9, 3, "infra")]
)
def test_only_what_never_began_is_tried_again(fails, attempts, verdict):
    plan = make_plan([Source("a", "1")], [job("test", retries=2)])
    tries = []

    def work(task, _executor):
        tries.append(task.id)
        return "infra" if len(tries) <= fails else "passed"

    [result], _executor, told, _schedule = scheduled(plan, work)
    assert (result.verdict, result.attempts, len(tries)) == (verdict, attempts, attempts)
    assert len(told.lines) == attempts - 1


@pytest.mark.parametrize("verdict", ["failed", "quota", "crashed"])
def test_what_failed_is_not_tried_again(verdict):
    plan = make_plan([Source("a", "1")], [job("test", retries=5)])
    [result], executor, _told, _schedule = scheduled(plan, lambda _task, _executor: verdict)
    assert (result.verdict, result.attempts, executor.log) == (verdict, 1, ["a.test"])


def test_an_error_that_should_not_be_costs_its_own_task_alone(caplog):
    plan = make_plan([Source("a", "1"), Source("b", "1")], [job("test", retries=0)])

    def work(task, _executor):
        if task.source.branch == "a":
            raise ZeroDivisionError("a bug")
        return "passed"

    results, _executor, _told, _schedule = scheduled(plan, work)
    assert [result.verdict for result in results] == ["infra", "passed"]
    assert "ZeroDivisionError" in results[0].reason
    assert "Traceback" in caplog.text


def until_cancelled(_task, executor):
    assert executor.cancelled.wait(60)
    return "cancelled"


def test_the_first_failure_ends_the_run_if_that_was_asked_for():
    plan = make_plan([Source(name, "1") for name in "abcd"], [job("test")])

    def work(task, executor):
        return "failed" if task.source.branch == "a" else until_cancelled(task, executor)

    results, executor, _told, schedule = scheduled(plan, work, fail_fast=True)
    assert [result.verdict for result in results] == ["failed", *["cancelled"] * 3]
    assert set(executor.log) == {"a.test", "b.test"}
    assert "--fail-fast" in results[1].reason
    assert not schedule.interrupted


def test_ctrl_c_ends_what_runs_and_all_have_a_result():
    plan = make_plan([Source(name, "1") for name in "abcd"], [job("test")])
    both = threading.Barrier(2)

    def work(task, executor):
        if both.wait(60) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return until_cancelled(task, executor)

    results, _executor, _told, schedule = scheduled(plan, work)
    assert schedule.interrupted
    assert [result.verdict for result in results] == ["cancelled"] * 4


def test_a_task_id_is_stable():
    source = Source("feature/x", "1")
    assert isinstance(make_plan([source], [job("test")]).tasks[0], Task)
    assert make_plan([source], [job("test")]) == make_plan([source], [job("test")])
