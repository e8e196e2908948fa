"""Open files below a folder, component by component via descriptors, without following links.

Only this module reads a stranger's tree. A check of a path before it is opened by name is not enough: the
name may mean something else by then, and the kernel follows a link on the way. Linux has openat2(2) with
``RESOLVE_BENEATH`` for this; Python has no call for it, and the same walk in user space is as safe, see
ADR 0026.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pytest_microvm.errors import UsageError

MAX_DEPTH = 256
"""Maximum nesting of folders that are read: each holds a descriptor."""

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A link, a file in place of a folder, nothing, a name that is too long.
_NOT_THERE = frozenset([errno.ELOOP, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG])


def open_folder(path: Path) -> int:
    """Open a directory by its resolved path; fail if a link was put on the way since.

    Raises:
        OSError: It is not there any more, or a link is on the way.
    """
    here = os.open("/", FOLDER_FLAGS)
    for segment in path.parts[1:]:
        try:
            below = os.open(segment, FOLDER_FLAGS, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


@contextlib.contextmanager
def folder_below(root: int, segments: list[str]) -> Iterator[int | None]:
    """Open a directory below ``root`` without following links; ``None`` if there is none."""
    here: int | None = os.dup(root)
    try:
        for segment in segments:
            assert here is not None, "the loop ends where nothing is"
            try:
                below = os.open(segment, FOLDER_FLAGS, dir_fd=here)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                os.close(here)
                here = None
                break
            os.close(here)
            here = below
        yield here
    finally:
        if here is not None:
            os.close(here)


def open_file(parent: int, name: str) -> IO[bytes]:
    """Open a regular file for reading; reject a link or anything else in its place.

    Raises:
        OSError: It is not a regular file.
    """
    file = os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=parent), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", name)
    return file


def open_named(path: Path) -> IO[bytes]:
    """Open a regular file that the user has named; links are followed, and a pipe does not block.

    Raises:
        OSError: It is not a regular file, or cannot be read.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
    return file


class OpenTree:
    """Access to files below a folder by relative paths with ``/``, without following links.

    The folders on the way to the last path stay open, so that sorted paths need few system calls. Not
    thread-safe.

    Args:
        top: The folder; links on the way to it are followed, since the user named it.

    Raises:
        OSError: It is not a folder, or cannot be read.
    """

    def __init__(self, top: Path) -> None:
        self._names: list[str] = []
        self._folders = [os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]

    def __enter__(self) -> OpenTree:  # noqa: PYI034 - Self is new in Python 3.11
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all open descriptors."""
        while self._folders:
            os.close(self._folders.pop())

    def status(self, path: str) -> os.stat_result | None:
        """Return the status of a path, or of the link itself; ``None`` if it does not exist."""
        *above, name = _parts(path)
        folder = self._folder(above)
        if folder is None:
            return None
        try:
            return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            return None

    def target(self, path: str) -> str | None:
        """Return the target of a link; ``None`` if the path is not a link."""
        *above, name = _parts(path)
        folder = self._folder(above)
        try:
            return None if folder is None else os.readlink(name, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NOT_THERE | {errno.EINVAL}:
                raise
            return None

    def open(self, path: str) -> IO[bytes] | None:
        """Open a regular file; return ``None`` for anything else, such as a link, a pipe or a folder.

        Raises:
            OSError: It cannot be read.
        """
        *above, name = _parts(path)
        folder = self._folder(above)
        try:
            return None if folder is None else open_file(folder, name)
        except OSError as error:
            if error.errno not in _NOT_THERE | {errno.EINVAL, errno.ENXIO, errno.EISDIR}:
                raise
            return None

    def names(self, path: str = "") -> list[str]:
        """Return the names in a folder, sorted; none if it is not a folder."""
        folder = self._folder(_parts(path) if path else [])
        return [] if folder is None else sorted(os.listdir(folder))  # noqa: PTH208 - a descriptor

    def _folder(self, names: list[str]) -> int | None:
        """Return the descriptor of a folder, valid until the next call; ``None`` if it is not a folder."""
        if len(names) > MAX_DEPTH:
            raise UsageError(
                f"{'/'.join(names)[:200]}...: more than {MAX_DEPTH} folders inside each other",
                resolution="leave it out of the project",
            )
        common = 0
        while common < min(len(names), len(self._names)) and names[common] == self._names[common]:
            common += 1
        while len(self._names) > common:
            self._names.pop()
            os.close(self._folders.pop())
        for name in names[common:]:
            try:
                below = os.open(name, FOLDER_FLAGS, dir_fd=self._folders[-1])
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                return None
            self._folders.append(below)
            self._names.append(name)
        return self._folders[-1]


def read_below(top: Path, path: str, limit: int) -> bytes | None:
    """Return a regular file's content; ``None`` if it does not exist.

    Args:
        top: The folder to read in; see :class:`OpenTree`.
        path: Relative to it.
        limit: Bytes that it may have.

    Raises:
        UsageError: The path is or crosses a link, is not a regular file, or the file is too large.
        OSError: It cannot be read.
    """
    try:
        tree = OpenTree(top)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with tree:
        file = tree.open(path)
        if file is None:
            _refuse(tree, top, path)
            return None
    with file:
        return bounded(file, limit, top / path)


def refuse_links(project: Path, path: Path) -> None:
    """Raise an error if a path goes through a symbolic link of a project.

    Links outside the project, also those on the way to it, are the user's and allowed. ``..`` is resolved as
    the kernel does: after a link it leads out.

    Args:
        project: Its folder.
        path: The path to read or write; if relative, it is relative to the project.

    Raises:
        UsageError: The path, or a folder on the way, is a link that lies in the project.
    """
    top = project.resolve()
    path = project.absolute() / path
    for step in [*reversed(path.parents), path]:
        if step.is_symlink() and step.parent.resolve().is_relative_to(top):
            raise UsageError(
                f"{step} is a link of the project to {os.fspath(step.readlink())!r}, which would be followed",
                resolution="remove the link, or name the place itself that is meant",
            )


def bounded(file: IO[bytes], limit: int, shown: Path) -> bytes:
    """Return a file's content, at most ``limit`` bytes.

    Args:
        file: The file.
        limit: Bytes that it may have.
        shown: Its name, for the error.

    Raises:
        UsageError: It is too large.
    """
    content = bytearray()
    while len(content) <= limit and (piece := file.read(limit + 1 - len(content))):
        content += piece
    if len(content) > limit:
        raise UsageError(f"{shown} has more than {limit} bytes", resolution="make it smaller")
    return bytes(content)


def _refuse(tree: OpenTree, top: Path, path: str) -> None:
    """Raise an error that names the reason if an existing path is not read; return if it does not exist."""
    parts = _parts(path)
    for number in range(1, len(parts) + 1):
        here = "/".join(parts[:number])
        status = tree.status(here)
        if status is None:
            return
        if stat.S_ISLNK(status.st_mode):
            raise UsageError(
                f"{top / here} is a link, and links of a project are not followed",
                resolution="put the file itself there",
            )
    raise UsageError(f"{top / path} is no regular file", resolution="put a file there")


def _parts(path: str) -> list[str]:
    """Split a relative path into names, and reject ``..`` and the like.

    Raises:
        UsageError: It is not a path below a folder.
    """
    parts = path.split("/")
    if not path or "\0" in path or not {"", ".", ".."}.isdisjoint(parts):
        raise UsageError(f"{path!r} is no path below a folder", resolution="name what is in it")
    return parts
