"""Find the branch checked out in a folder, which determines the owner of the configuration in that folder."""

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
class CheckedOutRef:
    """The checked-out branch or commit, named as in :class:`pytest_microvm.ci.definition.task.Source`.

    Args:
        name: A branch's name; the full ref that it follows if that is not a branch, such as
            ``refs/pull/7/head``; a full commit id if no branch is checked out; empty without a repository.
        remote: The remote, or the address, that the branch follows; empty if it follows none.
    """

    name: str
    remote: str = ""

    @property
    def is_branch(self) -> bool:
        """True if ``name`` is the plain name of a branch."""
        return bool(self.name) and not self.name.startswith("refs/") and not _COMMIT.fullmatch(self.name)

    def __str__(self) -> str:
        if not self.name:
            return "a folder without a repository"
        if _COMMIT.fullmatch(self.name):
            return f"commit {self.name}"
        follows = f" of {self.remote}" if self.remote not in ("", OWN_REMOTE) else ""
        return f"{'' if self.name.startswith('refs/') else 'branch '}{self.name}{follows}"


def matches(name: str, globs: Sequence[str]) -> bool:
    """Return True if a glob (``*``, ``?``, ``[...]``; ``*`` crosses slashes) matches a branch's name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def checked_out(folder: Path) -> CheckedOutRef:
    """Return the branch or commit checked out in the repository that contains a folder.

    The repository is that of the nearest folder with a ``.git``, which no commit can contain: git's own
    discovery would also accept a branch's folder that looks like a bare repository. References and
    configuration are read; nothing that they name is run.

    Raises:
        UsageError: The repository has neither a branch nor a commit.
        HostError: There is a repository, and git is missing.
    """
    found = find_checkout(folder)
    if found is None:
        return CheckedOutRef("")
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
        return CheckedOutRef(head)
    name = head.removeprefix(_HEADS)
    said = configuration(repository)
    remote = said.get(f"branch.{name}.remote", [""])[-1]
    if remote in ("", "."):  # none, or another branch of this repository
        return CheckedOutRef(_called(name))
    followed = said.get(f"branch.{name}.merge", [""])[-1]
    if followed and not followed.startswith(_HEADS):
        return CheckedOutRef(followed, remote)
    return CheckedOutRef(_called(name), remote)


def _called(branch: str) -> str:
    """Return a branch's name, or its full ref if the name looks like a ref or a commit."""
    return f"{_HEADS}{branch}" if branch.startswith("refs/") or _COMMIT.fullmatch(branch) else branch


def _said(repository: Repository, *arguments: str) -> str:
    try:
        return repository.git(*arguments).removesuffix("\n")
    except GitError:
        return ""
