"""Copy files between host and machine, folders as tar streams; data from a machine is untrusted."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from pytest_microvm.agent.answers import Answer
from pytest_microvm.agent.link import GuestError, Link, PendingRequest
from pytest_microvm.agent.streams import Stream
from pytest_microvm.errors import TransferError, UsageError
from pytest_microvm.untrusted.extraction import MAX_BYTES, ExtractionLimits, extract
from pytest_microvm.untrusted.manifest import walk
from pytest_microvm.untrusted.nofollow import open_file, open_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 600.0
"""Seconds without progress after which a transfer is aborted."""

KINDS = frozenset(["file", "directory", "symlink", "other"])
"""Types of a path in a machine."""

_REFUSED_WAIT = 10.0  # seconds for a machine to end a transfer that the host aborted; it may never do so
_PIECE = 65536


class _Writer(io.RawIOBase):
    """Adapt a stream to a writable binary file."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        raw = bytes(data)  # type: ignore[call-overload]
        self._stream.write(raw, TIMEOUT)
        return len(raw)


class _Reader(io.RawIOBase):
    """Adapt a stream to a readable binary file."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer), TIMEOUT)
        buffer[: len(data)] = data
        return len(data)


def push(link: Link, source: Path, target: PurePosixPath, owner: tuple[int, int] | None = None) -> None:
    """Copy ``source`` on the host to ``target`` in the machine (see :meth:`MicroVM.push`).

    Args:
        link: The link to the machine's agent.
        source: A file or folder.
        target: Its path in the machine.
        owner: The numbers of the user and group to whom all of it belongs there; ``None``: a file belongs to
            root, and a folder's files keep the numbers that they have here.
    """
    if not source.exists():
        raise UsageError(
            f"{source} does not exist", resolution="check the path; it is relative to the current folder"
        )
    if source.is_dir():
        root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            send_tar(link, target, lambda archive: _fill(archive, root, owner))
        finally:
            os.close(root)
        return
    if not source.is_file():
        raise UsageError(f"{source} is neither a file nor a folder", resolution="push what can be copied")
    with open_named(source) as file:
        mode = os.fstat(file.fileno()).st_mode & 0o7777
        _send(link, "write", str(target), lambda stream: shutil.copyfileobj(file, _Writer(stream), _PIECE))
    link.call("path", timeout=TIMEOUT, do="chmod", path=str(target), mode=mode)
    if owner is not None:
        uid, gid = owner
        link.call("path", timeout=TIMEOUT, do="own", path=str(target), uid=uid, gid=gid)


def _fill(archive: tarfile.TarFile, root: int, owner: tuple[int, int] | None) -> None:
    """Write a folder into an archive; do not follow links, and skip devices, pipes and sockets."""
    known: dict[tuple[int, int], str] = {}
    archive.addfile(_member(".", os.fstat(root), owner))
    for found in walk(root):
        member = _member(found.path, found.status, owner)
        first = known.setdefault((found.status.st_dev, found.status.st_ino), found.path)
        mode = found.status.st_mode
        with contextlib.suppress(FileNotFoundError):  # removed since the walk listed it
            if stat.S_ISLNK(mode):
                member.type, member.linkname = tarfile.SYMTYPE, os.readlink(found.name, dir_fd=found.parent)
                archive.addfile(member)
            elif stat.S_ISREG(mode) and first != found.path:
                member.type, member.linkname = tarfile.LNKTYPE, first
                archive.addfile(member)
            elif stat.S_ISREG(mode):
                with open_file(found.parent, found.name) as file:
                    member.size = os.fstat(file.fileno()).st_size
                    archive.addfile(member, file)
            elif stat.S_ISDIR(mode):
                archive.addfile(member)
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member


def _member(name: str, status: os.stat_result, owner: tuple[int, int] | None) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = stat.S_IMODE(status.st_mode), status.st_mtime_ns // 10**9
    member.uid, member.gid = owner or (status.st_uid, status.st_gid)
    member.type = tarfile.DIRTYPE if stat.S_ISDIR(status.st_mode) else tarfile.REGTYPE
    return member


def send_tar(link: Link, target: PurePosixPath, fill: Callable[[tarfile.TarFile], None]) -> None:
    """Stream a tar archive, written by ``fill``, that the machine unpacks into the folder ``target``."""

    def work(stream: Stream) -> None:
        with tarfile.open(fileobj=_Writer(stream), mode="w|", bufsize=_PIECE) as archive:
            fill(archive)

    _send(link, "unpack", str(target), work)


def send_file(link: Link, op: str, target: str, file: IO[bytes]) -> None:
    """Stream a host file to the machine, to ``write`` it there or to ``unpack`` it (a tar archive)."""
    _send(link, op, target, lambda stream: shutil.copyfileobj(file, _Writer(stream), _PIECE))


def read_file(link: Link, path: str, limit: int) -> bytes:
    """Return the content of a file in the machine, at most ``limit`` bytes.

    Raises:
        OSError: The machine could not read the file.
        TransferError: The file is longer than ``limit``.
    """
    with _receiving(link, "read", path) as stream:
        parts, total = [], 0
        while data := stream.read(_PIECE, TIMEOUT):
            total += len(data)
            if total > limit:
                stream.discard()
                raise TransferError(
                    f"{path} is longer than {limit} bytes", resolution="use pull() for large files"
                )
            parts.append(data)
    return b"".join(parts)


def write_file(link: Link, path: str, data: bytes, *, append: bool = False) -> None:
    """Write or append ``data`` to a file in the machine."""
    _send(link, "write", path, lambda stream: stream.write(data, TIMEOUT), append=append)


def pull(link: Link, source: PurePosixPath, target: Path) -> Path:
    """Copy ``source`` in the machine to ``target`` on the host (see :meth:`MicroVM.pull`)."""
    try:
        found = Answer(link, link.call("path", timeout=TIMEOUT, do="stat", path=str(source)))
    except GuestError as error:
        raise as_os_error(error, str(source)) from None
    kind, mode = found.choice("kind", KINDS), found.whole("mode")
    final = target / source.name if target.is_dir() else target
    if not final.parent.is_dir():
        raise UsageError(
            f"{final.parent} is not a folder", resolution="make it first, or pull into an existing one"
        )
    # Received into a temporary folder and renamed when complete: an aborted transfer leaves no partial files.
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".pull-") as folder:
        received = Path(folder) / "content"
        if kind == "directory":
            received.mkdir()
            with _receiving(link, "pack", str(source)) as stream:
                extract(io.BufferedReader(_Reader(stream), _PIECE), received)
        elif kind == "file":
            with _receiving(link, "read", str(source)) as stream, received.open("wb") as file:
                _receive_file(stream, file)
            received.chmod(mode & 0o755 | 0o600)
        else:
            raise UsageError(f"{source} is neither a file nor a folder", resolution="read it with a command")
        try:
            put(received, final)
        except OSError as error:
            raise TransferError(
                f"cannot put what the machine sent in its place: {error}",
                resolution="pull it into an empty folder",
            ) from error
    return final


def receive_tree(link: Link, source: PurePosixPath, folder: Path, terms: ExtractionLimits) -> None:
    """Unpack the machine's folder ``source`` into a folder of the host, as ``terms`` allow.

    Raises:
        OSError: The machine could not read the folder.
        TransferError: The archive was refused or could not be written.
    """
    with _receiving(link, "pack", str(source)) as stream:
        extract(io.BufferedReader(_Reader(stream), _PIECE), folder, terms)


def receive_file(link: Link, source: PurePosixPath, file: IO[bytes], limit: int) -> None:
    """Copy a machine's file, at most ``limit`` bytes, into a file of the host.

    Raises:
        OSError: The machine could not read the file.
        TransferError: The file is longer than ``limit``.
    """
    with _receiving(link, "read", str(source)) as stream:
        _receive_file(stream, file, limit)


def receive_root_changes(link: Link, file: IO[bytes], limit: int) -> None:
    """Copy the archive of a machine's changes to its root file system, in the form of an OCI layer.

    Args:
        link: The machine's agent.
        file: Takes the archive, which is untrusted.
        limit: Bytes of the archive.

    Raises:
        OSError: The machine could not read its scratch disk.
        TransferError: The archive is longer than ``limit``.
    """
    with _receiving(link, "root_changes", "/") as stream:
        _receive_file(stream, file, limit)


def _receive_file(stream: Stream, file: IO[bytes], limit: int = MAX_BYTES) -> None:
    total = 0
    while data := stream.read(_PIECE, TIMEOUT):
        total += len(data)
        if total > limit:
            raise TransferError(f"the machine sent more than {limit} bytes")
        file.write(data)


def put(received: Path, final: Path) -> None:
    """Move a received file or folder to ``final`` on the same file system; merge into an existing folder.

    Links at the destination are replaced, not followed: they may also come from a machine.
    """
    if received.is_symlink() or not received.is_dir():
        received.replace(final)
    elif final.is_symlink() or not final.is_dir():
        final.unlink(missing_ok=True)
        received.replace(final)
    else:
        for entry in sorted(received.iterdir()):
            put(entry, final / entry.name)


def as_os_error(error: GuestError, path: str) -> Exception:
    """Convert a guest's error to the matching OSError, or to TransferError if it has no error number."""
    known = {"FileNotFoundError": errno.ENOENT, "PermissionError": errno.EACCES}
    code = error.errno or known.get(error.kind, 0)
    if code:
        return OSError(code, f"in the machine: {os.strerror(code)}", path)
    return TransferError(f"{path}: {error.brief}")


def _send(link: Link, op: str, target: str, work: Callable[[Stream], object], **options: object) -> None:
    stream = link.open_stream()
    request = link.request(op, path=target, stream=stream.number, **options)
    try:
        # A guest that gives up closes the stream; its reply names the reason.
        with contextlib.suppress(BrokenPipeError):
            work(stream)
    except Exception:  # for example, the source cannot be read
        _end_early(stream, request)
        raise
    finally:
        stream.discard()
    try:
        request.wait(TIMEOUT)
    except GuestError as error:
        raise as_os_error(error, target) from None


@contextlib.contextmanager
def _receiving(link: Link, op: str, path: str) -> Iterator[Stream]:
    stream = link.open_stream()
    request = link.request(op, path=path, stream=stream.number)
    try:
        yield stream
    except Exception:  # for example, the content is refused or the host's disk is full
        _end_early(stream, request)
        raise
    finally:
        stream.discard()
    try:
        request.wait(TIMEOUT)
    except GuestError as error:
        raise as_os_error(error, path) from None


def _end_early(stream: Stream, request: PendingRequest) -> None:
    """Abort a transfer that failed on the host, and wait for the machine to stop writing."""
    stream.discard()
    with contextlib.suppress(GuestError, TimeoutError):
        request.wait(_REFUSED_WAIT)
