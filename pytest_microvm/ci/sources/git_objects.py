"""Read git's objects through a temporary repository that borrows them.

Only the original repository's objects are used: not its configuration, hooks, attributes, index or
references, and missing objects are not fetched.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pytest_microvm.git.bundle import borrowing
from pytest_microvm.git.commands import GitError, Talk
from pytest_microvm.git.repository import Repository

OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.ASCII)
"""An object's full name."""

_PIECE = 1024 * 1024
_ENTRY = re.compile(rb"([0-7]{6}) (blob|commit) ([0-9a-f]{40,64}) +([0-9]+|-)\t(.+)", re.DOTALL)


@dataclass(frozen=True)
class TreeEntry:
    """An entry of a tree: path, ``mode``, the object's name, and ``size`` in bytes (-1: none)."""

    path: bytes
    mode: int
    object: str
    size: int


@contextmanager
def borrowed(repository: Repository) -> Iterator[Repository]:
    """Yield a temporary repository that borrows another one's objects.

    Raises:
        GitError: git failed.
    """
    with tempfile.TemporaryDirectory(prefix="microvm-objects-") as folder:
        yield borrowing(repository, Path(folder) / "git")


def entries(repository: Repository, commit: str) -> Iterator[TreeEntry]:
    """Yield all files, links and submodules of a commit, as git lists them.

    Raises:
        GitError: ``commit`` is no commit, or some of its objects are missing.
    """
    command = ("ls-tree", "-r", "-l", "-z", "--full-tree", f"{commit}^{{tree}}")
    with repository.talk(*command) as talk:
        for line in talk.words(b"\0"):
            match = _ENTRY.fullmatch(line)
            if match is None:
                raise GitError("a file of the commit is missing here", details=repr(line)[:200])
            size = -1 if match[4] == b"-" else int(match[4])
            yield TreeEntry(match[5], int(match[1], 8), match[3].decode(), size)


class BlobReader:
    """Reads the contents of blobs, one after another."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    @contextmanager
    def content(self, name: str) -> Iterator[Content]:
        """Yield a blob's content, which must be read to its end.

        Raises:
            GitError: The blob does not exist, or was not read to its end.
        """
        self._talk.ask(name.encode() + b"\n")
        header = self._talk.until(b"\n")
        found = re.fullmatch(rb"%b blob ([0-9]+)" % name.encode(), header)
        if found is None:
            raise GitError("an object is missing here", details=header.decode("ascii", "replace"))
        content = Content(self._talk, int(found[1]))
        yield content
        if content.left:
            raise GitError("not all of an object was read")
        self._talk.exactly(1)

    def read(self, name: str) -> bytes:
        """Return a small blob's content."""
        with self.content(name) as content:
            return content.read(content.left)


class Content:
    """A blob's content as a stream that can be read once."""

    def __init__(self, talk: Talk, size: int) -> None:
        self._talk = talk
        self.left = size

    def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes, or all remaining ones if there are fewer."""
        size = self.left if size < 0 else min(size, self.left)
        self.left -= size
        return self._talk.exactly(size)

    def pieces(self) -> Iterator[bytes]:
        """Yield the remaining content in pieces."""
        while self.left:
            yield self.read(_PIECE)


@contextmanager
def blobs(repository: Repository) -> Iterator[BlobReader]:
    """Yield a reader for a repository's blobs; its git process ends with the block.

    Raises:
        GitError: git failed.
    """
    with repository.talk("cat-file", "--batch") as talk:
        yield BlobReader(talk)
