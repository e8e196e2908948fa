"""Folders that appear, are held and go in one step, whatever other processes do with them at the time."""

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
"""What the name of a folder begins with that is being removed."""


def hold(meta: Path) -> int | None:
    """Return a descriptor that holds the template ``meta`` belongs to; ``None`` if there is none."""
    while True:
        try:
            lock = os.open(meta, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(lock, fcntl.LOCK_SH)
        if leads_to(meta.parent, lock):
            return lock
        os.close(lock)  # while we waited it was removed, and perhaps made anew


def leads_to(folder: Path, lock: int, name: str = META) -> bool:
    """Tell whether ``lock`` is what is called ``name`` in ``folder`` now, and not something removed."""
    try:
        return os.path.samestat(os.fstat(lock), (folder / name).stat())
    except OSError:
        return False


def private(folder: Path, prefix: str) -> Path:
    """Return a new name in ``folder`` that nobody else has."""
    return folder / f"{prefix}{secrets.token_hex(8)}"


def discard(folder: Path) -> None:
    """Take a folder away in one step, so that nobody meets half of it, then remove it."""
    gone = private(folder.parent, REMOVED)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def publish_as(draft: Path, target: Path) -> None:
    """Rename ``draft`` unless somebody published the same: theirs is as good; a damaged one makes way."""
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
    """Tell whether somebody holds the template in ``folder``."""
    with (folder / META).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def remove_unheld(path: Path) -> None:
    """Remove a file or a folder unless somebody holds a lock on it."""
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
    """Remove a template unless somebody uses it; return whether it is gone."""
    try:
        with (folder / META).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if leads_to(folder, file.fileno()):  # else it was replaced while we looked
                discard(folder)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # somebody else was quicker, or it is no template at all
        discard(folder)
    return True
