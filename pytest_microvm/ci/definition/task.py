"""A plan of a run: its tasks, one per job and branch, and their dependencies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_microvm.ci.definition.job import Job

WORKTREE = "worktree"
"""The work tree's name wherever a branch's name is expected."""

_LENGTH = 60


@dataclass(frozen=True)
class Source:
    """The commit or work tree that is built and tested.

    Args:
        branch: A branch's name, :data:`WORKTREE`, or the requested ref.
        commit: The commit's name; for a work tree, the digest of its files.
        default: Whether it is the default branch.
    """

    branch: str
    commit: str
    default: bool = False


@dataclass(frozen=True)
class Task:
    """One job for one source; it has a machine of its own.

    Args:
        id: The task's unique name within the run, also the name of its folder.
        source: The source that it builds and tests.
        job: The job that it runs.
        needs: The ids of the tasks that must succeed first.
        prepared_as: The branch that owns its prepared template; if empty, its source's branch.
    """

    id: str
    source: Source
    job: Job
    needs: tuple[str, ...] = ()
    prepared_as: str = ""

    @property
    def title(self) -> str:
        """The task's readable name: branch and job."""
        return f"{self.source.branch} / {self.job.name}"


@dataclass(frozen=True)
class Plan:
    """The tasks of a run.

    Args:
        tasks: The tasks, each after those that it needs.
        definition: A readable name of the jobs' definition: ``main:pyproject.toml (1a2b3c4)``.
    """

    tasks: tuple[Task, ...]
    definition: str = ""


def make_plan(sources: Iterable[Source], jobs: Iterable[Job], definition: str = "") -> Plan:
    """Return a plan with a task for each of ``jobs`` and ``sources``; the jobs must be sorted by their needs.

    Needs that do not run for this branch, or are not among ``jobs``, are ignored.
    """
    jobs = list(jobs)
    tasks: list[Task] = []
    for source in sources:
        ids: dict[str, list[str]] = {}
        for job in jobs:
            if not job.is_for(source.branch):
                continue
            needs = tuple(one for key in job.needs for one in ids.get(key, ()))
            task = Task(_id(source, job), source, job, needs)
            ids.setdefault(job.key, []).append(task.id)
            tasks.append(task)
    return Plan(tuple(tasks), definition)


def _id(source: Source, job: Job) -> str:
    """Return a readable folder name for a task; a digest distinguishes names that would become the same."""
    text = f"{source.branch}.{job.name}"
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")
    if slug == text and len(slug) <= _LENGTH:
        return slug
    digest = hashlib.sha256(f"{source.branch}\0{job.name}".encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{slug[:_LENGTH].strip('-.')}-{digest}"
