"""Make a ``.git`` for a copy of a work tree: the history of HEAD, its tags and the index.

It is made from objects and references alone, as a clone is: hooks, configuration, remotes, other branches,
stashes and the reflog stay behind. A large history is cut below the nearest tags, so that ``git describe``
says the same as in the work tree.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pytest_microvm.errors import UsageError
from pytest_microvm.git.bundle import borrowing
from pytest_microvm.git.commands import GitError, git
from pytest_microvm.git.heads import head_branch, head_commit, set_head
from pytest_microvm.git.repository import Checkout, Repository, configuration, with_own_objects
from pytest_microvm.untrusted.nofollow import OpenTree, read_below

WHOLE = 64 * 1024**2
"""Bytes of a repository's objects up to which its history is not cut."""

LIMIT = 256 * 1024**2
"""Bytes that a history may have, compressed as git stores it."""

_MAX_TAGS = 100_000
_MAX_EXCLUDES = 1024 * 1024  # bytes
_MAX_INDEX = 256 * 1024**2  # bytes
_FORM = b"1"  # of what is made; a new one makes all templates with a history anew
_LENT, _STAGED, _CUT, _HANDED = "refs/heads/lent", "refs/microvm/staged", "refs/heads/cut-", "refs/handed/"
_GITLINK = b"160000"
_VERSIONS = "*[0-9]*"  # tags that setuptools-scm, versioningit and others look for

# The copy's files have other inodes, owners and change times: size and modification time have to do.
_SETTINGS = (("core.checkStat", "minimal"), ("core.trustctime", "false"))


@dataclass(frozen=True)
class CheckoutHistory:
    """The history of a checkout, as it was when it was read.

    Args:
        checkout: The checkout.
        commit: The commit that is checked out; empty: there is none yet.
        branch: The branch that is checked out; ``None``: HEAD is detached.
        tracked: The paths of the index, without submodules.
        missing: Tracked paths that the copy of the work tree lacks: they do not count as deleted there.
        size: Bytes of the repository's objects, also those of other branches.
        state: The digest of all that decides what is made.
    """

    checkout: Checkout
    commit: str
    branch: str | None
    tracked: frozenset[str] = field(repr=False)
    size: int
    state: bytes
    missing: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return the SHA-256 of the inputs of :meth:`make`; a commit, a tag or ``git add`` changes it."""
        total = hashlib.sha256(_FORM + self.state)
        for path in self.missing:
            total.update(os.fsencode(path) + b"\0")
        return total.hexdigest()

    def make(self, folder: Path) -> Path:
        """Make the ``.git`` in an empty folder; return it.

        Raises:
            UsageError: The history is too large, or not complete.
        """
        try:
            return self._made(folder)
        except GitError as error:
            raise UsageError(
                f"the history of {self.checkout.top} cannot be copied",
                details=error.details,
                resolution="see `git fsck`; a partial clone needs `git fetch --refetch` first",
            ) from error

    def _made(self, folder: Path) -> Path:
        repository = self.checkout.repository
        git("init", "--quiet", "--template=", f"--object-format={repository.format}", folder / "made")
        made = Repository(folder / "made" / ".git", repository.format, own=True)
        self._fetch(made, folder / "lender")
        set_head(made, self.branch, self.commit)
        made.git("pack-refs", "--all")
        self._configure(made)
        self._copy_index(made.directory)
        self._clean_index(made)
        size = sum(path.lstat().st_size for path in made.directory.rglob("*"))
        if size > LIMIT:
            raise self._too_large(size)
        return made.directory

    def _fetch(self, made: Repository, lending: Path) -> None:
        """Fetch HEAD, its tags and what is staged from a repository that borrows the host's objects."""
        repository = self.checkout.repository
        lender = borrowing(repository, lending)
        options = ["--update-shallow"] if (repository.directory / "shallow").exists() else []
        wanted = []
        if self.commit:
            lender.git("update-ref", _LENT, self.commit)
            wanted += [f"{_LENT}:{_HANDED}head", "refs/tags/*:refs/tags/*"]
            options += self._lend_tags(lender)
        staged = self._staged(lender)
        if staged:
            lender.git("update-ref", _STAGED, staged)
            wanted.append(f"{_STAGED}:{_HANDED}staged")
        if not wanted:
            return
        git(
            "--git-dir", made.directory, "-c", "fetch.unpackLimit=1", "fetch", "--quiet", "--no-tags",
            "--no-write-fetch-head", *options, lender.directory, *wanted, local=True,
        )  # fmt: skip
        for reference in wanted:
            if _HANDED in reference:
                made.git("update-ref", "-d", reference.partition(":")[2])

    def _lend_tags(self, lender: Repository) -> list[str]:
        """Let the lender lend the tags of HEAD's history; return the options that cut a large one."""
        repository = self.checkout.repository
        tags = dict(_tags(repository, f"--merged={self.commit}"))
        options = []
        if self.size > WHOLE:
            cuts = _parents(repository, _needed(repository, self.commit))
            self._check_size(repository, cuts)
            for number, cut in enumerate(cuts):
                lender.git("update-ref", f"{_CUT}{number}", cut)
                options.append(f"--shallow-exclude={_CUT}{number}")
                for name, _target in _tags(repository, f"--merged={cut}"):
                    tags.pop(name, None)
        with _words(f"create {name}\0{target}" for name, target in tags.items()) as commands:
            lender.git("update-ref", "--stdin", "-z", stdin=commands)
        return options

    def _staged(self, lender: Repository) -> str:
        """Return a tree that holds all staged content; empty if the index is empty."""
        if not self.tracked:
            return ""
        self._copy_index(lender.directory)
        try:
            return lender.git("write-tree").strip()
        except GitError:  # in a conflict; then a tree of all versions of the files
            blobs = [about.split()[2] for about, _path in _index(self.checkout) if _GITLINK not in about]
        with _words(
            f"100644 blob {os.fsdecode(which)}\t{number}" for number, which in enumerate(blobs)
        ) as tree:
            return lender.git("mktree", "-z", stdin=tree).strip()

    def _check_size(self, repository: Repository, cuts: Sequence[str]) -> None:
        """Check the size of the history before it is fetched and fills this computer's disk."""
        counted = ("rev-list", "--objects", "--disk-usage")
        size = int(repository.git(*counted, self.commit, *(f"^{cut}" for cut in cuts)))
        if cuts:
            size += int(repository.git(*counted, f"{self.commit}^{{tree}}"))
        if size > LIMIT:
            raise self._too_large(size)

    def _too_large(self, size: int) -> UsageError:
        return UsageError(
            f"the history of {self.checkout.top} has {size / 1024**2:.0f} MiB, more than "
            f"{LIMIT // 1024**2} MiB",
            details="it begins at the nearest tag" if self.size > WHOLE else "",
            resolution="tag a later commit (git describe begins there), or run without --microvm-git",
        )

    def _configure(self, made: Repository) -> None:
        settings = [*_SETTINGS]
        if configuration(self.checkout.repository).get("core.filemode", [""])[-1].lower() == "false":
            settings.append(("core.fileMode", "false"))
        for name, value in settings:
            made.git("config", name, value)
        excludes = read_below(self.checkout.repository.directory, "info/exclude", _MAX_EXCLUDES)
        if excludes is not None:
            (made.directory / "info").mkdir(exist_ok=True)
            (made.directory / "info" / "exclude").write_bytes(excludes)

    def _copy_index(self, directory: Path) -> None:
        """Copy the index as it is: only so a changed, staged or conflicting file is shown as such.

        Its time is kept, by which git recognises files that changed after it was written.
        """
        source = self.checkout.repository.head or self.checkout.repository.directory
        with OpenTree(source) as tree:
            names = [name for name in tree.names() if name == "index" or name.startswith("sharedindex.")]
            for name in names:
                content, status = read_below(source, name, _MAX_INDEX), tree.status(name)
                if content is not None and status is not None:
                    (directory / name).write_bytes(content)
                    os.utime(directory / name, ns=(status.st_mtime_ns, status.st_mtime_ns))

    def _clean_index(self, made: Repository) -> None:
        """Rewrite the index without names of untracked folders (git's caches), and with the missing paths.

        git compares nothing anew, so the index keeps its time.
        """
        index = made.directory / "index"
        if not index.exists():
            return
        written = index.stat().st_mtime_ns
        with _words(self.missing) as paths:
            git(
                "--git-dir", made.directory, "--work-tree", self.checkout.top, "update-index",
                "--no-split-index", "--no-untracked-cache", "--no-fsmonitor", "--force-write-index",
                "--skip-worktree", "-z", "--stdin", stdin=paths,
            )  # fmt: skip
        os.utime(index, ns=(written, written))
        for shared in made.directory.glob("sharedindex.*"):
            shared.unlink()


def read_history(checkout: Checkout) -> CheckoutHistory:
    """Read what is checked out, its tags and its index.

    Raises:
        UsageError: The repository borrows objects of another one, or cannot be read.
    """
    repository = with_own_objects(checkout.repository)
    try:
        branch = head_branch(repository)
        try:
            commit = head_commit(repository)
        except GitError:
            if branch is None:
                raise
            commit = ""
        state = hashlib.sha256(f"{commit} {branch}\n".encode("utf-8", "surrogateescape"))
        for name, target in _tags(repository):
            state.update(f"{name} {target}\n".encode("utf-8", "surrogateescape"))
        tracked = set()
        for about, path in _index(checkout):
            state.update(about + b"\t" + path + b"\0")
            if _GITLINK not in about.split():
                tracked.add(os.fsdecode(path))
        size = _size(repository)
    except GitError as error:
        raise UsageError(
            f"the repository of {checkout.top} cannot be read",
            details=f"{error.brief}\n{error.details}".strip(),
            resolution="see `git fsck`; or run without --microvm-git",
        ) from error
    state.update(read_below(repository.directory, "info/exclude", _MAX_EXCLUDES) or b"")
    return CheckoutHistory(checkout, commit, branch, frozenset(tracked), size, state.digest())


def _index(checkout: Checkout) -> Iterator[tuple[bytes, bytes]]:
    """Yield the entries of the index: flag, mode, blob and stage; and path."""
    with checkout.listing("--stage", "-v") as talk:
        for word in talk.words(b"\0"):
            about, _tab, path = word.partition(b"\t")
            yield about, path


def _size(repository: Repository) -> int:
    lines = repository.git("count-objects", "-v").splitlines()
    counted = dict(line.split(": ", 1) for line in lines if ": " in line)
    return (int(counted["size"]) + int(counted["size-pack"])) * 1024


def _tags(repository: Repository, *options: str) -> Iterator[tuple[str, str]]:
    """Yield the tags of a repository, each with the id of its object."""
    command = ("for-each-ref", f"--count={_MAX_TAGS}", "--format=%(refname) %(objectname)", *options)
    with repository.talk(*command, "refs/tags") as talk:
        for word in talk.words(b"\n"):
            name, _space, target = os.fsdecode(word).rpartition(" ")
            yield name, target


@contextmanager
def _words(values: Iterable[str]) -> Iterator[IO[bytes]]:
    """Yield a file with values, each ended by a NUL."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(os.fsencode(value) + b"\0" for value in values))
        file.seek(0)
        yield file


def _needed(repository: Repository, commit: str) -> list[str]:
    """Return the commits that ``git describe`` may look for: those of the nearest tags of each kind."""
    found = set()
    for options in ((), ("--tags",), ("--tags", f"--match={_VERSIONS}")):
        with suppress(GitError):  # there is none
            tag = repository.git("describe", "--abbrev=0", *options, commit).strip()
            found.add(repository.git("rev-parse", "--verify", f"refs/tags/{tag}^{{commit}}").strip())
    return sorted(found)


def _parents(repository: Repository, commits: Sequence[str]) -> list[str]:
    """Return the commits at which history can be cut: below the newest one that leads to all ``commits``."""
    try:
        base = repository.git("merge-base", "--octopus", *commits).strip() if commits else ""
    except GitError:  # there is no such commit
        return []
    return repository.git("rev-list", "--parents", "--max-count=1", base).split()[1:] if base else []
