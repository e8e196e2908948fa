"""A run from beginning to end: what is asked for becomes a plan, the plan results, the results files."""

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
from pytest_microvm.ci.results.history import Case, History
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
from pytest_microvm.git.checkout import Checkout, checked_out
from pytest_microvm.host.project_grants import check_commands
from pytest_microvm.images.kits import find_kit
from pytest_microvm.settings import trust as project_trust

_log = logging.getLogger("pytest_microvm")

KITS = "microvm/kits"
"""Where a project's own kits are; those of the trusted definition's commit count."""


@dataclass(frozen=True)
class Selection:
    """What somebody asked to be run.

    Args:
        branches: Globs.
        refs: Refs or commits.
        worktree: Whether the work tree is, with what is not committed.
        changed_since: Branches that are not part of this ref yet.
        jobs: Keys of jobs; none: all.
        definition_from: The ref that the jobs are read from; ``None``: the default branch.
    """

    branches: Sequence[str] = ()
    refs: Sequence[str] = ()
    worktree: bool = False
    changed_since: str | None = None
    jobs: Sequence[str] = ()
    definition_from: str | None = None


def select(repository: CodeRepository, selection: Selection) -> tuple[Plan, Definition]:
    """Return what is to be done, and the definition that says how.

    Without a selection it is the commit that is checked out.

    Raises:
        UsageError: Something that was asked for does not exist, or the definition cannot be used.
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
    """Return the jobs that were asked for, and what they need."""
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
    """Refuse a definition that asks for what its user has not allowed to the branch that it comes from.

    Raises:
        UsageError: Nobody has, or a command for a secret uses something of the work tree.
    """
    check_commands_of(definition, repository.folder)
    project_trust.check(repository.folder, definition.asked, defined_by(repository, definition))


def check_commands_of(definition: Definition, folder: Path) -> None:
    """Refuse commands for secrets of jobs that use something of a work tree.

    Raises:
        UsageError: There is one.
    """
    for job in definition.jobs:
        spec = job.all_grants
        check_commands((secret.source for secret in spec.secrets), folder)
        check_commands((credential.source for credential in spec.credentials), folder)


def defined_by(repository: CodeRepository, definition: Definition) -> Checkout:
    """Return whose jobs they are: a branch's, or what is checked out where the work tree defines them."""
    if definition.branch == WORKTREE:
        return checked_out(repository.folder)
    return Checkout(definition.branch)


class RepositorySources:
    """The files of a repository's sources; see :class:`pytest_microvm.ci.running.executor.Sources`.

    Args:
        repository: The repository.
        folder: A place for bundles.
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
        """Return what is to be told about the files that were used: submodules that are not here, say."""
        return [
            f"{source.branch}: {note}" for source in self._trees for note in self._repository.notes(source)
        ]

    def bundle(self, source: Source) -> Path:
        """Return a git bundle with a source's history."""
        with self._lock:
            if source not in self._bundles:
                path = self._folder / f"{len(self._bundles)}.bundle"
                with path.open("wb") as file:
                    self._repository.bundle(source, file)
                self._bundles[source] = path
            return self._bundles[source]


@contextmanager
def trusted_project(repository: CodeRepository, definition_from: str | None) -> Iterator[tuple[Path, Path]]:
    """Yield a folder with the kits of the trusted commit, and one for files on the way; gone afterwards.

    Kits are built on this computer, so no branch may bring one.
    """
    with tempfile.TemporaryDirectory(prefix="microvm-ci-") as folder:
        project, bundles = Path(folder) / "project", Path(folder) / "bundles"
        project.mkdir()
        bundles.mkdir()
        if definition_from == WORKTREE:
            project = repository.folder
        else:
            repository.export(definition_from or repository.default_branch, KITS, project)
        yield project, bundles


@dataclass
class Outputs:
    """Writes what came of a run.

    Args:
        work: The run's.
        junit_profile: Who reads the JUnit files.
    """

    work: Work
    junit_profile: str = "generic"

    def finish(self, task: Task, result: TaskResult) -> TaskResult:
        """Write a task's JUnit file; return the result with its tests."""
        folder = self.work.output / task.id
        folder.mkdir(parents=True, exist_ok=True)
        tests = write_job_junit(folder, result, profile=self.junit_profile, output=self.work.output)
        return replace(result, tests=tests)

    def write(self, run: RunResult) -> None:
        """Write what is about all tasks."""
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
    """Run a plan, and write what came of it, whatever happens.

    Args:
        plan: What to do.
        executor: Where.
        outputs: Who writes the results.
        history: Where they are remembered.
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
    except HostError as error:  # the run is whole without
        _log.warning("%s", error)
    watcher.ended(run)
    return run


def ready(plan: Plan, repository: CodeRepository, sources: Sources, project: Path) -> Plan:
    """Return the plan with what has to be known before it begins.

    Args:
        plan: What to do.
        repository: The repository.
        sources: Its files.
        project: The folder with its trusted kits.

    Raises:
        KitError: There is no such image.
    """
    for image in sorted({task.job.spec.image for task in plan.tasks}):
        find_kit(image, project=project)
    default = repository.ref(repository.default_branch)
    tasks = (with_owner(task, sources, default) if task.job.prepare else task for task in plan.tasks)
    return replace(plan, tasks=tuple(tasks))


def new_work(repository: CodeRepository, output: Path, watcher: Watcher, sources: RepositorySources) -> Work:
    """Return what every task of a run needs.

    Raises:
        UsageError: There is no default branch.
    """
    return Work(sources, output, OneAtATime(watcher), repository.identity, repository.default_branch)


def _cases(output: Path, run: RunResult) -> Iterator[Case]:
    """Yield the tests that the branches reported themselves."""
    for task in run.tasks:
        for suite in own_suites(output / task.id):
            for case in suite.cases:
                outcome = "flaky" if case.flaky else case.outcome
                yield Case(task.id, f"{case.classname}::{case.name}", outcome, case.seconds)
