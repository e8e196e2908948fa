"""What a directory held when a machine was handed it: one entry per path, and how two of them differ.

Directories of the host are walked from descriptor to descriptor, and no symbolic link is followed: while a
machine runs, anybody may put one in a place where there was none.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Literal, NamedTuple

from pytest_microvm.errors import UsageError
from pytest_microvm.untrusted.nofollow import MAX_DEPTH, folder_below, open_file

MAX_PATHS = 300_000
"""Paths that a mounted directory may have, on either side: each costs some hundred bytes of memory."""

_PIECE = 256 * 1024
# Where case does not count these often do not either (HFS+; casefold of ext4 and f2fs): they are
# Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt.
_IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


class Entry(NamedTuple):
    """What is at one path, as far as a machine could see and change it.

    Args:
        kind: ``other`` is what cannot be handed over: a device, a pipe, a socket.
        mode: Permission bits that can come back: no set-user-id, no rights of group and others to write.
        size: Bytes of a file.
        digest: SHA-256 of a file's content or of a link's target; empty for directories.
    """

    kind: Literal["file", "folder", "link", "other"]
    mode: int = 0
    size: int = 0
    digest: bytes = b""


Manifest = dict[str, Entry]
"""Entries by path, relative to the directory, with ``/``; the directory itself is not in it."""


class Found(NamedTuple):
    """What is called ``name`` in the directory that ``parent`` is a descriptor of."""

    path: str
    name: str
    parent: int
    status: os.stat_result


@dataclass(frozen=True)
class Difference:
    """What a machine did to one path.

    Args:
        path: Relative to the directory.
        before: What it was handed; ``None``: nothing.
        after: What it has now; ``None``: nothing any more.
    """

    path: str
    before: Entry | None
    after: Entry | None


def differences(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> list[Difference]:
    """Return what differs, sorted by path: directories come before what is in them."""
    paths = {path for path in {**before, **after} if before.get(path) != after.get(path)}
    return [Difference(path, before.get(path), after.get(path)) for path in sorted(paths, key=_parts)]


def _parts(path: str) -> list[str]:
    return path.split("/")


def file_mode(mode: int) -> int:
    """Return the permission bits of a file that are handed over and come back."""
    return mode & 0o755 | 0o600


def folder_mode(mode: int) -> int:
    """Return the permission bits of a directory that are handed over and come back."""
    return mode & 0o755 | 0o700


def walk(root: int, above: str = "", depth: int = 1) -> Iterator[Found]:
    """Yield everything below ``root``, directories before what is in them, sorted by name.

    Raises:
        UsageError: It is too deep.
        OSError: It cannot be read.
    """
    if depth > MAX_DEPTH:
        raise UsageError(f"{above[:200]}...: more than {MAX_DEPTH} directories inside each other")
    for name in sorted(os.listdir(root)):
        path = f"{above}/{name}" if above else name
        try:
            status = os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:  # removed while it was listed
            continue
        yield Found(path, name, root, status)
        if stat.S_ISDIR(status.st_mode):
            with folder_below(root, [name]) as below:
                if below is not None:
                    yield from walk(below, path, depth + 1)


def scan(root: int) -> Manifest:
    """Return what is below ``root`` now."""
    return {
        found.path: entry for found in walk(root) if (entry := look(found.parent, found.name)) is not None
    }


def look(parent: int, name: str) -> Entry | None:
    """Return what is called ``name`` in a directory now; ``None`` if nothing is."""
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return Entry("folder", folder_mode(status.st_mode))
        if stat.S_ISLNK(status.st_mode):
            return _link(os.readlink(name, dir_fd=parent))
        if stat.S_ISREG(status.st_mode):
            with open_file(parent, name) as file:
                content = _Hashed(file, os.fstat(file.fileno()).st_size)
                while content.read(_PIECE):
                    pass
                return content.entry(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        return None
    except PermissionError:
        return Entry("other")
    return Entry("other")


def links(root: int) -> dict[str, str]:
    """Return where the symbolic links below ``root`` point."""
    return {
        found.path: os.readlink(found.name, dir_fd=found.parent)
        for found in walk(root)
        if stat.S_ISLNK(found.status.st_mode)
    }


class Handover:
    """Writes a directory into a tar archive and takes note of what exactly was written.

    Everything belongs to root in the machine; devices, pipes and sockets are left out.

    Attributes:
        manifest: What was handed over.
        links: Where its symbolic links point.
    """

    def __init__(self) -> None:
        self.manifest: Manifest = {}
        self.links: dict[str, str] = {}

    def write(self, archive: tarfile.TarFile, root: int) -> None:
        """Write everything below ``root``."""
        for found in walk(root):
            self.add(archive, found)

    def add(self, archive: tarfile.TarFile, found: Found, name: str = "") -> None:
        """Write one entry, under another ``name`` if one is given.

        Raises:
            UsageError: This user may not read it.
        """
        if len(self.manifest) >= MAX_PATHS:
            raise UsageError(
                f"more than {MAX_PATHS} files and directories", resolution="mount only what the task needs"
            )
        info = tarfile.TarInfo(name or found.path)
        info.mode = stat.S_IMODE(found.status.st_mode) & 0o777
        info.mtime = found.status.st_mtime_ns // 10**9
        mode = found.status.st_mode
        try:
            if stat.S_ISDIR(mode):
                info.type = tarfile.DIRTYPE
                self.manifest[found.path] = Entry("folder", folder_mode(mode))
                archive.addfile(info)
            elif stat.S_ISLNK(mode):
                info.type, info.linkname = tarfile.SYMTYPE, os.readlink(found.name, dir_fd=found.parent)
                self.links[found.path] = info.linkname
                self.manifest[found.path] = _link(info.linkname)
                archive.addfile(info)
            elif stat.S_ISREG(mode):
                with open_file(found.parent, found.name) as file:
                    info.size = os.fstat(file.fileno()).st_size  # it may have changed since it was listed
                    content = _Hashed(file, info.size)
                    archive.addfile(info, content)  # type: ignore[arg-type]  # which only reads
                    self.manifest[found.path] = content.entry(mode)
        except FileNotFoundError:  # removed since it was listed
            self.manifest.pop(found.path, None)
        except PermissionError as error:
            raise UsageError(
                f"{found.path} cannot be handed over: {error.strerror}",
                resolution="mount a directory whose content you may read",
            ) from error
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all, in vain


class _Hashed:
    """Reads a file of ``size`` bytes, no more and no less, and takes its hash on the way."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = self._left = size
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        if not data and self._left:  # cut off since its size was asked for
            data = bytes(min(size, self._left))
        self._left -= len(data)
        self._hash.update(data)
        return data

    def entry(self, mode: int) -> Entry:
        return Entry("file", file_mode(mode), self._size, self._hash.digest())


def _link(target: str) -> Entry:
    return Entry("link", 0, 0, hashlib.sha256(os.fsencode(target)).digest())


def folded(name: str) -> str:
    """Return a name or path as a file system has it on which neither case nor invisible characters count."""
    return _IGNORED.sub("", name).casefold()


def is_git(path: str) -> bool:
    """Whether a path is one of git's own, for some file system: what is there makes git run programs."""
    parts = re.split(r"[/\\]", folded(path))
    return any(part.partition(":")[0].rstrip(". ") in (".git", "git~1") for part in parts)
