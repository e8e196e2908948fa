"""The files below a folder that change, as the kernel tells (inotify(7)): nothing is searched for them.

A watch is part of a template: each copy of the machine has its own, and reads only what its own tests wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time

_MODIFY, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x40, 0x80, 0x100, 0x200
_DIRECTORY_ONLY, _NO_LINKS = 0x01000000, 0x02000000
_IS_DIRECTORY, _OVERFLOWN = 0x40000000, 0x4000
_EVENTS = _MODIFY | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_HEAD = struct.Struct("iIII")  # watch, events, cookie, length of the name
_PIECE = 256 * 1024
_HIGH_FD = 900  # above the numbers that tests close or reuse, below the usual limit
# A test may replace or remove the functions of modules.
_read, _getpid, _stat, _dup_above = os.read, os.getpid, os.stat, fcntl.fcntl
_CLOCK_STEP = 20_000_000  # nanoseconds; time stamps of files lag behind the clock by up to a tick
_UNWATCHED = frozenset([".git", "__pycache__", ".pytest_cache"])


class FolderWatch:
    """A watch on everything below a folder, except git's own files and Python's and pytest's caches.

    Args:
        top: The folder.

    Raises:
        OSError: The kernel cannot watch at all.
    """

    def __init__(self, top: str) -> None:
        self._top = top
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._begin()

    def _begin(self) -> None:
        self._pid = _getpid()
        low = self._checked(self._libc.inotify_init1(_NONBLOCK_CLOEXEC))
        self._fd = _dup_above(low, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
        os.close(low)
        self._folders: dict[int, str] = {}
        self._started = time.time_ns() - _CLOCK_STEP
        self._complete = True  # the kernel has told everything so far, and has room for all watches
        self._add("")

    def changed(self) -> list[str]:
        """Return the files that were made, written to, moved or removed since the last call, sorted.

        The paths are relative to the folder. If there are too many folders or changes for the kernel, the
        answer is all files that were changed since the watch began.
        """
        found: set[str] = set()
        if _getpid() != self._pid:  # a child process would take the events of its parent
            os.close(self._fd)
            self._begin()
        for watch, events, name in self._read():
            if events & _OVERFLOWN:
                self._complete = False
            folder = self._folders.get(watch)
            if folder is None or not name:
                continue
            path = os.path.join(folder, name)
            if not events & _IS_DIRECTORY:
                found.add(path)
            elif events & (_CREATE | _MOVED_TO) and name not in _UNWATCHED:
                found.update(self._add(path))
        if not self._complete:
            found.update(path for path in self._add("") if self._is_new(path))
        return sorted(found)

    def told(self) -> list[str]:
        """Return :meth:`changed` for the host: a path with NUL at its end is there no more."""
        return [
            path if os.path.lexists(os.path.join(self._top, path)) else path + "\0" for path in self.changed()
        ]

    def _is_new(self, path: str) -> bool:
        with contextlib.suppress(OSError):
            return os.lstat(os.path.join(self._top, path)).st_ctime_ns >= self._started
        return False

    def _add(self, path: str) -> list[str]:
        """Watch a folder and the folders in it; return the files there."""
        files = []
        for folder, folders, names in os.walk(os.path.join(self._top, path)):
            folders[:] = [name for name in folders if name not in _UNWATCHED]
            relative = os.path.relpath(folder, self._top)
            relative = "" if relative == "." else relative
            try:
                self._watch(folder, relative)
            except OSError as error:
                self._complete = self._complete and error.errno in (errno.ENOENT, errno.ENOTDIR)
            files += [os.path.join(relative, name) for name in names]
        return files

    def _watch(self, folder: str, relative: str) -> None:
        what = ctypes.c_uint32(_EVENTS | _DIRECTORY_ONLY | _NO_LINKS)
        watch = self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(folder), what))
        self._folders[watch] = relative

    def _read(self) -> list[tuple[int, int, str]]:
        found: list[tuple[int, int, str]] = []
        while True:
            try:
                data = _read(self._fd, _PIECE)
            except BlockingIOError:
                return found
            place = 0
            while place < len(data):
                watch, events, _cookie, length = _HEAD.unpack_from(data, place)
                place += _HEAD.size
                found.append((watch, events, os.fsdecode(data[place : place + length].rstrip(b"\0"))))
                place += length

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


class Watch:
    """A watch on the workspace, and on paths outside it.

    Args:
        top: The workspace.
        outside: Absolute paths, each with whether it is a folder, which is made if it does not exist.

    Raises:
        OSError: The kernel cannot watch at all, or a folder cannot be made.
    """

    def __init__(self, top: str, outside: list[tuple[str, bool]]) -> None:
        self._top = FolderWatch(top)
        self._files = {path: _signature(path) for path, is_folder in outside if not is_folder}
        self._folders: dict[str, FolderWatch] = {}
        for path, is_folder in outside:
            if is_folder:
                os.makedirs(path, exist_ok=True)
                self._folders[path] = FolderWatch(path)

    def told(self) -> list[str]:
        """Return the files that changed, as :meth:`FolderWatch.told`; those outside with absolute paths."""
        found = self._top.told()
        for folder, watch in self._folders.items():
            found += [os.path.join(folder, path) for path in watch.told()]
        for path, before in self._files.items():
            now = _signature(path)
            if now != before:
                self._files[path] = now
                found.append(path if now else path + "\0")
        return found


def _signature(path: str) -> tuple[int, ...]:
    """Return what changes when a file is written; empty if it is not there."""
    try:
        status = _stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
