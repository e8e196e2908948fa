"""Manifests of directories handed to machines: one entry per path, and the differences of two manifests.

Directories of the host are walked by descriptors, and no symbolic link is followed: while a machine runs,
any process may put a link where there was none.
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
# File systems that ignore case often ignore these, too (HFS+; casefold of ext4 and f2fs): they are
# Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt.
_IGNORED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


class Entry(NamedTuple):
    """The state of one path, as far as a machine can see and change it.

    Args:
        kind: ``other`` cannot be handed over: a device, a pipe, a socket.
        mode: Permission bits that are copied back: no set-user-id, no write permission of group and others.
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
    """A directory entry found by :func:`walk`; ``parent`` is the descriptor of its directory."""

    path: str
    name: str
    parent: int
    status: os.stat_result


@dataclass(frozen=True)
class Difference:
    """The change that a machine made to one path.

    Args:
        path: Relative to the directory.
        before: The entry handed over; ``None``: there was none.
        after: The entry now; ``None``: there is none any more.
    """

    path: str
    before: Entry | None
    after: Entry | None


def differences(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> list[Difference]:
    """Return the differences, sorted by path: directories come before their content."""
    paths = {path for path in {**before, **after} if before.get(path) != after.get(path)}
    return [Difference(path, before.get(path), after.get(path)) for path in sorted(paths, key=_parts)]


def _parts(path: str) -> list[str]:
    return path.split("/")


def file_mode(mode: int) -> int:
    """Return the permission bits of a file that are handed over and copied back."""
    return mode & 0o755 | 0o600


def folder_mode(mode: int) -> int:
    """Return the permission bits of a directory that are handed over and copied back."""
    return mode & 0o755 | 0o700


def walk(root: int, above: str = "", depth: int = 1) -> Iterator[Found]:
    """Yield everything below ``root``, directories before their content, sorted by name.

    Raises:
        UsageError: Directories are nested too deeply.
        OSError: A directory cannot be read.
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
    """Return the manifest of everything below ``root`` now."""
    return {
        found.path: entry for found in walk(root) if (entry := look(found.parent, found.name)) is not None
    }


def look(parent: int, name: str) -> Entry | None:
    """Return the current entry ``name`` of a directory; ``None`` if it does not exist."""
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
    """Return the targets of the symbolic links below ``root``, by path."""
    return {
        found.path: os.readlink(found.name, dir_fd=found.parent)
        for found in walk(root)
        if stat.S_ISLNK(found.status.st_mode)
    }


class Handover:
    """Writes a directory into a tar archive and records its manifest.

    Everything belongs to root in the machine; devices, pipes and sockets are left out.

    Attributes:
        manifest: The entries handed over.
        links: The targets of its symbolic links, by path.
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
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all


class _Hashed:
    """Reads exactly ``size`` bytes from a file and hashes them."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = self._left = size
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        if not data and self._left:  # truncated since its size was read: padded with zeros
            data = bytes(min(size, self._left))
        self._left -= len(data)
        self._hash.update(data)
        return data

    def entry(self, mode: int) -> Entry:
        return Entry("file", file_mode(mode), self._size, self._hash.digest())


def _link(target: str) -> Entry:
    return Entry("link", 0, 0, hashlib.sha256(os.fsencode(target)).digest())


def folded(name: str) -> str:
    """Return a name or path as compared by file systems that ignore case and invisible characters."""
    return _IGNORED.sub("", name).casefold()


def is_git(path: str) -> bool:
    """Return True if some file system finds a path in ``.git``, whose content makes git run programs."""
    parts = re.split(r"[/\\]", folded(path))
    return any(part.partition(":")[0].rstrip(". ") in (".git", "git~1") for part in parts)
