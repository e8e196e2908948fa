"""This user's folder for what lives as long as its machines: other users may be able to write beside it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from pytest_microvm.errors import HostError


def runtime_folder() -> Path:
    """Return the folder, made if it was missing, in XDG_RUNTIME_DIR if that is this user's, else temporary.

    Raises:
        HostError: Others can change what is there (see :func:`own_folder`).
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/")
    # Of another user, as sudo(8) may leave it, it is not for us (XDG Base Directory Specification).
    if os.access(base, os.W_OK) and base.stat().st_uid == os.getuid() and base != Path("/"):
        return own_folder(base / "pytest-microvm")
    return own_folder(Path(tempfile.gettempdir()) / f"pytest-microvm-{os.getuid()}")


def own_folder(path: Path) -> Path:
    """Return a folder that only this user can use: a new one, or the one that is there if it is such a one.

    No link is followed at its name, which others may know and have made something at.

    Args:
        path: A folder in one that exists.

    Raises:
        HostError: It is a link, no folder, another user's, or others may write to it, or exchange it.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if why := _why_not(found) or _why_exchangeable(path.parent.stat()):
        raise HostError(
            f"{path} {why}",
            resolution="set XDG_RUNTIME_DIR to a folder of your own, or have it removed",
        )
    if found.st_mode & 0o077:
        _close(path)
    return path


def _why_not(found: os.stat_result) -> str:
    """Return what is wrong with a file as a folder of this user's; empty if nothing is."""
    if stat.S_ISLNK(found.st_mode):
        return f"is a link (of uid {found.st_uid}), which is not followed"
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.getuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & 0o022:
        return f"can be written to by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def _why_exchangeable(parent: os.stat_result) -> str:
    """Return what lets other users rename what is in a folder (chmod(2), S_ISVTX); empty if nothing does."""
    if parent.st_mode & stat.S_ISVTX:
        return ""
    if parent.st_uid not in (0, os.getuid()):
        return f"is in a folder of another user (uid {parent.st_uid})"
    return "is in a folder that everybody can change" if parent.st_mode & stat.S_IWOTH else ""


def _close(path: Path) -> None:
    """Hide what is in a folder of ours from other users: version 0.1 made it with the umask's mode."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
