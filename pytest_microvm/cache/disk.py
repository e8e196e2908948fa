"""The disk under the cache: report that it is full, read-only or gone, instead of an error number."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOTHING_LEFT = 4 * 1024**2
"""Free bytes of a full disk: file systems report that they are full a little before the last block."""

_FREE_SOME = (
    "free some disk, run `pytest-microvm template prune` or `pytest-microvm image prune`, "
    "or set PYTEST_MICROVM_CACHE to a folder on another disk"
)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raise a :class:`HostError` if the work in the block fails because of the disk under ``folder``.

    A machine whose memory is a file also dies of a full disk: the kernel can only answer its write to a
    page that has no block with SIGBUS (mmap(2)).

    Raises:
        HostError: The disk is full, ``folder`` is read-only, or it was removed.
    """
    try:
        yield
    except (OSError, MachineError) as error:
        told = _explanation(error, folder)
        if told is None:
            raise
        raise told from error


def need_space(folder: Path, size: int) -> None:
    """Check that ``size`` bytes are free at ``folder``, which need not exist yet.

    Raises:
        HostError: Fewer bytes are free.
    """
    free = free_bytes(folder)
    if free < size:
        raise HostError(
            f"the disk with the cache is full: only {free // 1024**2} MiB are free ({folder})",
            details=f"{size // 1024**2} MiB are needed",
            resolution=_FREE_SOME,
        )


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write at ``folder``, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _explanation(error: OSError | MachineError, folder: Path) -> HostError | None:
    number = error.errno if isinstance(error, OSError) else None
    reason = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or (number is None and free_bytes(folder) < NOTHING_LEFT):
        return HostError(
            f"the disk with the cache is full ({folder.parent})", details=reason, resolution=_FREE_SOME
        )
    if not folder.exists() and (number in (None, errno.ENOENT)):
        return HostError(
            f"the cache was removed while it was in use ({folder.parent})",
            details=reason,
            resolution="run again: what is missing is made again",
        )
    denied = number in (errno.EACCES, errno.EPERM) and not os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    if number == errno.EROFS or denied:
        return HostError(
            f"something has to be made, but the cache cannot be written ({folder})",
            details=reason,
            resolution="make it writable, fill it in a run that may write to it, or set PYTEST_MICROVM_CACHE",
        )
    return None
