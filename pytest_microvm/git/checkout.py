"""Which branch is checked out in a folder: that is whose configuration lies there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.repository import Repository, configuration, find_checkout

OWN_REMOTE = "origin"
"""The remote that a clone comes from."""

_HEADS = "refs/heads/"
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkout:
    """What is checked out, named as :class:`pytest_microvm.ci.definition.task.Source` names it.

    Args:
        name: A branch's name; the whole ref that it follows if that is no branch, as ``refs/pull/7/head``; a
            commit's whole name if no branch is checked out; nothing if there is no repository.
        remote: The remote, or the address, that the branch follows; nothing if it follows none.
    """

    name: str
    remote: str = ""

    @property
    def is_branch(self) -> bool:
        """Whether it is a branch of its repository, and called by its name."""
        return bool(self.name) and not self.name.startswith("refs/") and not _COMMIT.fullmatch(self.name)

    def __str__(self) -> str:
        if not self.name:
            return "a folder without a repository"
        if _COMMIT.fullmatch(self.name):
            return f"commit {self.name}"
        follows = f" of {self.remote}" if self.remote not in ("", OWN_REMOTE) else ""
        return f"{'' if self.name.startswith('refs/') else 'branch '}{self.name}{follows}"


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether one of ``globs`` (``*``, ``?``, ``[...]``; ``*`` crosses slashes) matches a branch's name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def checked_out(folder: Path) -> Checkout:
    """Return what is checked out in a folder, by the repository that it lies in.

    That is the nearest folder with a ``.git``, which no commit can contain: git's own discovery would take a
    folder of a branch, too, that looks like a bare repository. References and configuration are read; nothing
    that they name is run.

    Raises:
        UsageError: The repository does not tell.
        HostError: There is a repository, and git is missing.
    """
    found = find_checkout(folder)
    if found is None:
        return Checkout("")
    repository = found.repository
    head = _said(repository, "symbolic-ref", "HEAD") or _said(
        repository, "rev-parse", "--verify", "HEAD^{commit}"
    )
    if not head.startswith("refs/") and not _COMMIT.fullmatch(head):
        raise UsageError(
            f"{found.top}: what is checked out there cannot be told",
            resolution="see what `git status` says; a repository without commits has to have a branch",
        )
    if not head.startswith(_HEADS):
        return Checkout(head)
    name = head.removeprefix(_HEADS)
    said = configuration(repository)
    remote = said.get(f"branch.{name}.remote", [""])[-1]
    if remote in ("", "."):  # none, or another branch of this repository
        return Checkout(_called(name))
    followed = said.get(f"branch.{name}.merge", [""])[-1]
    if followed and not followed.startswith(_HEADS):
        return Checkout(followed, remote)
    return Checkout(_called(name), remote)


def _called(branch: str) -> str:
    """Return what a branch is called; one that calls itself like something else, with its whole name."""
    return f"{_HEADS}{branch}" if branch.startswith("refs/") or _COMMIT.fullmatch(branch) else branch


def _said(repository: Repository, *arguments: str) -> str:
    try:
        return repository.git(*arguments).removesuffix("\n")
    except GitError:
        return ""
