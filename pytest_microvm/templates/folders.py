"""Publish, lock and remove folders atomically, despite other processes that do the same."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from pytest_microvm.templates.integrity import META, Damaged, read_meta, verified

if TYPE_CHECKING:
    from pathlib import Path

REMOVED = ".removed-"
"""Prefix of the names of folders that are being removed."""


def hold(meta: Path) -> int | None:
    """Take the shared lock of the template of ``meta``; return its descriptor, or ``None`` if it is gone."""
    while True:
        try:
            lock = os.open(meta, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(lock, fcntl.LOCK_SH)
        if leads_to(meta.parent, lock):
            return lock
        os.close(lock)  # it was removed while we waited, and perhaps made again


def leads_to(folder: Path, lock: int, name: str = META) -> bool:
    """Return True if ``lock`` is the current ``name`` in ``folder``, not a removed one."""
    try:
        return os.path.samestat(os.fstat(lock), (folder / name).stat())
    except OSError:
        return False


def private(folder: Path, prefix: str) -> Path:
    """Return a new, unique path in ``folder``."""
    return folder / f"{prefix}{secrets.token_hex(8)}"


def discard(folder: Path) -> None:
    """Rename a folder out of the way atomically, then remove it."""
    gone = private(folder.parent, REMOVED)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def publish_as(draft: Path, target: Path) -> None:
    """Rename ``draft`` to ``target``, unless an intact one is already there; a damaged one is replaced."""
    while True:
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        try:
            verified(target, read_meta(target))
        except Damaged:
            discard(target)
        else:
            return


def in_use(folder: Path) -> bool:
    """Return True if a process holds the template in ``folder``."""
    with (folder / META).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def remove_unheld(path: Path) -> None:
    """Remove a file or a folder unless a process holds a lock on it."""
    with contextlib.suppress(OSError):  # it is held, or gone
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(lock)


def remove_unused(folder: Path) -> bool:
    """Remove a template unless it is in use; return whether it is gone."""
    try:
        with (folder / META).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if leads_to(folder, file.fileno()):  # else it was replaced meanwhile
                discard(folder)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # another process removed it, or it is no template
        discard(folder)
    return True
