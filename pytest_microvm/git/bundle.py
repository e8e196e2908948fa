"""Import a bundle of commits from a machine: its header is parsed here, its pack only by git's own checks.

The host's repository supplies the objects that the new ones build on; nothing in it refers to the new ones
until all have been checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pytest_microvm.errors import TransferError
from pytest_microvm.git.commands import GitError, git
from pytest_microvm.git.repository import Repository
from pytest_microvm.untrusted.nofollow import read_below
from pytest_microvm.untrusted.text import sanitize_line

_MAX_HEADER = 256 * 1024  # bytes
_MAX_SHALLOW = 64 * 1024 * 1024  # bytes: a commit's name for each line
_SIGNATURES = (b"# v2 git bundle\n", b"# v3 git bundle\n")
_SUBJECTS = 20
_SUBJECT_LENGTH = 120
_NEW = "refs/heads/new"


@dataclass(frozen=True)
class Commits:
    """The content of a bundle: number of commits, and first lines of the newest, made safe to show."""

    count: int
    subjects: tuple[str, ...]


class BadBundle(TransferError):
    """A bundle that is invalid, or has unexpected content."""


def import_commits(bundle: Path, repository: Repository, base: str, tip: str, looking: Path) -> Commits:
    """Import the objects of a bundle into a repository, without a reference to them.

    Args:
        bundle: The file that a machine sent.
        repository: The destination.
        base: The commit that the machine was handed.
        tip: The commit that it claims to have sent.
        looking: A folder for a throwaway repository, in which the bundle is checked first.

    Raises:
        BadBundle: It was refused; nothing has changed.
    """
    try:
        with _pack(bundle, tip) as pack:
            start = pack.tell()
            throwaway = borrowing(repository, looking)
            commits = _looked_at(throwaway, pack, base, tip)
            pack.seek(start)
            _index(repository, pack)
    except GitError as error:
        raise BadBundle("git does not accept it", details=error.details) from error
    return commits


def _looked_at(throwaway: Repository, pack: IO[bytes], base: str, tip: str) -> Commits:
    _index(throwaway, pack)
    throwaway.git("update-ref", "refs/heads/base", base)
    throwaway.git("update-ref", _NEW, tip)  # for a branch, git accepts only commits
    new = (_NEW, "--not", "refs/heads/base")
    throwaway.git("rev-list", "--objects", "--quiet", *new)  # all objects that it needs exist
    count = int(throwaway.git("rev-list", "--count", *new))
    shown = f"--format=%<({_SUBJECT_LENGTH},trunc)%s"
    subjects = throwaway.git("log", "-z", f"--max-count={_SUBJECTS}", shown, *new)
    return Commits(count, tuple(sanitize_line(line.strip()) for line in subjects.split("\0") if line.strip()))


def _index(repository: Repository, pack: IO[bytes]) -> None:
    """Check every object of a pack, and store the pack if all are valid (git-index-pack(1))."""
    repository.git("index-pack", "--strict", "--fix-thin", "--stdin", stdin=pack)


def borrowing(repository: Repository, folder: Path) -> Repository:
    """Create a bare repository in ``folder`` that borrows the objects of another one, and nothing else."""
    git("init", "--quiet", "--bare", "--template=", f"--object-format={repository.format}", folder)
    (folder / "objects" / "info").mkdir(exist_ok=True)
    objects = bytes(repository.directory.resolve() / "objects")
    if b"\n" in objects:  # each line is one path
        raise GitError(f"{repository.directory}: git cannot borrow objects of a folder with such a name")
    (folder / "objects" / "info" / "alternates").write_bytes(objects + b"\n")
    shallow = read_below(repository.directory, "shallow", _MAX_SHALLOW)
    if shallow is not None:
        (folder / "shallow").write_bytes(shallow)
    return Repository(folder, repository.format, own=True)


@contextmanager
def _pack(bundle: Path, tip: str) -> Iterator[IO[bytes]]:
    """Open a bundle at its pack, if its header names only HEAD (gitformat-bundle(5))."""
    with bundle.open("rb", buffering=0) as file:
        header, end, _rest = file.read(_MAX_HEADER).partition(b"\n\n")
        signature, _newline, rest = header.partition(b"\n")
        if not end or signature + b"\n" not in _SIGNATURES:
            raise BadBundle("what the machine sent is no bundle")
        lines = [line for line in rest.split(b"\n") if not line.startswith(b"-")]
        heads = [line for line in lines if not re.fullmatch(rb"@object-format=sha(1|256)", line)]
        if heads != [f"{tip} HEAD".encode()]:
            raise BadBundle("the bundle holds other references than the one that was asked for")
        file.seek(len(header) + len(end))
        yield file
