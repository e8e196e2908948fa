"""Unpack a tar stream sent by a machine, such that an attacker's archive cannot leave its folder.

The standard library's filters (PEP 706) are not enough: they rely on realpath(3), which can be misled
(CVE-2025-4517), and they are missing in older releases of Python 3.10. Here every folder of a path is
opened relative to its parent, and no symbolic link is ever followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from pytest_microvm.errors import TransferError
from pytest_microvm.untrusted.nofollow import FOLDER_FLAGS, MAX_DEPTH
from pytest_microvm.untrusted.tar_headers import CheckedHeader, RefusedHeader

MAX_ENTRIES = 1_000_000
MAX_BYTES = 64 * 1024**3
"""Bytes of files that one archive may hold."""

_MAX_LEFT_OUT = 1000  # members: each costs memory
_LONG_NAME = 512  # bytes of a name that count as one more entry, since names are kept in memory
LEADS_OUT = "a link that may lead out"
"""Why a symbolic link is refused, or left out."""

_MAX_NAME = 4096
_PIECE = 256 * 1024
_PADDING = 64 * 1024  # bytes; tar pads its last record with zeros
_LATEST = 2**33 - 1  # seconds since 1970: the maximum of tar's own field
_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_IN_THE_WAY = frozenset([errno.ENOTDIR, errno.ELOOP, errno.ENOENT])  # a file or a link, or nothing
_NO_NAME = frozenset([errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL])  # for example vfat, for a colon


@dataclass(frozen=True)
class ExtractionLimits:
    """Limits of an archive's content.

    Args:
        max_bytes: Bytes of files.
        max_entries: Members; one with a long name counts as several.
        links: Targets by path of links that may lead out: the host handed them over itself.
        left_out: If given, links that lead out, devices and the like are skipped and recorded here, as paths
            with the reason; otherwise any of them causes the whole archive to be refused.
    """

    max_bytes: int = MAX_BYTES
    max_entries: int = MAX_ENTRIES
    links: Mapping[str, str] = field(default_factory=dict)
    left_out: dict[str, str] | None = None


def extract(source: IO[bytes], folder: Path, terms: ExtractionLimits | None = None) -> None:
    """Unpack an untrusted tar stream into ``folder``: files, folders, and links that stay inside.

    Set-user-id bits, write permissions of group and others, owners and devices are dropped.

    Raises:
        TransferError: A member is refused, the archive is damaged, or the host cannot write it.
    """
    terms = terms or ExtractionLimits(MAX_BYTES, MAX_ENTRIES)
    root = os.open(folder, FOLDER_FLAGS)
    total = entries = 0
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=65536, tarinfo=CheckedHeader) as archive:
            for member in archive:
                total += max(0, member.size)
                entries += 1 + len(member.name) // _LONG_NAME
                _check_amount(member, entries, total, terms)
                try:
                    made, copied = _unpack(archive, member, root, terms)
                except OSError as error:
                    if terms.left_out is None or error.errno not in _NO_NAME:
                        raise
                    _leave_out(
                        member, terms, _refused(member, f"the host cannot name it so ({error.strerror})")
                    )
                else:
                    entries += made
                    total += copied
                    _check_amount(member, entries, total, terms)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        source.read(_PADDING)  # else the sender fails to write its last bytes
    except RefusedHeader as error:
        raise _refusal(error.name, error.why) from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise TransferError(f"the machine sent a damaged archive: {error}") from error
    except TimeoutError as error:
        raise TransferError(f"the machine stopped sending: {error}") from error
    except OSError as error:
        raise TransferError(
            f"cannot write what the machine sent: {error}",
            resolution="check the folder's rights and free space",
        ) from error
    finally:
        os.close(root)


def _check_amount(member: tarfile.TarInfo, entries: int, total: int, terms: ExtractionLimits) -> None:
    if entries > terms.max_entries or total > terms.max_bytes:
        raise _refused(member, f"more than {terms.max_entries} entries or {terms.max_bytes} bytes")


def _unpack(
    archive: tarfile.TarFile, member: tarfile.TarInfo, root: int, terms: ExtractionLimits
) -> tuple[int, int]:
    """Unpack one member.

    Returns:
        The number of parent folders created, and the size in bytes of a hard link's file, since a separate
        file made of it would take as many more.
    """
    if _left_out(member, terms):
        return 0, 0
    copied = 0
    *above, name = _segments(member, member.name) or [""]
    if any(key.startswith("GNU.sparse") for key in member.pax_headers):
        raise _refused(member, "a sparse file")
    if member.size < 0:
        raise _refused(member, "a negative size")
    if not name:  # the folder itself
        if not member.isdir():
            raise _refused(member, "it takes the folder's own place")
        return 0, 0
    with _folder(root, above, member, make=True) as (parent, made):
        if member.isdir():
            _make_folder(parent, name, member)
        elif member.isreg() and not member.issparse():
            _make_file(archive, parent, name, member)
        elif member.issym():
            if not _handed_over(member, terms):
                _check_target(member, len(above))
            _clear(parent, name, member)
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            copied = _make_hard_link(root, parent, name, member)
        else:
            raise _refused(member, "neither a file, a folder nor a link")
    return made, copied


def _left_out(member: tarfile.TarInfo, terms: ExtractionLimits) -> bool:
    """Skip and record a forbidden member if ``terms`` allow that; return whether it was skipped."""
    if terms.left_out is None:
        return False
    path = "/".join(_segments(member, member.name))
    try:
        if member.issym() and not _handed_over(member, terms):
            _check_target(member, path.count("/"))
        elif not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            raise _refused(member, "neither a file, a folder nor a link")
    except TransferError as error:
        _leave_out(member, terms, error)
        return True
    return False


def _leave_out(member: tarfile.TarInfo, terms: ExtractionLimits, why: TransferError) -> None:
    """Record a skipped member.

    Raises:
        TransferError: ``why``, if too many were skipped.
    """
    assert terms.left_out is not None, "else the archive is refused"
    path = "/".join(_segments(member, member.name))
    if len(terms.left_out) >= _MAX_LEFT_OUT:
        raise why
    terms.left_out[path] = why.brief.rpartition(": ")[2]


def _handed_over(member: tarfile.TarInfo, terms: ExtractionLimits) -> bool:
    """Return True if a link is unchanged since the host handed it over."""
    return terms.links.get("/".join(_segments(member, member.name))) == member.linkname


def _segments(member: tarfile.TarInfo, path: str) -> list[str]:
    """Split a member's path into names; reject ``..``, absolute paths and impossible names."""
    if path.startswith("/"):
        raise _refused(member, "an absolute path")
    segments = [segment for segment in path.split("/") if segment not in ("", ".")]
    if ".." in segments:
        raise _refused(member, "a path with ..")
    if "\0" in path or len(os.fsencode(path)) > _MAX_NAME:
        raise _refused(member, "an impossible name")
    if len(segments) > MAX_DEPTH:
        raise _refused(member, f"more than {MAX_DEPTH} folders inside each other")
    return segments


def _check_target(member: tarfile.TarInfo, depth: int) -> None:
    """Reject a symbolic link that leads out of the folder, alone or together with others.

    Since no link is followed while unpacking, the link lies ``depth`` real folders deep and may begin with as
    many "..". After a name, ".." is rejected: the name may be a link, whose parent is anywhere.
    """
    target = member.linkname
    parts = PurePosixPath(target).parts
    upwards = next((number for number, part in enumerate(parts) if part != ".."), len(parts))
    if not target or "\0" in target or len(os.fsencode(target)) > _MAX_NAME:
        raise _refused(member, "an impossible link")
    if target.startswith("/") or upwards > depth or ".." in parts[upwards:]:
        raise _refused(member, LEADS_OUT)


@contextlib.contextmanager
def _folder(
    root: int, segments: list[str], member: tarfile.TarInfo, *, make: bool
) -> Iterator[tuple[int, int]]:
    """Open the folder ``segments`` below ``root`` without following links.

    Yields:
        Its descriptor, and the number of folders created.
    """
    here, made = os.dup(root), 0
    try:
        for segment in segments:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, 0o755, dir_fd=here)
                        made += 1
                below = os.open(segment, FOLDER_FLAGS, dir_fd=here)
            except OSError as error:
                if error.errno not in _IN_THE_WAY:  # for example a full disk
                    raise
                raise _refused(member, f"a path through {segment[:100]!r}, which is no folder") from error
            os.close(here)
            here = below
        yield here, made
    finally:
        os.close(here)


def _make_folder(parent: int, name: str, member: tarfile.TarInfo) -> None:
    if not stat.S_ISDIR(_mode(parent, name)):
        _clear(parent, name, member)
        os.mkdir(name, 0o700, dir_fd=parent)
    descriptor = os.open(name, FOLDER_FLAGS, dir_fd=parent)
    try:
        os.fchmod(descriptor, member.mode & 0o755 | 0o700)
    finally:
        os.close(descriptor)


def _make_file(archive: tarfile.TarFile, parent: int, name: str, member: tarfile.TarInfo) -> None:
    content = archive.extractfile(member)
    assert content is not None, "a regular file has content"
    _clear(parent, name, member)
    with content, os.fdopen(os.open(name, _FILE, 0o600, dir_fd=parent), "wb") as file:
        shutil.copyfileobj(content, file, _PIECE)
        if file.tell() != member.size:
            raise tarfile.ReadError("unexpected end of data")
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o755 | 0o600)
        moment = min(max(0.0, float(member.mtime)), float(_LATEST))
        os.utime(file.fileno(), (moment, moment))


def _make_hard_link(root: int, parent: int, name: str, member: tarfile.TarInfo) -> int:
    """Create a hard link; return the file's size in bytes."""
    *above, source = _segments(member, member.linkname) or [""]
    with _folder(root, above, member, make=False) as (folder, _made):
        if not source or not stat.S_ISREG(_mode(folder, source)):
            raise _refused(member, "a hard link to what is no file")
        _clear(parent, name, member)
        os.link(source, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_size


def _clear(parent: int, name: str, member: tarfile.TarInfo) -> None:
    """Make room for ``name``: remove an earlier file or link, but refuse to replace a folder."""
    mode = _mode(parent, name)
    if stat.S_ISDIR(mode):
        raise _refused(member, "it takes a folder's place")
    if mode:
        os.unlink(name, dir_fd=parent)


def _mode(parent: int, name: str) -> int:
    """Return the mode of the entry ``name``; 0 if it does not exist."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0


def _refused(member: tarfile.TarInfo, why: str) -> TransferError:
    return _refusal(member.name, why)


def _refusal(name: str, why: str) -> TransferError:
    return TransferError(
        f"the machine sent {name[:200]!r}, which is refused: {why}",
        resolution="pull only the files that are wanted",
    )
