"""Write cpio archives in the "newc" format the Linux kernel unpacks as an initramfs.

The output depends on the entries alone, so the same files always give the same bytes.
Format: https://www.kernel.org/doc/html/latest/driver-api/early-userspace/buffer-format.html
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 512


@dataclass(frozen=True)
class CpioEntry:
    """One member of an archive.

    Args:
        name: Path without a leading slash; its parents must come before it.
        mode: File type and permissions, as in ``st_mode``.
        data: A file's content, or a symbolic link's target; empty for everything else.
        device: Major and minor number of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def file(cls, name: str, data: bytes, permissions: int = 0o644) -> CpioEntry:
        """Return the entry of a regular file."""
        return cls(name, stat.S_IFREG | permissions, data)

    @classmethod
    def directory(cls, name: str, permissions: int = 0o755) -> CpioEntry:
        """Return the entry of a directory."""
        return cls(name, stat.S_IFDIR | permissions)

    @classmethod
    def symlink(cls, name: str, target: str) -> CpioEntry:
        """Return the entry of a symbolic link to ``target``."""
        return cls(name, stat.S_IFLNK | 0o777, target.encode())

    @classmethod
    def character_device(cls, name: str, major: int, minor: int, permissions: int = 0o600) -> CpioEntry:
        """Return the entry of a character device node."""
        return cls(name, stat.S_IFCHR | permissions, device=(major, minor))


def cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Return a complete archive of ``entries``, in their order, padded to 512 bytes.

    Archives may be appended to each other: the kernel unpacks them one after the other.

    Raises:
        ValueError: A name is absolute, contains ``..``, or is a duplicate.
    """
    parts: list[bytes] = []
    names: set[str] = set()
    for inode, entry in enumerate(entries, start=1):
        if not entry.name or entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise ValueError(f"cpio: {entry.name!r} is not a path below the root")
        if entry.name in names:
            raise ValueError(f"cpio: {entry.name!r} comes twice")
        names.add(entry.name)
        parts.append(_member(entry, inode))
    parts.append(_member(CpioEntry(_TRAILER, 0), 0))
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % _BLOCK)


def _member(entry: CpioEntry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        inode, entry.mode, 0, 0, links, 0,  # ino, mode, uid, gid, nlink, mtime
        len(entry.data), 0, 0, *entry.device, len(name), 0,  # filesize, dev, rdev, namesize, check
    )  # fmt: skip
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
