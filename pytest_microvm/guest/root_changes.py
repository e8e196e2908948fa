"""The changes that this machine has made to its root file system, as an archive like an OCI layer.

They are the upper directory of the overlay file system, on the scratch disk. ``init.sh`` mounts that disk
where no path leads; mounting it again shows the same files. Sources: overlayfs.rst in Linux; "Image Layer
Filesystem Changeset" of the OCI image specification.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import tarfile
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_microvm.guest.files import StreamWriter

_DISK, _PLACE = b"/dev/vdc", "/run/microvm/scratch"
_MNT_DETACH = 2  # include/uapi/linux/mount.h
_PIECE = 256 * 1024  # bytes
_OVERLAY = "trusted.overlay."
# The machine's own, or where its file systems are mounted.
_OWN = frozenset(["dev", "etc/machine-id", "etc/resolv.conf", "proc", "run", "sys"])
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"  # made empty in an image that has none, see resume.py


def pack_root_changes(writer: StreamWriter) -> None:
    """Write the archive of all changes so far.

    Raises:
        OSError: The scratch disk cannot be read, or a file has a name that an OCI layer cannot have.
    """
    os.sync()
    os.makedirs(_PLACE, 0o700, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(_DISK, _PLACE.encode(), b"ext4", ctypes.c_ulong(0), None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), _DISK.decode())
    try:
        pack_upper(writer, _PLACE + "/upper", "/")
    finally:
        libc.umount2(_PLACE.encode(), _MNT_DETACH)


def pack_upper(writer: StreamWriter, upper: str, merged: str) -> None:
    """Write the archive of an overlay's upper directory.

    Args:
        writer: Takes the archive.
        upper: The upper directory.
        merged: The overlay: the content of a renamed folder is only there.
    """
    with tarfile.open(
        fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_PIECE, copybufsize=_PIECE,
        encoding="utf-8", errors="surrogateescape",
    ) as archive:  # type: ignore[call-overload]  # fmt: skip  # copybufsize is not in the stubs
        packer = _Packer(archive)
        pending = [(upper, "")]
        while pending:
            top, path = pending.pop()
            folders = []
            for name in sorted(os.listdir(os.path.join(top, path))):
                below = f"{path}/{name}" if path else name
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    if below not in _OWN and packer.add(top, below):
                        # a renamed folder is empty in the upper directory, but for later changes
                        renamed = _attribute(os.path.join(top, below), "redirect") is not None
                        folders.append((merged if renamed else top, below))
            pending += folders[::-1]


class _Packer:
    """Adds entries of a directory tree to an archive."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._names: dict[tuple[int, int], str] = {}  # of files with several names: device and inode

    def add(self, top: str, path: str) -> bool:
        """Add an entry; return whether it is a folder, whose content is not added."""
        full = os.path.join(top, path)
        status = os.lstat(full)
        folder, _slash, name = path.rpartition("/")
        if name.startswith(".wh."):
            raise OSError(22, "an image cannot have a file whose name begins with .wh.", path)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            self._archive.addfile(tarfile.TarInfo(f"{folder}/.wh.{name}" if folder else f".wh.{name}"))
            return False
        if stat.S_ISSOCK(status.st_mode) or (path == _CERTIFICATES and not status.st_size):
            return False
        self._write(full, _member(full, path, status), status)
        self._archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if not stat.S_ISDIR(status.st_mode):
            return False
        if any(_attribute(full, name) is not None for name in ("opaque", "redirect")):
            self._archive.addfile(tarfile.TarInfo(f"{path}/.wh..wh..opq"))
        return True

    def _write(self, full: str, member: tarfile.TarInfo, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            self._archive.addfile(member)
            return
        first = self._names.setdefault((status.st_dev, status.st_ino), member.name)
        if first != member.name:
            member.type, member.linkname = tarfile.LNKTYPE, first
            self._archive.addfile(member)
            return
        if status.st_nlink == 1:
            del self._names[status.st_dev, status.st_ino]
        with open(full, "rb") as file:
            member.size = status.st_size
            self._archive.addfile(member, _Exactly(file, status.st_size))  # type: ignore[arg-type]


class _Exactly:
    """A file that is read as long as it was: a process may change it meanwhile."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes, zeros after the file's end."""
        size = min(size, self._left)
        self._left -= size
        data = self._file.read(size)
        return data + bytes(size - len(data))


def _member(full: str, path: str, status: os.stat_result) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    mode = status.st_mode
    member.mode, member.mtime = stat.S_IMODE(mode), int(status.st_mtime)
    member.uid, member.gid = status.st_uid, status.st_gid
    member.pax_headers = dict(_kept_attributes(full))
    if stat.S_ISDIR(mode):
        member.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(full)
    elif stat.S_ISFIFO(mode):
        member.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        member.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return member


def _kept_attributes(full: str) -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):  # the file system has none
        for name in sorted(os.listxattr(full, follow_symlinks=False)):
            if name == "security.capability" or name.startswith("user."):
                value = os.getxattr(full, name, follow_symlinks=False)
                yield f"SCHILY.xattr.{name}", value.decode("utf-8", "surrogateescape")


def _attribute(full: str, name: str) -> bytes | None:
    """Return an attribute of the overlay file system; ``None`` without it, or where it is hidden."""
    try:
        return os.getxattr(full, _OVERLAY + name, follow_symlinks=False)
    except OSError:
        return None
