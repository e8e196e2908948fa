"""Open and inspect entries of a live mount's directory by name, without following links."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from pytest_microvm.mounts.live.messages import error
from pytest_microvm.mounts.live.nodes import identity

ALWAYS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Flags for every open(2) of a file."""

_MAX_NAME = 255  # bytes


def checked_name(name: bytes) -> str:
    """Validate a name from a machine and return it as text.

    Raises:
        OSError: The name is empty, a path, or too long.
    """
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)
    if len(name) > _MAX_NAME:
        raise error(errno.ENAMETOOLONG)
    return os.fsdecode(name)


def shown(parent: int, name: str) -> os.stat_result:
    """Return the status of ``name`` if it is visible to machines: devices, pipes and sockets are hidden."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise error(errno.ENOENT)
    return status


def check_same(parent: int, names: dict[str, int]) -> None:
    """Check that each name still refers to its open file.

    Raises:
        OSError: Another machine, or the host, has replaced a file.
    """
    for name, file in names.items():
        if identity(shown(parent, name)) != identity(os.fstat(file)):
            raise error(errno.EBUSY)


def regular(file: int) -> int:
    """Return a descriptor if it is a regular file's; else close it and raise an error."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(errno.ENXIO)
    return file


def same(file: int, status: os.stat_result) -> int:
    """Return a descriptor if it is that of the file with ``status``; else close it and raise an error."""
    if identity(os.fstat(file)) != identity(status):
        os.close(file)
        raise error(errno.ESTALE)
    return file


@contextlib.contextmanager
def reading(parent: int, name: str) -> Iterator[int]:
    """Open a file or a directory for reading."""
    file = os.open(name, os.O_RDONLY | ALWAYS, dir_fd=parent)
    try:
        yield file
    finally:
        os.close(file)
