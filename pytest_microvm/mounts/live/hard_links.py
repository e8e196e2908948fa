"""Hard links of a live mount: detect files that have names outside the directory, and copy them.

A change to a file shows under all its names. Package managers (uv, pnpm) install files as hard links to
their caches, so a machine could otherwise change a cache and every project installed from it.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata

from pytest_microvm.mounts.live.nodes import Identity
from pytest_microvm.untrusted.manifest import MAX_PATHS, folded

MAX_NAMES = 64
"""Maximum names remembered per file; all of them are checked before each write."""

_PIECE = 2**20


class KnownNames:
    """Known names of files with hard links in a directory; callers verify each name before use."""

    def __init__(self) -> None:
        self._places: dict[Identity, list[list[str]]] = {}
        self._count = 0

    def of(self, file: Identity) -> list[list[str]]:
        """Return the remembered names of a file, which may be out of date."""
        return self._places.get(file, [])

    def add(self, file: Identity, *places: list[str]) -> None:
        """Remember names of a file, up to the limits; a file with an unknown name is merely copied."""
        known = self._places.setdefault(file, [])
        for place in places:
            if place not in known and len(known) < MAX_NAMES and self._count < MAX_PATHS:
                known.append(place)
                self._count += 1

    def forget(self, file: Identity) -> None:
        """Forget the names of a file that has at most one name left."""
        self._count -= len(self._places.pop(file, []))

    def move(self, old: list[str], new: list[str]) -> None:
        """Update remembered names after a move of ``old``, and everything below it, to ``new``."""
        for places in self._places.values():
            places[:] = [new + place[len(old) :] if place[: len(old)] == old else place for place in places]


def one_name(parent: int, name: str) -> tuple[int, int, str]:
    """Return a key that identifies a directory entry, independent of its spelling and of the path to it.

    Args:
        parent: A descriptor of the directory.
        name: The entry's name; some file systems ignore its case.
    """
    status = os.fstat(parent)
    return status.st_dev, status.st_ino, unicodedata.normalize("NFKD", folded(name))


def copy(source: int, target: int, size: int) -> None:
    """Copy the first ``size`` bytes of a file into a new one, with its owner, permission bits and times.

    The set-user-id bit, access control lists and extended attributes are not kept.

    Raises:
        OSError: Reading or writing failed, or this user may not change the copy's owner.
    """
    status = os.fstat(source)
    made = os.fstat(target)
    if (status.st_uid, status.st_gid) != (made.st_uid, made.st_gid):
        os.fchown(target, status.st_uid, status.st_gid)
    done = 0
    while done < size and (count := _copy_piece(source, target, done, min(_PIECE, size - done))):
        done += count
    os.fchmod(target, stat.S_IMODE(status.st_mode) & 0o777)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_piece(source: int, target: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return os.pwrite(target, os.pread(source, size, offset), offset)
