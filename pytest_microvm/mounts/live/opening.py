"""Opens what is in a directory that a machine works in: names as they are, no link followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from pytest_microvm.mounts.live.messages import error
from pytest_microvm.mounts.live.nodes import identity

ALWAYS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Flags of open(2) that each file is opened with."""

_MAX_NAME = 255  # bytes


def checked_name(name: bytes) -> str:
    """Return a name that a machine gave, if it is one.

    Raises:
        OSError: It is a path, or too long.
    """
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise error(errno.EINVAL)
    if len(name) > _MAX_NAME:
        raise error(errno.ENAMETOOLONG)
    return os.fsdecode(name)


def shown(parent: int, name: str) -> os.stat_result:
    """Return what is called ``name``, if a machine is shown it: no devices, pipes and sockets."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise error(errno.ENOENT)
    return status


def check_same(parent: int, names: dict[str, int]) -> None:
    """Check that names are still those of open files.

    Raises:
        OSError: Another machine, or the host, has put something else there.
    """
    for name, file in names.items():
        if identity(shown(parent, name)) != identity(os.fstat(file)):
            raise error(errno.EBUSY)


def regular(file: int) -> int:
    """Return a descriptor if it is a regular file's; what else took its place is closed."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise error(errno.ENXIO)
    return file


def same(file: int, status: os.stat_result) -> int:
    """Return a descriptor if it is a certain file's; what else took its place is closed."""
    if identity(os.fstat(file)) != identity(status):
        os.close(file)
        raise error(errno.ESTALE)
    return file


@contextlib.contextmanager
def reading(parent: int, name: str) -> Iterator[int]:
    """Open a file or a directory to read it."""
    file = os.open(name, os.O_RDONLY | ALWAYS, dir_fd=parent)
    try:
        yield file
    finally:
        os.close(file)
