"""A run from selection to results: make a plan, run its tasks, write their results to files."""

from __future__ import annotations

import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_microvm.cache.disk import explained
from pytest_microvm.ci.definition.job import Job
from pytest_microvm.ci.definition.parsing import Definition
from pytest_microvm.ci.definition.task import WORKTREE, Plan, Source, Task, make_plan
from pytest_microvm.ci.results.history import CaseResult, History
from pytest_microvm.ci.results.job_junit import own_suites, write_job_junit
from pytest_microvm.ci.results.merged_junit import write_merged_junit
from pytest_microvm.ci.results.result import RunResult, TaskResult
from pytest_microvm.ci.results.summary import write_summary
from pytest_microvm.ci.running.executor import Executor, Sources, Work
from pytest_microvm.ci.running.prepared import with_owner
from pytest_microvm.ci.running.scheduling import Schedule
from pytest_microvm.ci.running.watching import OneAtATime, Watcher
from pytest_microvm.ci.sources.repository import CodeRepository, read_definition
from pytest_microvm.ci.sources.tree import Tree
from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.git.checkout import CheckedOutRef, checked_out
from pytest_microvm.host.host import Host
from pytest_microvm.host.project_grants import check_commands
from pytest_microvm.images.lock_file import FILE, MAX_SIZE
from pytest_microvm.images.store import ImageStore, cache_root
from pytest_microvm.settings import trust as project_trust

_log = logging.getLogger("pytest_microvm")

KITS = "microvm/kits"
"""The folder of a project's own kits; they are read from the commit of the trusted definition."""


@dataclass(frozen=True)
class Selection:
    """The user's selection of branches and jobs to run.

    Args:
        branches: Globs.
        refs: Refs or commits.
        worktree: Whether to include the work tree, with uncommitted changes.
        changed_since: A ref; selects branches with commits that it does not contain.
        jobs: Keys of jobs; empty: all.
        definition_from: The ref that defines the jobs; ``None``: the default branch.
    """

    branches: Sequence[str] = ()
    refs: Sequence[str] = ()
    worktree: bool = False
    changed_since: str | None = None
    jobs: Sequence[str] = ()
    definition_from: str | None = None


def select(repository: CodeRepository, selection: Selection) -> tuple[Plan, Definition]:
    """Return the plan for a selection, and the definition of its jobs.

    An empty selection selects the commit that is checked out.

    Raises:
        UsageError: A selected item does not exist, or the definition is invalid.
    """
    definition = read_definition(repository, selection.definition_from)
    jobs = _chosen(definition, selection.jobs)
    sources: dict[str, Source] = {}
    found: list[Source] = []
    if selection.branches:
        found += repository.branches(selection.branches)
    if selection.changed_since is not None:
        changed = repository.changed_since(selection.changed_since)
        found = [source for source in found if source in changed] if selection.branches else changed
    found += [repository.ref(name) for name in selection.refs]
    if selection.worktree:
        found.append(repository.worktree())
    if not (selection.branches or selection.refs or selection.worktree or selection.changed_since):
        found.append(repository.ref("HEAD"))
    for source in found:
        sources.setdefault(source.branch, source)
    return make_plan(sources.values(), jobs, definition.where), definition


def _chosen(definition: Definition, keys: Sequence[str]) -> tuple[Job, ...]:
    """Return the selected jobs and those that they need."""
    if not keys:
        return definition.jobs
    known = {job.key: job for job in definition.jobs}
    for key in keys:
        if key not in known:
            raise UsageError(
                f"--job: there is no job {key!r} in {definition.where}",
                resolution="jobs: " + ", ".join(known),
            )
    wanted, left = set(), list(keys)
    while left:
        key = left.pop()
        if key not in wanted:
            wanted.add(key)
            left += known[key].needs
    return tuple(job for job in definition.jobs if job.key in wanted)


def check_trust(repository: CodeRepository, definition: Definition) -> None:
    """Refuse a definition with requests that the user has not granted to the branch that defines them.

    Raises:
        UsageError: A request is not granted, or a command for a secret uses a file of the work tree.
    """
    check_commands_of(definition, repository.folder)
    project_trust.check(repository.folder, definition.asked, defined_by(repository, definition))


def check_commands_of(definition: Definition, folder: Path) -> None:
    """Refuse jobs whose commands for secrets use files of a work tree.

    Raises:
        UsageError: A job has such a command.
    """
    for job in definition.jobs:
        spec = job.all_grants
        check_commands((secret.source for secret in spec.secrets), folder)
        check_commands((credential.source for credential in spec.credentials), folder)


def defined_by(repository: CodeRepository, definition: Definition) -> CheckedOutRef:
    """Return the checkout that defines the jobs: a branch, or the work tree's current checkout."""
    if definition.branch == WORKTREE:
        return checked_out(repository.folder)
    return CheckedOutRef(definition.branch)


class RepositorySources:
    """The files of a repository's sources; see :class:`pytest_microvm.ci.running.executor.Sources`.

    Args:
        repository: The repository.
        folder: The folder for bundles.
    """

    def __init__(self, repository: CodeRepository, folder: Path) -> None:
        self._repository = repository
        self._folder = folder
        self._trees: dict[Source, Tree] = {}
        self._bundles: dict[Source, Path] = {}
        self._lock = threading.Lock()

    def tree(self, source: Source) -> Tree:
        """Return a source's files."""
        with self._lock:
            if source not in self._trees:
                self._trees[source] = self._repository.tree(source)
            return self._trees[source]

    def notes(self) -> list[str]:
        """Return notes about the files that were used, for example about missing submodules."""
        return [
            f"{source.branch}: {note}" for source in self._trees for note in self._repository.notes(source)
        ]

    def bundle(self, source: Source) -> Path:
        """Return the path of a git bundle with a source's history."""
        with self._lock:
            if source not in self._bundles:
                path = self._folder / f"{len(self._bundles)}.bundle"
                with path.open("wb") as file:
                    self._repository.bundle(source, file)
                self._bundles[source] = path
            return self._bundles[source]


@contextmanager
def trusted_project(repository: CodeRepository, definition_from: str | None) -> Iterator[tuple[Path, Path]]:
    """Yield a folder with the kits and the lock of the trusted definition, and a temporary one for bundles.

    Kits are built on this computer, so other branches must not supply any.
    """
    with tempfile.TemporaryDirectory(prefix="microvm-ci-") as folder:
        project, bundles = Path(folder) / "project", Path(folder) / "bundles"
        project.mkdir()
        bundles.mkdir()
        if definition_from == WORKTREE:
            project = repository.folder
        else:
            ref = definition_from or repository.default_branch
            repository.export(ref, KITS, project)
            lock = repository.read(repository.ref(ref).commit, FILE, MAX_SIZE)
            if lock is not None:
                (project / FILE).write_bytes(lock)
        yield project, bundles


@dataclass
class Outputs:
    """Writes the results of a run to files.

    Args:
        work: The run's shared data.
        junit_profile: The profile of the JUnit files' reader.
    """

    work: Work
    junit_profile: str = "generic"

    def finish(self, task: Task, result: TaskResult) -> TaskResult:
        """Write a task's JUnit file; return the result with its tests' counts."""
        folder = self.work.output / task.id
        folder.mkdir(parents=True, exist_ok=True)
        tests = write_job_junit(folder, result, profile=self.junit_profile, output=self.work.output)
        return replace(result, tests=tests)

    def write(self, run: RunResult) -> None:
        """Write the files about the whole run."""
        output = self.work.output
        write_merged_junit(output, run, profile=self.junit_profile)
        write_summary(output, run)
        (output / "results.json").write_text(run.to_json(), encoding="utf-8")


def run_plan(
    plan: Plan,
    executor: Executor,
    outputs: Outputs,
    history: History,
    *,
    repository: Path,
    fail_fast: bool = False,
) -> RunResult:
    """Run a plan and write its results, even if it is interrupted.

    Args:
        plan: The plan.
        executor: Runs the tasks.
        outputs: Writes the results.
        history: Stores the results of runs.
        repository: The repository's folder, for the results.
        fail_fast: Whether the first failure ends the run.
    """
    started = time.time()
    watcher: Watcher = outputs.work.watcher
    schedule = Schedule(plan, executor, watcher, outputs.finish, fail_fast=fail_fast)
    watcher.began(plan)
    tasks = schedule.run()
    name = time.strftime("%Y%m%d-%H%M%S-", time.gmtime(started)) + secrets.token_hex(2)
    seconds = time.time() - started
    run = RunResult(
        name, str(repository), plan.definition, started, seconds, tuple(tasks), schedule.interrupted
    )
    with explained(outputs.work.output):
        outputs.write(run)
    try:
        history.add(run, _cases(outputs.work.output, run))
    except HostError as error:  # the run's results are complete without it
        _log.warning("%s", error)
    watcher.ended(run)
    return run


def ready(plan: Plan, repository: CodeRepository, sources: Sources, project: Path) -> Plan:
    """Check a plan's images, and return the plan with the owner branches of its tasks' templates set.

    Args:
        plan: The plan.
        repository: The repository.
        sources: Provides the repository's files.
        project: The folder with the trusted kits.

    Raises:
        KitError: An image does not exist.
    """
    for image in sorted({task.job.spec.image for task in plan.tasks}):
        ImageStore(cache_root()).check(image, project)
    default = repository.ref(repository.default_branch)
    tasks = (with_owner(task, sources, default) if task.job.prepare else task for task in plan.tasks)
    return replace(plan, tasks=tuple(tasks))


def check_locked(plan: Plan, host: Host) -> None:
    """Check before the first task that a plan's images are those that the lock pins.

    Raises:
        LockError: One of them is another one, or is not locked.
    """
    for image in sorted({task.job.spec.image for task in plan.tasks}):
        host.locked.get(image, progress=host.say)


def new_work(repository: CodeRepository, output: Path, watcher: Watcher, sources: RepositorySources) -> Work:
    """Return the data that all tasks of a run share.

    Raises:
        UsageError: The repository has no default branch.
    """
    return Work(sources, output, OneAtATime(watcher), repository.identity, repository.default_branch)


def _cases(output: Path, run: RunResult) -> Iterator[CaseResult]:
    """Yield the tests from the branches' own JUnit reports."""
    for task in run.tasks:
        for suite in own_suites(output / task.id):
            for case in suite.cases:
                outcome = "flaky" if case.flaky else case.outcome
                yield CaseResult(task.id, f"{case.classname}::{case.name}", outcome, case.seconds)
