"""Inspect a layer's archive, which anybody may have written: what the layer adds, replaces and hides.

The rules are those of the OCI image specification ("Image Layer Filesystem Changeset"). Nothing is unpacked:
names and attributes are checked here, and :mod:`pytest_microvm.images.oci.layer` writes a new archive.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from pytest_microvm.errors import PullError
from pytest_microvm.images.oci.documents import refused
from pytest_microvm.untrusted.nofollow import MAX_DEPTH
from pytest_microvm.untrusted.tar_headers import CheckedHeader, RefusedHeader
from pytest_microvm.untrusted.text import sanitize_line

MAX_ENTRIES = 500_000
"""Files, folders and links of a layer; each costs memory."""

_MAX_PATH = 4095  # bytes, of a path and of a link's target (PATH_MAX without its end)
_MAX_NAME = 255  # bytes (NAME_MAX)
_MAX_ID = 2**32 - 2  # Linux's last user and group number; the next one means "no change"
_MAX_IDS = 60_000  # different ones in a layer; squashfs has a table of 65,536
_MAX_MAJOR, _MAX_MINOR = 2**12 - 1, 2**20 - 1
_LATEST = 2**32 - 1  # seconds since 1970: squashfs's last time
_MAX_READ = 1 << 20  # bytes that one read of an archive may ask for

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."  # aufs's own records, which older versions of Docker put into layers
_XATTR = "SCHILY.xattr."
# Programs need these; trusted.* and overlay attributes would command the machine's overlay file system.
_KEPT_XATTR = re.compile(r"SCHILY\.xattr\.(security\.capability|user\.(?!overlay\.).{1,240})", re.DOTALL)


class Attributes(NamedTuple):
    """The attributes of a file or folder.

    Args:
        mode: Permission bits, set-user-id and sticky bits included.
        uid: The owner's number.
        gid: The group's number.
        mtime: Time of the last change, in whole seconds since 1970.
        xattrs: Extended attributes, as a tar header's records.
    """

    mode: int
    uid: int
    gid: int
    mtime: int
    xattrs: tuple[tuple[str, str], ...] = ()


class StoredFile(NamedTuple):
    """A file, symbolic link or device in a layer's archive.

    Args:
        kind: Its kind, as a tar header has it.
        attributes: Its attributes.
        offset: The place of its first byte in the archive.
        size: Its bytes; 0 unless it is a regular file.
        target: A symbolic link's target.
        device: A device's numbers.
    """

    kind: bytes
    attributes: Attributes
    offset: int = 0
    size: int = 0
    target: str = ""
    device: tuple[int, int] = (0, 0)


@dataclass
class LayerContents:
    """The content of a layer's archive, by path without a leading slash.

    Args:
        folders: The folders; ``None``: one that exists because something is in it, and that the archive does
            not have itself.
        files: Each file, link and device, by its number in the archive.
        names: The paths of each of these: several are hard links.
        whiteouts: The paths that it hides in lower layers, and does not have itself.
        opaque: The folders whose content in lower layers it hides; ``""`` is the root.
        newest: The newest time stamp of a member.
    """

    folders: dict[str, Attributes | None] = field(default_factory=dict)
    files: dict[int, StoredFile] = field(default_factory=dict)
    names: dict[int, list[str]] = field(default_factory=dict)
    whiteouts: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)
    newest: int = 0

    @property
    def entries(self) -> int:
        """Number of paths; 0 if the layer changes nothing."""
        return len(self.folders) + sum(map(len, self.names.values())) + len(self.whiteouts)

    @property
    def implied(self) -> list[str]:
        """The folders that the archive does not have itself."""
        return sorted(path for path, attributes in self.folders.items() if attributes is None)


class _LayerHeader(CheckedHeader):
    """A header of a layer's archive; `git archive` begins with attributes of all that follows."""

    skips_global = True


class _Bounded:
    """A file object for tarfile over ``file``: reads are bounded, whatever a header announces."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes, fewer at the end.

        Raises:
            RefusedHeader: That would be too much.
        """
        if not 0 <= size <= _MAX_READ:
            raise RefusedHeader("a member", "a size that is impossible")
        return self._file.read(size)


@contextmanager
def opened(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """Open a layer's archive from its beginning.

    Raises:
        PullError: It is damaged, or the code in the block finds that it is.
    """
    file.seek(0)
    try:
        with tarfile.open(
            fileobj=_Bounded(file),
            mode="r:",
            tarinfo=_LayerHeader,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:  # type: ignore[call-overload]  # the methods that it needs
            yield archive
    except RefusedHeader as error:
        raise refused_member(error.name, error.why) from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise refused("a layer", f"its archive is damaged: {sanitize_line(str(error), 200)}") from None


def members(archive: tarfile.TarFile) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """Yield an archive's members with their numbers.

    Raises:
        PullError: The archive is damaged.
    """
    number, after = 0, -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.offset <= after or member.size < 0:
            raise refused_member(member.name, "a size that is impossible")
        after = member.offset
        yield number, member
        number += 1
    # tarfile takes a damaged header for the end; the end is two blocks of zeros, or nothing.
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise refused("a layer", f"its archive is damaged: no header at byte {archive.offset}")


def inspect(file: IO[bytes]) -> LayerContents:
    """Return what is in a layer's archive.

    Raises:
        PullError: It is damaged, or a member is refused; the error names it.
    """
    if not file.seek(0, os.SEEK_END):
        return LayerContents()  # tarfile would call it damaged
    inspection = _Inspection()
    with opened(file) as archive:
        for number, member in members(archive):
            inspection.add(number, member)
    return inspection.result()


def attributes_of(member: tarfile.TarInfo) -> Attributes:
    """Return a member's attributes, checked and bounded.

    Raises:
        PullError: Linux has no such owner.
    """
    if not (0 <= member.uid <= _MAX_ID and 0 <= member.gid <= _MAX_ID):
        raise refused_member(member.name, f"an owner that is impossible ({member.uid}:{member.gid})")
    kept = tuple((key, value) for key, value in member.pax_headers.items() if _KEPT_XATTR.fullmatch(key))
    return Attributes(member.mode & 0o7777, member.uid, member.gid, _whole_seconds(member.mtime), kept)


def refused_member(name: str, why: str) -> PullError:
    """Return the error for a member of a layer's archive that is refused."""
    return PullError(
        f"a layer of the image is refused: {sanitize_line(f'{name[:200]!r}: {why}', 1000)}",
        reason="refused",
        resolution="build the image again, or pull another one",
    )


class _Inspection:
    """The paths of a layer, as far as its archive has been read."""

    def __init__(self) -> None:
        self._contents = LayerContents()
        self._files: dict[int, StoredFile] = {}
        self._owners: dict[str, int] = {}  # path of a file, link or device -> number of its member
        self._whiteouts: set[str] = set()
        self._ids: set[int] = set()
        self._parents: set[str] = {""}
        self._total = 0

    def add(self, number: int, member: tarfile.TarInfo) -> None:
        """Add one member, in the archive's order."""
        self._total += 1 + len(member.name) // 512
        if self._total > MAX_ENTRIES:
            raise refused("a layer", f"it has more than {MAX_ENTRIES} entries")
        parts = _parts(member, member.name)
        if not parts:
            if not member.isdir():
                raise refused_member(member.name, "it takes the place of the root folder")
            return
        if any(part.startswith(_AUFS) and part != _OPAQUE for part in parts):
            return
        if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
            raise refused_member(member.name, "it is in a folder that has the name of a whiteout")
        path, above = "/".join(parts), "/".join(parts[:-1])
        self._reach(above, member)
        if parts[-1].startswith(_WHITEOUT):
            self._hide(above, parts[-1], member)
        elif member.isdir():
            self._folder(path, member)
        else:
            self._file(path, number, member)

    def result(self) -> LayerContents:
        """Return the contents, once all members have been added."""
        contents = self._contents
        for path, number in self._owners.items():
            contents.names.setdefault(number, []).append(path)
        contents.files = self._files
        for number in [number for number in contents.files if number not in contents.names]:
            del contents.files[number]  # a later member has taken its path
        for path in self._whiteouts:
            # What a layer hides and has as well replaces it; a folder must not be merged with the hidden one.
            if path in contents.folders:
                contents.opaque.add(path)
            elif path not in self._owners:
                contents.whiteouts.add(path)
        # Nothing below shows through an opaque folder: there, whiteouts would be listed as files.
        contents.whiteouts = {path for path in contents.whiteouts if not _is_in(path, contents.opaque)}
        return contents

    def _reach(self, folder: str, member: tarfile.TarInfo) -> None:
        """Note that a path is a folder, as something is in it."""
        while folder not in self._parents:
            if folder in self._owners:
                raise refused_member(
                    member.name, f"{folder[:200]!r}, above it, is no folder in the same layer"
                )
            self._contents.folders.setdefault(folder, None)
            self._parents.add(folder)
            folder = folder.rpartition("/")[0]

    def _hide(self, above: str, name: str, member: tarfile.TarInfo) -> None:
        if name == _OPAQUE:
            self._contents.opaque.add(above)
            return
        hidden = name[len(_WHITEOUT) :]
        if hidden in ("", ".", ".."):
            raise refused_member(member.name, "a whiteout of nothing")
        self._whiteouts.add(f"{above}/{hidden}" if above else hidden)

    def _folder(self, path: str, member: tarfile.TarInfo) -> None:
        if path in self._owners:
            raise refused_member(member.name, "it is a folder, and something else before in the same layer")
        self._contents.folders[path] = self._attributes(member)

    def _file(self, path: str, number: int, member: tarfile.TarInfo) -> None:
        if path in self._contents.folders:
            raise refused_member(
                member.name, "it is a folder before in the same layer, and now something else"
            )
        if member.islnk():
            self._owners[path] = self._linked(member)
            return
        self._files[number] = _stored_file(member, self._attributes(member))
        self._owners[path] = number

    def _linked(self, member: tarfile.TarInfo) -> int:
        """Return the number of the member that a hard link leads to."""
        target = "/".join(_parts(member, member.linkname))
        if target in self._owners:
            return self._owners[target]
        if target in self._contents.folders or not target:
            raise refused_member(member.name, "a hard link to a folder")
        raise refused_member(
            member.name, f"a hard link to {member.linkname[:200]!r}, which is not before it in the same layer"
        )

    def _attributes(self, member: tarfile.TarInfo) -> Attributes:
        found = attributes_of(member)
        self._ids |= {found.uid, found.gid}
        self._contents.newest = max(self._contents.newest, found.mtime)
        if len(self._ids) > _MAX_IDS:
            raise refused("a layer", f"it has more than {_MAX_IDS} different owners")
        return found


def _stored_file(member: tarfile.TarInfo, attributes: Attributes) -> StoredFile:
    if member.isreg():
        return StoredFile(tarfile.REGTYPE, attributes, member.offset_data, member.size)
    if member.issym():
        _check_target(member)
        return StoredFile(member.type, attributes, target=member.linkname)
    if member.ischr() or member.isblk():
        _check_device(member)
        return StoredFile(member.type, attributes, device=(member.devmajor, member.devminor))
    if not member.isfifo():
        raise refused_member(member.name, "neither a file, a folder, a link nor a device")
    return StoredFile(member.type, attributes)


def _parts(member: tarfile.TarInfo, path: str) -> list[str]:
    """Split a member's path into names; a leading slash means the root of the image."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise refused_member(member.name, f"the path {path[:200]!r} leads out of the image")
    if "\0" in path or (len(path) * 4 > _MAX_NAME and not _fits(path, parts)):
        raise refused_member(member.name, "a name that is impossible")
    if len(parts) > MAX_DEPTH:
        raise refused_member(member.name, f"more than {MAX_DEPTH} folders inside each other")
    return parts


def _is_in(path: str, folders: set[str]) -> bool:
    """Return True if a path is in one of the folders, at any depth."""
    while folders and path:
        path = path.rpartition("/")[0]
        if path in folders:
            return True
    return False


def _fits(path: str, parts: list[str]) -> bool:
    """Return True if Linux can have a path of this length, with names of these lengths."""
    return len(os.fsencode(path)) <= _MAX_PATH and all(len(os.fsencode(part)) <= _MAX_NAME for part in parts)


def _check_target(member: tarfile.TarInfo) -> None:
    """Check a symbolic link; it may lead anywhere, as only the machine follows it."""
    target = os.fsencode(member.linkname)
    if not target or b"\0" in target or len(target) > _MAX_PATH:
        raise refused_member(member.name, "a link's target that is impossible")


def _check_device(member: tarfile.TarInfo) -> None:
    major, minor = member.devmajor, member.devminor
    if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
        raise refused_member(member.name, f"a device number that is impossible ({major}:{minor})")
    if (major, minor) == (0, 0) and member.ischr():
        raise refused_member(
            member.name, "the device 0:0, which is an overlay file system's sign for a whiteout"
        )


def _whole_seconds(mtime: float) -> int:
    """Return a time as whole seconds that squashfs can store; a header may have any number, or none."""
    try:
        return max(0, min(_LATEST, int(mtime)))
    except (ValueError, OverflowError):  # not a number, infinite
        return 0
