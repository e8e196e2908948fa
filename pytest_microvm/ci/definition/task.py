"""A plan: which job runs for which branch, after which others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_microvm.ci.definition.job import Job

WORKTREE = "worktree"
"""What the work tree is called where a branch's name is expected."""

_LENGTH = 60


@dataclass(frozen=True)
class Source:
    """What is built and tested.

    Args:
        branch: A branch's name, :data:`WORKTREE`, or the ref that was asked for.
        commit: Its commit; of a work tree the digest of its files.
        default: Whether it is the default branch.
    """

    branch: str
    commit: str
    default: bool = False


@dataclass(frozen=True)
class Task:
    """One job for one source; it has a machine of its own.

    Args:
        id: Its name within the run, which is a folder's name, too.
        source: What it is for.
        job: What it does.
        needs: The ids of the tasks that have to succeed first.
        prepared_as: The branch whose its prepared template is; none: its source's own.
    """

    id: str
    source: Source
    job: Job
    needs: tuple[str, ...] = ()
    prepared_as: str = ""

    @property
    def title(self) -> str:
        """What people read: branch and job."""
        return f"{self.source.branch} / {self.job.name}"


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        tasks: In an order in which none comes before what it needs.
        definition: Where the jobs are defined, for people: ``main:pyproject.toml (1a2b3c4)``.
    """

    tasks: tuple[Task, ...]
    definition: str = ""


def make_plan(sources: Iterable[Source], jobs: Iterable[Job], definition: str = "") -> Plan:
    """Return the tasks of all ``jobs`` for all ``sources``; the jobs' order already heeds their needs.

    A job whose needs are not for this branch, or were not asked for, does not wait for them.
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
    """Return a folder's name that people recognise; a digest keeps two that look alike apart."""
    text = f"{source.branch}.{job.name}"
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")
    if slug == text and len(slug) <= _LENGTH:
        return slug
    digest = hashlib.sha256(f"{source.branch}\0{job.name}".encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{slug[:_LENGTH].strip('-.')}-{digest}"
