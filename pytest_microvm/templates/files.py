"""The files of a template: copied sparsely, formatted, kept on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from pytest_microvm.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

_SYSTEM_FOLDERS = "/usr/sbin:/sbin"


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file without filling its holes; file systems that can share blocks do (copy_file_range(2)).

    Raises:
        OSError: The target cannot be written.
    """
    with source.open("rb") as reading, target.open("wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        os.ftruncate(writing.fileno(), size)
        end = 0
        while end < size:
            try:
                start = os.lseek(reading.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole up to the end (ENXIO)
                break
            end = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            _copy_range(reading.fileno(), writing.fileno(), start, end)


def _copy_range(reading: int, writing: int, start: int, end: int) -> None:
    while start < end:
        copied = os.copy_file_range(reading, writing, end - start, start, start)
        if copied == 0:
            raise OSError("the file became shorter while it was copied")
        start += copied


def format_scratch(path: Path, size: int) -> None:
    """Make a sparse file of ``size`` bytes with an empty ext4 file system; no journal: it outlives no crash.

    Raises:
        HostError: mke2fs is missing or failed.
    """
    program = find_mke2fs()
    with path.open("wb") as file:
        file.truncate(size)
    command = [program, "-q", "-F", "-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0"]
    command += ["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostError("mke2fs could not format a scratch disk", details=done.stderr.strip())


def find_mke2fs() -> str:
    """Return mke2fs's file, also where PATH does not have the administrator's programs.

    Raises:
        HostError: It is missing.
    """
    program = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":" + _SYSTEM_FOLDERS)
    if program is None:
        raise HostError("mke2fs is missing", resolution="apt-get install e2fsprogs")
    return program


def sync(path: Path) -> None:
    """Write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_usage(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk (holes do not count)."""
    total = 0
    with contextlib.suppress(FileNotFoundError):  # it is being removed
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False):
                total += entry.stat().st_blocks * 512
    return total
