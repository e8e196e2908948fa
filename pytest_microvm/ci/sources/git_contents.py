"""Read the contents of a commit's files, from whichever repository on this computer has them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_microvm.ci.sources.git_objects import BlobReader, blobs, borrowed
from pytest_microvm.ci.sources.large_files import MAX_POINTER, large_file, parse_pointer
from pytest_microvm.ci.sources.tree import Kind
from pytest_microvm.errors import UsageError
from pytest_microvm.git.repository import Repository
from pytest_microvm.settings.spec import format_size

_PIECE = 1024 * 1024


@dataclass(frozen=True)
class CommitFile:
    """A file of a commit.

    Args:
        path: The path relative to the top.
        kind: The kind of file.
        object: The name of its blob.
        size: The blob's size in bytes.
        home: The folder of the repository that has the blob.
    """

    path: str
    kind: Kind
    object: str
    size: int
    home: Path


class Readable(Protocol):
    """A readable binary stream."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end."""


class Contents:
    """Reads the contents of files, one at a time.

    Args:
        homes: The repositories by their folders.
        limit: Maximum size of all files together, in bytes.
        note: Called with messages about large files that are not on this computer.
    """

    def __init__(
        self, homes: Mapping[Path, Repository], limit: int, note: Callable[[str], None], stack: ExitStack
    ) -> None:
        self._homes = homes
        self._limit = self._left = limit
        self._note = note
        self._stack = stack
        self._blobs: dict[Path, BlobReader] = {}

    @contextmanager
    def content(self, file: CommitFile) -> Iterator[tuple[Readable, int]]:
        """Yield a file's content, which must be read to its end, and its size in bytes."""
        found = self._of(file.home)
        if file.kind == "link" or file.size > MAX_POINTER:
            with found.content(file.object) as content:
                self._count(file.path, content.left)
                yield content, content.left
            return
        data = found.read(file.object)
        pointer = parse_pointer(data)
        if pointer is None:
            self._count(file.path, len(data))
            yield io.BytesIO(data), len(data)
            return
        with large_file(file.home, pointer) as large:
            if large is None:
                self._note(f"{file.path}: its content is in LFS and not on this computer; its pointer stays")
            size = len(data) if large is None else pointer.size
            self._count(file.path, size)
            yield large or io.BytesIO(data), size

    def sha256(self, file: CommitFile) -> str:
        """Return the SHA-256 of a file's content."""
        digest = hashlib.sha256()
        with self.content(file) as (content, _size):
            while piece := content.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def _of(self, home: Path) -> BlobReader:
        if home not in self._blobs:
            repository = self._stack.enter_context(borrowed(self._homes[home]))
            self._blobs[home] = self._stack.enter_context(blobs(repository))
        return self._blobs[home]

    def _count(self, path: str, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise too_large(f"with {path} they have", self._limit)


@contextmanager
def contents(homes: Mapping[Path, Repository], limit: int, note: Callable[[str], None]) -> Iterator[Contents]:
    """Yield a reader for contents of files for the duration of the block; see :class:`Contents`.

    Raises:
        GitError: git failed.
    """
    with ExitStack() as stack:
        yield Contents(homes, limit, note, stack)


def too_large(details: str, limit: int) -> UsageError:
    """Return the error for sources that are too large."""
    return UsageError(
        f"the sources have more than {format_size(limit)} bytes",
        details=details,
        resolution="keep what builds and tests do not need out of the repository",
    )
