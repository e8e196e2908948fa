"""A lock for each directory that is mounted live, across mounts and processes.

A name is validated first and created then: in between, no other machine that works in the same directory,
or in one above or below it, may move anything. So a lock is exclusive for its own directory and shared for
all directories above. All locks are ranges of one file (Linux's open file description locks,
fcntl_locking(2)), which the kernel releases when the process that holds them ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import struct
from pathlib import Path
from types import TracebackType

_FLOCK = struct.Struct("@hhqqi0q")  # type, whence, start, length, pid; padded as struct flock is
_FILE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def lock_file() -> Path:
    """Return this user's lock file.

    The path does not depend on the environment: all processes of a user agree, and no project can change it.
    """
    return Path("/tmp") / f"pytest-microvm-{os.getuid()}" / "live.lock"  # noqa: S108 - see _open


class FolderLock:
    """Context manager that holds the lock of a directory while names in it are validated and changed.

    Args:
        root: A descriptor of the directory, owned by the caller.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._file = -1

    def __enter__(self) -> None:
        """Wait until no other mount changes names in this directory, or in one above or below it.

        Raises:
            OSError: The lock file cannot be used.
        """
        while True:
            if self._file < 0:
                self._file = _open(lock_file())
            above = _ancestors(self._root)
            try:
                for place in above[:-1]:
                    self._set(fcntl.F_RDLCK, place, 1)
                self._set(fcntl.F_WRLCK, above[-1], 1)
                if not _is_at(self._file, lock_file()):  # removed by a clean-up of /tmp
                    self.close()
                elif above == _ancestors(self._root):
                    return
                else:  # the directory was moved during the wait
                    self._release()
            except BaseException:
                self.close()
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def close(self) -> None:
        """Close the lock file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _set(self, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))

    def _release(self) -> None:
        self._set(fcntl.F_UNLCK, 0, 0)


def _ancestors(root: int) -> list[int]:
    """Return the lock ranges of a directory and of all directories above it, topmost first."""
    places: list[int] = []
    up = "."
    before = None
    while (here := _identity(os.stat(up, dir_fd=root))) != before:
        digest = hashlib.blake2b(b"%d:%d" % here, digest_size=7).digest()
        places.append(int.from_bytes(digest, "big"))
        before, up = here, f"{up}/.."
    return places[::-1]


def _open(path: Path) -> int:
    """Open the lock file in a directory that this user owns and that no other user can write to.

    Raises:
        OSError: Another user has created that directory, or it cannot be created.
    """
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir(mode=0o700)
    status = path.parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(errno.EPERM, "not a directory of this user alone", str(path.parent))
    return os.open(path, _FILE_FLAGS, 0o600)


def _is_at(file: int, path: Path) -> bool:
    try:
        return _identity(path.lstat()) == _identity(os.fstat(file))
    except FileNotFoundError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
