"""This user's folder for files that live as long as its machines; its parent may be open to other users."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from pytest_microvm.errors import HostError


def runtime_folder() -> Path:
    """Return the folder, created if missing: in XDG_RUNTIME_DIR if this user's, else in a temporary one.

    Raises:
        HostError: Other users can change it (see :func:`own_folder`).
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/")
    # sudo(8) may leave another user's folder, which is not to be used (XDG Base Directory Specification).
    if os.access(base, os.W_OK) and base.stat().st_uid == os.getuid() and base != Path("/"):
        return own_folder(base / "pytest-microvm")
    return own_folder(Path(tempfile.gettempdir()) / f"pytest-microvm-{os.getuid()}")


def own_folder(path: Path) -> Path:
    """Return a folder that only this user can use, created if missing, checked if it exists.

    A link at ``path`` is not followed: other users may know the name and have created one.

    Args:
        path: Its path; the parent exists.

    Raises:
        HostError: It is a link, not a folder, or another user's, or others may write to it or replace it.
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
    """Return the reason that a file cannot be this user's private folder; empty if it can."""
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
    """Return the reason why others can rename its entries (chmod(2), S_ISVTX); empty if they cannot."""
    if parent.st_mode & stat.S_ISVTX:
        return ""
    if parent.st_uid not in (0, os.getuid()):
        return f"is in a folder of another user (uid {parent.st_uid})"
    return "is in a folder that everybody can change" if parent.st_mode & stat.S_IWOTH else ""


def _close(path: Path) -> None:
    """Deny other users access to a folder of ours: version 0.1 created it with the umask's mode."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
