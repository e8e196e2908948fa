"""Look up a repository's branches, tags and other references, and resolve names to commits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pytest_microvm.ci.definition.task import WORKTREE
from pytest_microvm.ci.sources.git_objects import OBJECT
from pytest_microvm.errors import UsageError
from pytest_microvm.git.commands import GitError
from pytest_microvm.git.repository import Repository, configuration

_HEADS, _REMOTE, _TAGS = "refs/heads/", "refs/remotes/origin/", "refs/tags/"
_MAX_REFS = 100_000
_MAX_NAME = 500  # characters of a requested ref
_SHOWN = 20  # branches that an error names


class References:
    """The references of a repository, read anew at each call.

    Args:
        folder: The repository's folder, for errors.
        repository: The repository.
        bare: Whether it has no work tree; then its HEAD names the default branch.
    """

    def __init__(self, folder: Path, repository: Repository, *, bare: bool) -> None:
        self._folder = folder
        self._repository = repository
        self._bare = bare

    def branches(self, *options: str) -> dict[str, str]:
        """Return all branches and their commits: local ones, and origin's that have no local branch.

        Args:
            *options: Options of git-for-each-ref(1).
        """
        refs = self._listed(*options, _HEADS, _REMOTE)
        theirs = {name.removeprefix(_REMOTE): tip for name, tip in refs.items() if name.startswith(_REMOTE)}
        ours = {name.removeprefix(_HEADS): tip for name, tip in refs.items() if name.startswith(_HEADS)}
        theirs.pop("HEAD", None)
        return {_called(name): tip for name, tip in {**theirs, **ours}.items()}

    def tags(self, commit: str) -> dict[str, str]:
        """Return the tags in a commit's history: their full names, and the objects that they name."""
        return self._listed(f"--merged={commit}", _TAGS)

    def default(self) -> str | None:
        """Return the default branch: origin's HEAD, else ``main``, ``master`` or the only branch.

        In a clone the only branch may be a fetched one by a stranger, so there it does not count.
        """
        known = self.branches()
        candidates = ["main", "master", *(known if len(known) == 1 and not self._cloned() else [])]
        try:
            said = self._git("symbolic-ref", "--quiet", "HEAD" if self._bare else f"{_REMOTE}HEAD")
            candidates.insert(0, said.removeprefix(_REMOTE).removeprefix(_HEADS))
        except GitError:
            pass
        return next((name for name in candidates if name in known), None)

    def _cloned(self) -> bool:
        """Return True if the repository has a remote, so that it may be a clone."""
        said = configuration(self._repository)
        return any(key.startswith("remote.") and key.endswith(".url") for key in said)

    def resolved(self, name: str) -> tuple[str, str]:
        """Return the full name of the ref that ``name`` resolves to, empty if it is no ref, and its commit.

        The order is git's own, see gitrevisions(7), but branches precede tags, and commits precede all. A
        branch that is named like a commit, a ref or a branch of origin is not found by that name.

        Raises:
            UsageError: The name does not resolve to a commit.
        """
        _check(name)
        refs = self._listed(_HEADS, _REMOTE)
        exact = name.startswith("refs/") or name in ("HEAD", "@") or OBJECT.fullmatch(name)
        candidates = [name] if exact else [_HEADS + name, f"refs/remotes/{name}", _REMOTE + name]
        for full in candidates:
            if full in refs:
                return full, refs[full]
        full = "" if OBJECT.fullmatch(name) else self._said("--symbolic-full-name", name)
        commit = self._said(f"{full or name}^{{commit}}")
        if not OBJECT.fullmatch(commit):
            raise UsageError(
                f"{self._folder}: {name!r} is no commit of this repository",
                details=shown_names(self.branches()),
                resolution="fetch it first, or name another one",
            )
        return full, commit

    def _listed(self, *arguments: str) -> dict[str, str]:
        """Return the references to commits with the objects that they name; symbolic ones are left out."""
        form = "--format=%(refname)%00%(objectname)%00%(*objecttype)%(objecttype)%00%(symref)"
        found: dict[str, str] = {}
        with self._repository.talk("for-each-ref", form, *arguments) as talk:
            for line in talk.words(b"\n"):
                name, tip, kind, symbolic = os.fsdecode(line).split("\0")
                if kind in ("commit", "committag") and not symbolic:
                    found[name] = tip
                if len(found) > _MAX_REFS:
                    raise UsageError(f"{self._folder} has more than {_MAX_REFS} references")
        return found

    def _said(self, *arguments: str) -> str:
        """Return the output of git-rev-parse(1), empty if it fails."""
        try:
            return self._git("rev-parse", "--verify", "--quiet", *arguments)
        except GitError:
            return ""

    def _git(self, *arguments: str) -> str:
        return self._repository.git(*arguments).rstrip("\n")


def branch_name(full: str) -> str | None:
    """Return the branch's name for a full ref name, ``None`` if the ref is no branch."""
    for prefix in (_HEADS, _REMOTE):
        if full.startswith(prefix):
            return _called(full.removeprefix(prefix))
    return None


def shown_names(branches: Iterable[str]) -> str:
    """Return a readable list of some branches, for an error."""
    names = sorted(branches)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"branches: {', '.join(names[:_SHOWN]) or 'none'}{more}"


def _called(branch: str) -> str:
    """Return a branch's name; one that could be taken for something else gets its full ref name."""
    strange = branch.startswith("refs/") or branch in (WORKTREE, "HEAD") or OBJECT.fullmatch(branch)
    return f"{_HEADS}{branch}" if strange else branch


def _check(name: str) -> None:
    """Refuse a name that cannot be a ref, or that git would take for an option.

    Raises:
        UsageError: The name is refused.
    """
    if not name or name.startswith("-") or not name.isprintable() or len(name) > _MAX_NAME:
        raise UsageError(f"{name!r} cannot be a ref", resolution="name a branch, a tag or a commit")
