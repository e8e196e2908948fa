"""Template files: copy them sparsely, compute content digests, format disks, sync them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_microvm.cache.disk import explained, need_space
from pytest_microvm.errors import HostError
from pytest_microvm.programs.needed import require_program

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEMPORARY = "/var/tmp"  # noqa: S108 - on a disk, which /tmp often is not
_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)
_FORMATTED = 8 * 1024**2  # bytes; what an empty file system takes is less


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file and keep its holes; blocks are shared if the file system can (copy_file_range(2)).

    Raises:
        HostError: The target's disk is full.
        OSError: The target cannot be written for another reason.
    """
    with explained(target.parent), source.open("rb") as reading, target.open("wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        os.ftruncate(writing.fileno(), size)
        for start, end in _data(reading.fileno(), size):
            _copy_range(reading.fileno(), writing.fileno(), start, end)


def content_digest(path: Path) -> str:
    """Return a digest of a file's content: the SHA-256 of its size and of its blocks with their offsets.

    Zero blocks are skipped, so holes cost nothing, and a copy with other holes, or none, has the same digest.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(b"%d\n" % size)
        done = 0
        for start, end in _data(file.fileno(), size):
            for place in range(max(done, start - start % _BLOCK), end, _BLOCK):
                block = os.pread(file.fileno(), _BLOCK, place)
                if block != _ZEROS[: len(block)]:
                    digest.update(b"%d\n" % place)
                    digest.update(block)
                done = place + _BLOCK
    return digest.hexdigest()


def _data(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each data range of a file, without its holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end (ENXIO)
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def next_data(path: Path, place: int, most: int) -> tuple[int, bytes]:
    """Return the offset of a file's next data, at or after ``place``, and up to ``most`` bytes of it.

    Returns:
        The file's size and no data, at the end of the file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if place >= size:
            return size, b""
        try:
            start = os.lseek(file.fileno(), place, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end (ENXIO)
            return size, b""
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        return start, os.pread(file.fileno(), min(end - start, most), start)


def unnamed_copy(source: Path) -> IO[bytes]:
    """Return a sparse copy of a file in an unnamed temporary file, which is deleted when closed.

    Raises:
        HostError: The disk for temporary files is full.
    """
    copy = tempfile.TemporaryFile(dir=_TEMPORARY if os.access(_TEMPORARY, os.W_OK) else None)  # noqa: SIM115
    try:
        copy_sparse(source, Path(f"/proc/self/fd/{copy.fileno()}"))
    except BaseException:
        copy.close()
        raise
    return copy


def _copy_range(reading: int, writing: int, start: int, end: int) -> None:
    while start < end:
        copied = os.copy_file_range(reading, writing, end - start, start, start)
        if copied == 0:
            raise OSError("the file became shorter while it was copied")
        start += copied


def format_scratch(path: Path, size: int) -> None:
    """Create a sparse file with an empty ext4 file system, without a journal: it outlives no crash.

    Raises:
        HostError: mke2fs is missing or failed, or the disk is full.
    """
    program = require_program("mke2fs")
    with explained(path.parent), path.open("wb") as file:
        file.truncate(size)
    command = [program, "-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0"]
    command += ["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        need_space(path.parent, _FORMATTED)
        raise HostError("mke2fs could not format a scratch disk", details=done.stderr.strip())


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_usage(folder: Path) -> int:
    """Return the bytes that a folder's files occupy on the disk, without holes."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # it is being removed
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False):
                total += entry.stat().st_blocks * 512
    return total
