"""A repository on this computer as a source of branches: it is read, never checked out.

References are looked up in it; files are read from its objects only, see
:mod:`pytest_microvm.ci.sources.git_objects`. None of its hooks, filters, attributes or programs is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from pytest_microvm.ci.definition.parsing import (
    OWN_FILE,
    PYPROJECT,
    Definition,
    NoJobs,
    ci_table,
    parse_definition,
)
from pytest_microvm.ci.definition.task import WORKTREE, Source
from pytest_microvm.ci.definition.trust import KITS, asked_by_kits, own_images
from pytest_microvm.ci.sources.file_names import refusal
from pytest_microvm.ci.sources.git_objects import OBJECT
from pytest_microvm.ci.sources.git_tree import GitTree
from pytest_microvm.ci.sources.references import References, branch_name, shown_names
from pytest_microvm.ci.sources.tree import Tree
from pytest_microvm.ci.sources.work_tree import WorkTree
from pytest_microvm.errors import UsageError
from pytest_microvm.git.bundle import borrowing
from pytest_microvm.git.checkout import matches
from pytest_microvm.git.repository import Repository, find_checkout, repository_at, with_own_objects
from pytest_microvm.suite.workspace import DEFAULT_LIMIT
from pytest_microvm.untrusted.nofollow import OpenTree, bounded

_MAX_DEFINITION = 1024 * 1024  # bytes


class CodeRepository:
    """A repository, whose data is looked up lazily.

    Args:
        folder: A folder of its work tree, or a bare repository.
        bare: Whether it may be a bare repository: only if the user has named it, for a branch can place one
            in any folder.

    Attributes:
        folder: The work tree's top, or the bare repository.
        identity: An identifier of the repository on this computer, valid as a part of a file name.

    Raises:
        UsageError: The folder has no repository.
        HostError: git is missing.
    """

    def __init__(self, folder: Path, *, bare: bool = True) -> None:
        self.folder, self._bare, self._repository = _opened(folder, bare=bare)
        common = self._repository.directory.resolve()
        digest = hashlib.sha256(os.fsencode(common)).hexdigest()[:12]
        top = common.parent if common.name == ".git" else common
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", top.name).strip(".-")[:40]
        self.identity = f"{name or 'repository'}-{digest}"
        self._references = References(self.folder, self._repository, bare=self._bare)
        self._contents: dict[str, str] = {}  # SHA-256 by blob
        self._trees: dict[str, GitTree] = {}
        self._work_trees: dict[str, WorkTree] = {}

    @property
    def default_branch(self) -> str:
        """The default branch's name: origin's HEAD, else ``main``, ``master``, or, if no clone, the only one.

        Raises:
            UsageError: None of these exists.
        """
        return self.default.branch

    @property
    def default(self) -> Source:
        """The default branch.

        Raises:
            UsageError: The default branch is unknown.
        """
        branches, name = self._references.branches(), self._references.default()
        if name is None:
            raise UsageError(
                f"{self.folder}: which branch is the default one cannot be told",
                details=shown_names(branches),
                resolution="`git remote set-head origin --auto` asks origin; in a CI system's checkout fetch "
                "all branches (actions/checkout: fetch-depth: 0); or name a branch main",
            )
        return Source(name, branches[name], default=True)

    def branches(self, globs: Sequence[str] = ("*",)) -> list[Source]:
        """Return the branches that match one of ``globs``: local ones, and origin's without a local branch.

        The default branch comes first, the others follow by name.

        Raises:
            UsageError: A glob matches no branch.
        """
        known = self._references.branches()
        for glob in globs:
            if not any(matches(name, [glob]) for name in known):
                raise UsageError(
                    f"{self.folder}: no branch matches {glob!r}",
                    details=shown_names(known),
                    resolution="fetch it, or name another one",
                )
        default = self._references.default()
        return [
            Source(name, known[name], default=name == default)
            for name in sorted(known, key=lambda name: (name != default, name))
            if matches(name, globs)
        ]

    def changed_since(self, ref: str) -> list[Source]:
        """Return the branches that have commits which ``ref`` does not contain.

        Raises:
            UsageError: The ref does not exist.
        """
        _full, base = self._references.resolved(ref)
        changed = self._references.branches(f"--no-merged={base}").values()
        return [source for source in self.branches() if source.commit in changed]

    def ref(self, name: str) -> Source:
        """Return the source that a name means: ``main``, ``origin/main``, ``refs/pull/7/head``, ``1a2b3c4``.

        A branch precedes a tag of the same name. Only a branch gets a branch's name: a tag's source is named
        ``refs/tags/NAME``, a commit's by its full name, so that neither gets the privileges of a branch.

        Raises:
            UsageError: The name does not resolve to a commit.
        """
        full, commit = self._references.resolved(name)
        branch = branch_name(full)
        if branch is not None and self._references.branches().get(branch) == commit:
            return Source(branch, commit, default=branch == self._references.default())
        return Source(full or commit, commit)

    def worktree(self) -> Source:
        """Return the work tree in its current state.

        Raises:
            UsageError: The repository has no work tree.
        """
        if self._bare:
            raise UsageError(
                f"{self.folder} is a bare repository, which has no work tree", resolution="name a branch"
            )
        tree = WorkTree(self.folder)
        digest = tree.digest()
        self._work_trees[digest] = tree
        return Source(WORKTREE, digest)

    def tree(self, source: Source) -> Tree:
        """Return the files of a source that this object returned."""
        return self._work_trees.get(source.commit) or self._tree(source.commit)

    def notes(self, source: Source) -> list[str]:
        """Return readable notes about a source's files, complete once they were used."""
        tree = self._trees.get(source.commit)
        return [] if tree is None else list(tree.notes)

    def read(self, commit: str, path: str, limit: int) -> bytes | None:
        """Return the content of a regular file, ``None`` if there is no such file.

        Args:
            commit: A commit's full name, or :data:`pytest_microvm.ci.definition.task.WORKTREE`.
            path: The path relative to the top.
            limit: Maximum size in bytes.

        Raises:
            UsageError: The file exceeds the limit.
        """
        if refusal(os.fsencode(path)):
            return None
        if commit != WORKTREE:
            return self._tree(commit).read(path, limit)
        with OpenTree(self.folder) as tree:
            file = tree.open(path)
        if file is None:
            return None
        with file:
            return bounded(file, limit, self.folder / path)

    def export(self, ref: str, prefix: str, folder: Path) -> bool:
        """Write the regular files below ``prefix`` of a ref into an empty folder of this computer.

        Returns:
            Whether there are any files.

        Raises:
            UsageError: The ref does not exist.
        """
        tree = self._tree(self._references.resolved(ref)[1])
        files = tree.plain_files(prefix)
        for file in files:
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tree.read(file.path, DEFAULT_LIMIT)
            with target.open("xb") as out:
                out.write(content or b"")
            target.chmod(int(file.kind, 8))
        return bool(files)

    def bundle(self, source: Source, file: IO[bytes]) -> None:
        """Write a source's history as a git bundle: its commit as a branch and as HEAD, and its tags.

        The bundle has no objects that are unreachable from the commit. For a work tree it has the history of
        the commit that is checked out.

        Args:
            source: A source that this object returned.
            file: The file to write to.

        Raises:
            UsageError: The repository is a shallow clone.
        """
        commit, branch = source.commit, source.branch
        if source.branch == WORKTREE and source.commit in self._work_trees:
            full, commit = self._references.resolved("HEAD")
            branch = full.removeprefix("refs/heads/")
        if (self._repository.directory / "shallow").exists():
            raise UsageError(
                f"{self.folder} is a shallow clone, and the job wants history (git = true)",
                resolution="fetch all of it: `git fetch --unshallow`; with actions/checkout: fetch-depth: 0",
            )
        tags = self._references.tags(commit)
        with tempfile.TemporaryDirectory(prefix="microvm-bundle-") as folder:
            made = borrowing(self._repository, Path(folder) / "git")
            branch = "refs/heads/" + ("detached" if branch == "HEAD" else branch.removeprefix("refs/"))
            made.git("update-ref", branch, commit)
            made.git("symbolic-ref", "HEAD", branch)
            for name, tagged in tags.items():
                made.git("update-ref", name, tagged)
            made.git("bundle", "create", "--quiet", Path(folder) / "bundle", "--all", "HEAD")
            with (Path(folder) / "bundle").open("rb") as content:
                while piece := content.read(1024 * 1024):
                    file.write(piece)

    # Look-up

    def _tree(self, commit: str) -> GitTree:
        if not OBJECT.fullmatch(commit):
            raise UsageError(f"{commit!r} is not the name of a commit", resolution="look it up with ref()")
        if commit not in self._trees:
            folders = (self._repository.directory, self._repository.head)
            modules = [folder / "modules" for folder in folders if folder]
            tree = GitTree(self._repository, commit, modules=modules, known=self._contents)
            self._trees.setdefault(commit, tree)
        return self._trees[commit]


def read_definition(repository: CodeRepository, wanted: str | None = None) -> Definition:
    """Return the jobs that a repository defines; ``microvm.toml`` precedes ``pyproject.toml``.

    Args:
        repository: The repository.
        wanted: The ref that is trusted to define them, or ``worktree``: the files in the work tree;
            ``None``: the default branch.

    Raises:
        NoJobs: The repository defines no jobs.
        UsageError: The definition is invalid.
    """
    if wanted == WORKTREE:
        branch = commit = WORKTREE
        shown = "{}"
    else:
        source = repository.default if wanted is None else repository.ref(wanted)
        branch, commit = source.branch, source.commit
        shown = f"{source.branch if source.branch != commit else 'commit'}:{{}} ({commit[:7]})"
    for name in (OWN_FILE, PYPROJECT):
        content = repository.read(commit, name, _MAX_DEFINITION)
        where = shown.format(name)
        if content is None:
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{where} is not UTF-8: {error}", resolution="save it as UTF-8") from error
        if ci_table(text, where) is not None:
            definition = replace(parse_definition(text, where), branch=branch)
            return _with_kits(repository, commit, definition)
    raise NoJobs(
        f"{shown.format(f'{OWN_FILE}, {PYPROJECT}')}: no jobs are defined there",
        resolution=f'write into {OWN_FILE}: [ci.jobs.test] and steps = ["make test"], and commit it; '
        "`--definition-from worktree` takes it without a commit",
    )


def _with_kits(repository: CodeRepository, commit: str, definition: Definition) -> Definition:
    """Return a definition that includes the requests of the kits of the same commit."""
    if not own_images(definition.jobs):
        return definition
    with tempfile.TemporaryDirectory(prefix="microvm-kits-") as folder:
        project = Path(folder)
        if commit == WORKTREE:
            project = repository.folder
        else:
            repository.export(commit, KITS, project)
        asked = {**asked_by_kits(definition.jobs, project), **definition.asked}
    return replace(definition, asked=asked)


def _opened(folder: Path, *, bare: bool) -> tuple[Path, bool, Repository]:
    """Return a repository's top folder, whether it is bare, and the repository, for a folder inside it."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no directory", resolution="start it in the repository")
    checkout = find_checkout(folder)
    named = repository_at(folder) if bare else None
    if checkout and named and folder.resolve() != checkout.top / ".git":
        raise UsageError(
            f"{folder} is a bare repository in the work tree {checkout.top}",
            details="a branch can have a repository in any folder",
            resolution=f"name {checkout.top}, or move the repository out of it",
        )
    if checkout:
        return checkout.top, False, with_own_objects(checkout.repository)
    if named:
        return folder.resolve(), True, with_own_objects(named)
    raise UsageError(f"{folder} is no git repository", resolution="start it in the repository")
